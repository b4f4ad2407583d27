"""A run's whole state in one folder per saved step, published atomically and checked before it is believed.

    RUN/checkpoints/step-000040/policy/  actor/  reference/  rollouts-0.npz  state.json  manifest.json
    latest -> step-000040      best -> step-000020, with run.keep_best

A folder is written as .step-000040.unfinished and renamed when its manifest (size and sha256 of every file)
is on disk; a later crash leaves at most an unfinished folder. Random draws are functions of (seed, step,
rollout), so that no generator needs saving. `rollouts-*` are the finished groups of all steps in flight,
`reference/` is there where it is refreshed.
"""

import datetime
import json
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_jackpot.config.run import Run
from megatron_jackpot.models.checkpoint import (
    Snapshot,
    changed_settings,
    load_model,
    load_schedule,
    schedule_state,
)
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.parallel.reduce import raise_on_all_ranks
from megatron_jackpot.rollout.finished_groups import Groups, load_groups, save_groups
from megatron_jackpot.run import formats
from megatron_jackpot.run.manifest import MANIFEST, Digests, digest
from megatron_jackpot.run.provenance import CHECKPOINTS, check_models, checkpoints, step_of
from megatron_jackpot.run.watchdog import Watchdog
from megatron_jackpot.train.auto_packing import SAVED
from megatron_jackpot.train.digests import digests
from megatron_jackpot.train.kept import MEASURED, STATE, tidy
from megatron_jackpot.train.state import REFERENCE, TrainState

log = logging.getLogger(__name__)


