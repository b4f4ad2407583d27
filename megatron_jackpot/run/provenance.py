"""What a run was made from (resolved config, command, versions, git commit, machine), kept in its folder."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from megatron_jackpot import __version__
from megatron_jackpot.config import Config
from megatron_jackpot.run import formats

LATEST = "latest"
"""Link to the newest of them."""
BEST = "best"
"""Link to the best of them, where run.keep_best says by what."""
MODELS = ("policy", "actor")
"""Folders in a checkpoint, one for each model of its run."""
STEP = re.compile(r"step-(\d{6,})")
"""Name of a checkpoint or an export."""
TAIL_BYTES = 1 << 20
"""Longer than any row of metrics."""
CHECKPOINTS = "checkpoints"
"""Folder of the published checkpoints in a run's folder."""
LIBRARIES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "sglang",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
    "aiohttp",
    "reasoning-gym",
    "math-verify",
)
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
PROVENANCE_FILE = "provenance.json"


def record(config: Config, folder: Path) -> Path:
    """Write config.yaml (readable by `train` again) and provenance.json; returns the path of the first."""
    path = folder / CONFIG_FILE
    # In this order: a config.yaml without the other is the user's own (launch/folder.py).
    _replace(folder / PROVENANCE_FILE, json.dumps(provenance(config.parallel.threads), indent=2) + "\n")
    _replace(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    return path


def _replace(path: Path, text: str) -> None:
    # Whole or not at all: on a cluster every node records the same run, while ranks of others already read
    # it.
    partial = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def provenance(threads: int) -> dict[str, Any]:
    """Example: {"format": 1, "commit": "8ab4468...", "dirty": False, "versions": {"torch": ...}, ...}."""
    commit, dirty = git_commit(Path(__file__).resolve().parent)
    return {
        formats.FIELD: formats.current("run folder"),
        "megatron_jackpot": __version__,
        "commit": commit,
        "dirty": dirty,
        "command": sys.argv,
        "folder": os.getcwd(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "machine": machine(threads),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def machine(threads: int) -> dict[str, str | int]:
    """What rounds: the same seed gives other bits on another processor, or in sums cut for other threads.

    Example: {"processor": "AMD EPYC", "cores": 2, "threads": 1}; cores are those this process may use,
    threads those of a rank; "gpu" is there where the machine has one.
    """
    found: dict[str, str | int] = {"processor": _processor(), "cores": len(os.sched_getaffinity(0))}
    gpu = _gpu()
    return {**found, "threads": threads, **({"gpu": gpu} if gpu else {})}


def _gpu() -> str | None:
    """The first GPU's name as NVIDIA's driver tells it, without a tool of its own."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with suppress(OSError):
            if found := re.search(r"^Model:\s*(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
                return found[1].strip()
    return None


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Installed version of each library that shapes a result; None where it is absent."""
    return {name: _version(name) for name in LIBRARIES}


def git_commit(folder: Path) -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it); (None, None) outside a git checkout or without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    # An installed package may lie inside somebody else's checkout, which does not hold its files.
    if commit is None or _git(folder, "ls-files", "--error-unmatch", ".") is None:
        return None, None
    return commit, bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *args: str) -> str | None:
    # --no-optional-locks: `status` would otherwise write the index of a checkout someone else may be using.
    command = ["git", "--no-optional-locks", "-C", str(folder), *args]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def check_run_folder(folder: Path) -> None:
    """Raises ValueError when the folder's run is of a format that this version does not read."""
    formats.check_file("run folder", Path(folder) / PROVENANCE_FILE)


def checkpoints(run_folder: Path) -> list[Path]:
    """Published checkpoints, oldest first: folders that are named as a save names them. Whatever else a user
    puts beside them, a copy or an archive under another name, is none."""
    beside = (Path(run_folder) / CHECKPOINTS).glob("step-*")
    return sorted((path for path in beside if STEP.fullmatch(path.name) and path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """After which step it was saved, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def last_recorded(run_folder: Path) -> int:
    """The last step of which a run's metrics hold a whole row; 0 for none."""
    try:
        with (Path(run_folder) / METRICS_FILE).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            *lines, _unfinished = file.read().split(b"\n")
    except OSError:
        return 0
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return 0


def find_model(folder: Path, model: str | None) -> Path:
    """The model folder in `folder`: itself, or policy/actor of a run or of one of its checkpoints.

    A run of one model needs no `model`. Raises ValueError when there is none, or `model` is needed and not
    given.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    step = next(reversed(checkpoints(folder)), folder)
    found = [name for name in MODELS if (step / name / "config.json").is_file()]
    if not found and (folder / PROVENANCE_FILE).is_file():
        raise ValueError(
            f"{folder} is a run that has saved no model yet. With run.save_every it does; the model that it "
            f"began with is evaluated as its own folder, with --run {folder}."
        )
    if not found:
        raise ValueError(
            f"{folder} is neither a model (no config.json) nor a run nor one of its checkpoints."
        )
    if model is None and len(found) == 1:
        return step / found[0]
    if model not in found:
        raise ValueError(f"{step} holds {' and '.join(found)}. Choose one with --model {'|'.join(found)}.")
    return step / model


def check_models(checkpoint: Path, names: Iterable[str]) -> None:
    """Raises ValueError unless a checkpoint holds the models `names` and no other."""
    held, wanted = {name for name in MODELS if (checkpoint / name).is_dir()}, set(names)
    if held != wanted:
        raise ValueError(
            f"run.resume: {checkpoint} holds {' and '.join(sorted(held))}, this run has "
            f"{' and '.join(sorted(wanted))}. Set rollout.model and actor as config.yaml there has them, or "
            "another run.folder."
        )
