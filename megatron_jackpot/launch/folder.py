"""A run's folder around a start: what a launch writes before training, and taking that back."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_jackpot.config import ConfigError
from megatron_jackpot.launch.lock import LOCK_FILE, only_launch
from megatron_jackpot.run.clock import STARTED_FILE
from megatron_jackpot.run.interrupt import STOP_FILE, STOPPED_FILE
from megatron_jackpot.run.provenance import CONFIG_FILE, PROVENANCE_FILE
from megatron_jackpot.run.watchdog import DOING

TRAIN_LOG = "train.log"
OWN_FILES = (
    *(STOP_FILE, STOPPED_FILE, CONFIG_FILE, PROVENANCE_FILE, STARTED_FILE, TRAIN_LOG, DOING),
    *(LOCK_FILE, "server-*.log", "served-fp8", "cache"),
)
"""What a launch writes before training starts: a folder with nothing else may be used again."""


def used_for(folder: Path) -> list[str]:
    """Names in a folder that no launch writes before training starts."""
    found = sorted(folder.iterdir()) if folder.exists() else []
    return [path.name for path in found if not any(path.match(pattern) for pattern in OWN_FILES)]


def missing(folder: Path) -> list[Path]:
    """A folder and those above it that are not there, from the inside out."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def take_back(made: list[Path]) -> None:
    """Remove the folders that a start which was refused has made: the innermost, unless training wrote into
    it, and those above it that are empty."""
    if not made or used_for(made[0]):
        return
    shutil.rmtree(made[0], ignore_errors=True)
    with suppress(OSError):
        for folder in made[1:]:
            folder.rmdir()


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