class Saver:
    """Saves of one run, one at a time; every rank calls every method.

    The pause that training sees is a copy of this rank's own state into host memory. A thread gathers,
    writes, hashes and publishes, on process groups that training never uses: collectives of two threads on
    one group would mix.
    """

    def __init__(self, state: TrainState, config: Run, watchdog: Watchdog) -> None:
        self.state, self.config, self.watchdog, self.mesh = state, config, watchdog, state.mesh
        self.folder = Path(config.folder) / CHECKPOINTS
        self.num_failed = 0
        self.bad_checkpoints: set[str] = set()
        """Checkpoints that the run went back to and has not saved anew since."""
        limit = datetime.timedelta(seconds=config.phase_timeout_s)
        group = dist.new_group(backend="gloo", timeout=limit)
        assert isinstance(group, dist.ProcessGroup), "every rank is in it"
        self._group = group
        self._snapshots: dict[str, Snapshot] = {}
        self._writing: _Writing | None = None
        if config.save_every is not None and config.save_in_background:
            # Host memory is slow at first touch: that is no pause of the first save then.
            self._snapshots = {name: Snapshot(model) for name, model in state.saved.items()}

    def save(self, *, background: bool) -> None:
        """Save the state after `state.num_steps` steps; in the foreground it is published on return.

        Raises OSError on every rank when a foreground save cannot be written.
        """
        self.wait()
        final = self.folder / f"step-{self.state.num_steps:06d}"
        unfinished = final.with_name(f".{final.name}.unfinished")
        refusal = self.mesh.from_main(self._make_room(unfinished) if self.mesh.is_main else None)
        if refusal:
            self._fail(OSError(refusal), raise_it=not background)
            return
        self.bad_checkpoints.discard(final.name)
        state = run_state(self.state)
        groups = self.state.finished_groups if self.mesh.is_leader else {}
        self._take()
        self._writing = _Writing(self, unfinished, final, state, dict(groups))
        if not background:
            self.wait(raise_it=True)

    def poll(self) -> None:
        """Take note of a save that has ended."""
        if self._writing is not None and not self._writing.thread.is_alive():
            self._note_end(raise_it=False)

    def wait(self, *, raise_it: bool = False) -> None:
        """Until the save under way has ended. Raises TimeoutError when it takes longer than
        run.phase_timeout_s."""
        if self._writing is None:
            return
        limit = self.config.phase_timeout_s
        self._writing.thread.join(limit)
        if self._writing.thread.is_alive():
            raise TimeoutError(
                f"Rank {dist.get_rank()} waited {limit:g} s (run.phase_timeout_s) for the files of "
                f"{self._writing.unfinished} to be written."
            )
        self._note_end(raise_it)

    def _take(self) -> None:
        for name, model in self.state.saved.items():
            if name in self._snapshots:
                self._snapshots[name].take()
            else:
                self._snapshots[name] = Snapshot(model)

    def _note_end(self, raise_it: bool) -> None:
        assert self._writing is not None
        writing, self._writing = self._writing, None
        if writing.error is not None:
            self._fail(writing.error, raise_it)

    def _make_room(self, unfinished: Path) -> str | None:
        """An empty folder to write into; a reason not to."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".step-*"):
                shutil.rmtree(left)
            for name in self.state.saved:
                (unfinished / name).mkdir(parents=True)
            newest = checkpoints(self.folder.parent)[-1:]
            need = sum(path.stat().st_size for folder in newest for path in _files(folder))
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            return str(error)
        if free < need:
            return (
                f"{self.folder} has {free / 1e9:.2f} GB free, the last checkpoint took {need / 1e9:.2f} GB. "
                "Free some space or lower run.keep."
            )
        return None

    def write(self, writing: "_Writing") -> None:
        """Everything of a save that training need not wait for; what fails on one rank raises on all."""
        with self.watchdog.phase(f"write {writing.final.name}"):
            written = self._write_files(writing)
        with self.watchdog.phase(f"publish {writing.final.name}"), raise_on_all_ranks(self._group):
            if self.mesh.is_main:
                self._publish(writing, written)

    def _write_files(self, writing: "_Writing") -> Digests:
        """Size and hash of what every rank has written."""
        unfinished, group, rank = writing.unfinished, self._group, dist.get_rank()
        for name in self.state.saved:
            self._snapshots[name].write(unfinished / name, group)
        parts: list[Any] = [None] * dist.get_world_size()
        with raise_on_all_ranks(group):
            if self.mesh.is_main:
                _write(unfinished / STATE, writing.state)
            if writing.groups:
                save_groups(unfinished / f"rollouts-{self.mesh.dp_rank}.npz", writing.groups)
            own = [path for path in _files(unfinished) if path.name.startswith(f"__{rank}_")]
            mine = {str(path.relative_to(unfinished)): digest(path) for path in own}
        dist.all_gather_object(parts, mine, group=group)
        return {name: entry for part in parts for name, entry in part.items()}

    def _publish(self, writing: "_Writing", written: Digests) -> None:
        unfinished, final = writing.unfinished, writing.final
        for path in _files(unfinished):
            if (name := str(path.relative_to(unfinished))) not in written:
                written[name] = digest(path)
        _write(unfinished / MANIFEST, {"step": writing.state["num_steps"], "files": written})
        replaced = final.with_name(f".{final.name}.replaced")
        if final.exists():
            final.rename(replaced)
        unfinished.rename(final)
        _sync(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        tidy(self.config, final)
        _sync(self.folder)

    def _fail(self, error: BaseException, raise_it: bool) -> None:
        self.num_failed += 1
        if self.mesh.is_main:
            for left in self.folder.glob(".step-*"):
                shutil.rmtree(left, ignore_errors=True)
        if raise_it:
            raise OSError(f"The checkpoint could not be saved: {error}") from error
        log.warning(f"the checkpoint could not be saved, the run goes on: {error}")


class _Writing:
    """The thread that writes and publishes one checkpoint."""

    def __init__(self, saver: Saver, unfinished: Path, final: Path, state: dict[str, Any], groups: Groups):
        self.saver, self.unfinished, self.final = saver, unfinished, final
        self.state, self.groups = state, groups
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True, name="checkpoint")
        self.thread.start()

    def _run(self) -> None:
        try:
            self.saver.write(self)
        except BaseException as error:
            # For the training thread, which raises or reports it.
            self.error = _cause(error)


def _cause(error: BaseException) -> BaseException:
    """The error of the first rank that had one, where torch's save has collected them."""
    if not (isinstance(error, CheckpointException) and error.failures):
        return error
    rank, (first, _) = min(error.failures.items(), key=lambda item: item[0])
    return OSError(f"rank {rank}: {first}")


def expected_bytes(state: TrainState) -> int:
    """About how large a checkpoint gets: every model's weights, and fp32 copy and two moments of those that
    learn; every rank calls it."""
    local = sum(
        parameter.numel() * (parameter.element_size() + 12 * (model.optimizer is not None))
        for model in state.saved.values()
        for chunk in model.chunks
        for parameter in chunk.parameters()
    )
    total = torch.tensor(float(local), dtype=torch.float64, device=state.mesh.device)
    dist.all_reduce(total)
    return int(total.item() / state.mesh.dp)


def check_room(state: TrainState, run: Run) -> None:
    """Raises ValueError, on every rank, when the disk of a run that saves has no room for two checkpoints."""
    need = 2 * expected_bytes(state)
    free = 0
    if state.mesh.is_main:
        Path(run.folder).mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run.folder).free
    free = state.mesh.from_main(free)
    if run.save_every is not None and free < need:
        raise ValueError(
            f"run.folder = {run.folder} has {free / 1e9:.2f} GB free, two checkpoints take about "
            f"{need / 1e9:.2f} GB. "
            "Free some space, or set run.save_every=null."
        )


