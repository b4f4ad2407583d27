"""A run's whole state in one folder per saved step, published atomically and checked before it is believed.

    RUN/checkpoints/step-000040/policy/  actor/  state.json  manifest.json

A folder is written as .step-000040.unfinished and renamed when its manifest (size and sha256 of every file) is on
disk; a later crash leaves at most an unfinished folder. Random draws are functions of (seed, step, rollout), so
that no generator needs saving.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_jackpot.models.checkpoint import load_model, load_schedule, save_model, schedule_state
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.provenance import CHECKPOINTS, checkpoints

MANIFEST = "manifest.json"
STATE = "state.json"
MODELS = ("policy", "actor")


def save(trainer: Any, run_folder: Path, keep: int) -> Path:
    """Write the state after `trainer.num_steps` steps and remove all but the newest `keep`; every rank calls it."""
    mesh: Mesh = trainer.mesh
    final = Path(run_folder) / CHECKPOINTS / f"step-{trainer.num_steps:06d}"
    unfinished = final.with_name(f".{final.name}.unfinished")
    if mesh.is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        for name in MODELS:
            (unfinished / name).mkdir(parents=True)
    mesh.barrier()
    for name in MODELS:
        save_model(getattr(trainer, name), unfinished / name)
    state = run_state(trainer)
    if mesh.is_main:
        _write(unfinished / STATE, state)
    mesh.barrier()
    digests = _digests(unfinished)
    if mesh.is_main:
        _write(unfinished / MANIFEST, {"step": trainer.num_steps, "files": digests})
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        _sync(final.parent)
        for old in checkpoints(run_folder)[:-keep]:
            shutil.rmtree(old)
    mesh.barrier()
    return final


def resume(trainer: Any, run_folder: Path) -> list[str]:
    """Load the newest checkpoint that is whole; every rank calls it. Returns what went wrong with newer ones.

    Raises ValueError when there is none, or when prompts or seed are others than those it was made with.
    """
    troubles = []
    for folder in reversed(checkpoints(run_folder)):
        trouble = damage(folder, trainer.mesh)
        if trouble is None:
            _load(trainer, folder)
            return troubles
        troubles.append(f"{folder} is damaged and passed over: {trouble}.")
    raise ValueError(
        f"run.resume = true, but {Path(run_folder) / CHECKPOINTS} holds no whole checkpoint. "
        + (" ".join(troubles) or "Set run.resume=false to start from step 0.")
    )


def damage(folder: Path, mesh: Mesh) -> str | None:
    """What is wrong with a checkpoint, the same on every rank; None if every file is as it was written."""
    wanted: dict[str, list] | str = ""
    if mesh.is_main:
        try:
            wanted = json.loads((folder / MANIFEST).read_text())["files"]
        except (OSError, ValueError, KeyError) as error:
            wanted = f"{MANIFEST} cannot be read ({error})"
    wanted = mesh.from_main(wanted)
    if isinstance(wanted, str):
        return wanted
    found = _digests(folder)
    names = sorted(name for name in {*wanted, *found} if found.get(name) != wanted.get(name))
    return f"{', '.join(names[:3])} differ from the manifest" if names else None


def run_state(trainer: Any) -> dict[str, Any]:
    """Everything beside the models, as JSON; the same on every rank."""
    mesh: Mesh = trainer.mesh
    controllers = {n: controller.state_dict() for n, controller in trainer.methods.controllers().items()}
    return {
        "num_steps": trainer.num_steps,
        "num_probes": trainer.num_probes,
        "loader": mesh.from_main(trainer.loader.state_dict() if trainer.loader is not None else None),
        # They measure on the last pipeline stage and stand still elsewhere.
        "controllers": mesh.object_from_last_stage(controllers),
        "schedule": {name: schedule_state(getattr(trainer, name)) for name in MODELS},
    }


def _load(trainer: Any, folder: Path) -> None:
    state = json.loads((folder / STATE).read_text())
    if trainer.loader is not None and state["loader"] is not None:
        trainer.loader.load_state_dict(state["loader"])
    for name in MODELS:
        load_model(getattr(trainer, name), folder / name)
        load_schedule(getattr(trainer, name), state["schedule"][name])
    trainer.methods.load_controllers(state["controllers"])
    trainer.num_steps, trainer.num_probes = state["num_steps"], state["num_probes"]


def _digests(folder: Path) -> dict[str, list]:
    """File -> [bytes, sha256] of a folder on shared disk, the work spread over the ranks; every rank calls it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = {}
    for path in files[rank::world]:
        try:
            with path.open("rb") as file:
                entry = [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
        except OSError as error:
            entry = [-1, str(error)]
        mine[str(path.relative_to(folder))] = entry
    parts: list = [None] * world
    dist.all_gather_object(parts, mine)
    return {name: entry for part in parts for name, entry in part.items()}


def _write(path: Path, value: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """The folder's entries to disk: a rename is only then safe from a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
