"""A run's folder around a start: what must hold of it, what a launch writes before training, and taking that
back."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_jackpot.config import Config, ConfigError
from megatron_jackpot.config.model_folder import read_json
from megatron_jackpot.launch.lock import LOCK_FILE, only_launch
from megatron_jackpot.run.clock import STARTED_FILE
from megatron_jackpot.run.interrupt import STOP_FILE, STOPPED_FILE
from megatron_jackpot.run.manifest import MANIFEST
from megatron_jackpot.run.provenance import (
    BEST,
    CHECKPOINTS,
    CONFIG_FILE,
    LATEST,
    PROVENANCE_FILE,
    check_models,
    check_run_folder,
    checkpoints,
    last_recorded,
    step_of,
)
from megatron_jackpot.run.watchdog import DOING

TRAIN_LOG = "train.log"
REFUSED = "megatron-jackpot: "
"""How a line begins that says why a command was refused."""
OWN_FILES = (
    *(STOP_FILE, STOPPED_FILE, CONFIG_FILE, PROVENANCE_FILE, STARTED_FILE, TRAIN_LOG, DOING),
    *(LOCK_FILE, "server-*.log", "served-fp8", "cache"),
)
"""What a launch writes before training starts: a folder with nothing else may be used again."""


def used_for(folder: Path) -> list[str]:
    """Names in a folder that no launch writes before training starts."""
    found = sorted(folder.iterdir()) if folder.exists() else []
    return [path.name for path in found if not any(path.match(pattern) for pattern in OWN_FILES)]


def folder_mistakes(config: Config, *, new: bool) -> Iterator[str]:
    """What keeps a run from its folder; `new`: one that is no continuation must find none there."""
    run = config.run
    try:
        parent = next(path for path in (run.folder, *run.folder.absolute().parents) if path.exists())
    except OSError as error:  # A name that is too long.
        yield f"run.folder = {run.folder}: {error.strerror}. Set another one."
        return
    if not parent.is_dir():
        yield f"run.folder = {run.folder}: {parent} is a file. Set run.folder to a new folder."
        return
    if not os.access(parent, os.W_OK):
        yield f"run.folder = {run.folder}: user {os.geteuid()} may not write to {parent}. Set another one."
    own = run.folder / CONFIG_FILE
    if own.exists() and not (run.folder / PROVENANCE_FILE).exists():
        yield (
            f"run.folder = {run.folder} holds a {CONFIG_FILE} that no launch wrote; the run would put "
            f"its own there. Move it, as with `mv {own} {run.folder}.yaml`, or set another run.folder."
        )
    try:
        if run.resume:
            check_run_folder(run.folder)
            # One that is not whole is passed over, and says nothing of the run.
            whole = [path for path in checkpoints(run.folder) if (path / MANIFEST).is_file()]
            for checkpoint in whole[-1:]:
                check_models(checkpoint, config.models)
            for pointer in (run.folder / CHECKPOINTS / name for name in (LATEST, BEST)):
                yield from _no_link(pointer)
        elif new and (found := used_for(run.folder)):
            yield (
                f"run.folder = {run.folder} already holds a run ({', '.join(found[:4])}). Continue it with "
                "run.resume=auto, which starts afresh where nothing was saved, or set another run.folder."
            )
        elif not new:
            yield from _lost(config)
    except ValueError as error:
        yield str(error)
    if run.resume is True and not checkpoints(run.folder):
        yield (
            f"run.resume = true, but run.folder = {run.folder} holds no checkpoint. Set run.resume=auto, "
            "which starts afresh there."
        )


def _lost(config: Config) -> Iterator[str]:
    """Steps that a job would do again: it goes on from what is saved, and leaves a run that is over alone."""
    folder = config.run.folder
    if checkpoints(folder) or finished(config) or not (steps := last_recorded(folder)):
        return
    yield (
        f"run.folder = {folder} holds {steps} steps of a run that saved nothing: a job would drop them and "
        "begin anew. Set run.resume=auto to have that, or another run.folder. With run.save_every a job goes "
        "on."
    )


def _no_link(pointer: Path) -> Iterator[str]:
    """A copy that follows links makes a folder of `latest`, and no save could put the link there again."""
    if not pointer.is_dir() or pointer.is_symlink():
        return
    step = pointer.with_name(f"step-{read_json(pointer / MANIFEST, {}).get('step', 0):06d}")
    remedy = f"{step} is beside it, so `rm -r {pointer}`" if step.is_dir() else f"`mv {pointer} {step}`"
    yield (
        f"run.folder: {pointer} is a folder where a link belongs, as `cp -rL` leaves it: nothing could be "
        f"saved. {remedy}. `cp -a` and `rsync -a` keep links."
    )


def finished(config: Config) -> str | None:
    """What is said of a run whose steps are all done; None where something is left to do."""
    run = config.run
    saved = checkpoints(run.folder)
    # What saved nothing and is over cannot be trained on, and shall not be begun anew over its own records.
    step = step_of(saved[-1]) if saved else last_recorded(run.folder)
    models = run.folder / "hf" / f"step-{step:06d}"
    exported = all((models / name / "config.json").is_file() for name in config.models)
    if step < run.steps or (run.save_hf_at_end and not exported):
        return None
    where = f", its models in {models}" if exported else ""
    if not saved:
        return (
            f"nothing to do: {run.folder} has metrics up to step {step}{where}, and run.steps = {run.steps}. "
            "Nothing was saved to train on from (run.save_every); for another run set another run.folder."
        )
    return (
        f"nothing to do: {saved[-1]} is after step {step}{where}, and run.steps = {run.steps}. To train on, "
        f"raise it: run.steps={2 * step}."
    )


def missing(folder: Path) -> list[Path]:
    """A folder and those above it that are not there, from the inside out."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def take_back(made: list[Path]) -> bool:
    """Remove the folders that a start which was refused has made: the innermost, unless training wrote into
    it, and those above it that are empty. Whether any went."""
    if not made or used_for(made[0]):
        return False
    shutil.rmtree(made[0], ignore_errors=True)
    with suppress(OSError):
        for folder in made[1:]:
            folder.rmdir()
    return True


def refusals(log: Path) -> list[str]:
    """What ranks refused to start for, in the words of their log, each once."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return list(dict.fromkeys(line.removeprefix(REFUSED) for line in lines if line.startswith(REFUSED)))


@contextmanager
def own_folder(folder: Path) -> Iterator[list[Path]]:
    """Hold a run's folder within; the folders that were made for it.

    Raises ConfigError when another launch has it, or it cannot be made. They are taken back where a
    ConfigError ends what is done within, while the folder is still held: another launch's stay.
    """
    made = missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        take_back(made)
        raise ConfigError(f"run.folder = {folder} cannot be made: {error}. Set another one.") from error
    with only_launch(folder):
        try:
            yield made
        except ConfigError:
            take_back(made)
            raise