def resume(state: TrainState, run_folder: Path, newest: str | None = None) -> list[str]:
    """Load the newest checkpoint that is whole; every rank calls it. Returns what went wrong with newer ones,
    and which settings of the optimizers are others than it was made with.

    Those after `newest` (a name like step-000040) are left aside.

    Raises ValueError when there is none, when it is of another format, or when prompts or seed are others
    than those it was made with, or the models are.
    """
    mesh = state.mesh
    troubles = []
    for folder in reversed(mesh.from_main(checkpoints(run_folder) if mesh.is_main else None)):
        if newest is not None and step_of(folder) > step_of(Path(newest)):
            continue
        trouble = damage(folder, mesh)
        if trouble is None:
            return troubles + _load(state, folder)
        troubles.append(f"{folder} is damaged and passed over: {trouble}.")
    raise ValueError(
        f"run.resume: {Path(run_folder) / CHECKPOINTS} holds no whole checkpoint. "
        + (" ".join(troubles) or "Set run.resume=false to start from step 0.")
    )


def damage(folder: Path, mesh: Mesh) -> str | None:
    """What is wrong with a checkpoint, the same on every rank; None if every file is as it was written."""
    wanted: Digests | str = ""
    if mesh.is_main:
        try:
            wanted = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            wanted = f"{MANIFEST} cannot be read ({error})"
    wanted = mesh.from_main(wanted)
    if isinstance(wanted, str):
        return wanted
    found = digests(folder, _files(folder))
    names = sorted(name for name in {*wanted, *found} if found.get(name) != wanted.get(name))
    return f"{', '.join(names[:3])} differ from the manifest" if names else None


def run_state(state: TrainState) -> dict[str, Any]:
    """Everything beside the models, as JSON; the same on every rank."""
    mesh = state.mesh
    controllers = {n: controller.state_dict() for n, controller in state.methods.controllers().items()}
    return {
        formats.FIELD: formats.current("checkpoint"),
        "num_steps": state.num_steps,
        "num_probes": state.num_probes,
        SAVED: state.packing_tokens,
        MEASURED: state.measured,
        "guard": state.guard.state_dict(),
        "loader": mesh.from_main(state.loader.state_dict() if state.loader is not None else None),
        # They measure on the last pipeline stage and stand still elsewhere.
        "controllers": mesh.object_from_last_stage(controllers),
        "allocation": mesh.from_main(state.methods.allocation.state_dict()),
        "schedule": {name: schedule_state(model) for name, model in state.models.items()},
        "optimizer": {name: model.optimizer_settings for name, model in state.models.items()},
        "reference": state.reference and state.reference.state_dict(),
    }


def _load(state: TrainState, folder: Path) -> list[str]:
    """What is worth telling of it."""
    saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
    formats.check_format("checkpoint", saved.get(formats.FIELD, 0), folder / STATE)
    check_models(folder, state.models)
    if state.reference is not None:
        state.reference.load_state_dict(saved.get("reference"), folder / REFERENCE)
    changed: set[int] = set()
    if state.loader is not None and saved["loader"] is not None:
        changed = state.loader.load_state_dict(saved["loader"])
        if changed and state.mesh.is_main:
            log.warning(f"data.*: {len(changed)} rows have changed since, {sorted(changed)[:5]} (line - 1)")
    for name, model in state.models.items():
        load_model(model, folder / name)
        load_schedule(model, saved["schedule"][name])
    told = []
    if state.reference is not None and state.reference.refresh_every and saved.get("reference") is None:
        # As loaded it is the policy at the start, which may be many more steps ago than that.
        state.reference.become(state.policy)
        told.append(
            f"policy.reference.refresh_every = {state.reference.refresh_every}: the checkpoint knew of no "
            f"reference, from here on it is the policy after step {saved['num_steps']}."
        )
    state.methods.load_controllers(saved["controllers"])
    # One without it is of a run in which every prompt got the same.
    if "allocation" in saved:
        state.methods.allocation.load_state_dict(saved["allocation"])
    state.guard.load_state_dict(saved["guard"])
    state.num_steps, state.num_probes = saved["num_steps"], saved["num_probes"]
    state.measured = saved.get(MEASURED, {})
    if state.mesh.is_leader and state.loader is not None:
        prompts = {prompt.id: prompt for prompt in state.loader.prompts}
        # Every leader takes all: with another dp size, a prompt is another leader's. Of copies, one may lack
        # a later round.
        for path in sorted(folder.glob("rollouts-*.npz")):
            for key, group in load_groups(path, prompts, changed).items():
                if len(group) > len(state.finished_groups.get(key, ())):
                    state.finished_groups[key] = group
    # One without them has nothing to compare.
    before = saved.get("optimizer", {})
    for name, model in state.models.items():
        told += changed_settings(model, before.get(name, {}))
    return told


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _write(path: Path, value: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
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
