"""One launch in a run's folder at a time: RUN/lock names the host and process that has it.

    {"host": "n1", "boot": "8c1f...", "pid": 4711, "began": 1764210000.5, "job": "17",
     "attempt": "0"}

The kernel's lock on the file tells on one machine, whatever its processes' numbers mean to one another
(containers); where a file system has none, the process id and its time of start do. Of another machine
neither can be asked, so its lock is only passed over where its launch is known to have ended: an earlier
attempt of the same Slurm job, or one before this machine was started again.
"""

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from megatron_jackpot.config import ConfigError

LOCK_FILE = "lock"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def only_launch(folder: Path) -> Iterator[None]:
    """Hold the folder within. Raises ConfigError when another launch has it, naming that."""
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        _refuse_if_held(folder, file)
        _write(file, json.dumps(_own()) + "\n")
        try:
            yield
        finally:
            _write(file, "")


def refuse_if_held(folder: Path) -> None:
    """Raises ConfigError when a launch has the folder; writes nothing."""
    with suppress(OSError):  # No such file, or a folder that cannot be one.
        with (folder / LOCK_FILE).open("r+", encoding="utf-8") as file:
            _refuse_if_held(folder, file)


def _refuse_if_held(folder: Path, file: IO[str]) -> None:
    """Leaves the kernel's lock on `file` where there is one."""
    free: bool | None = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        free = False
    except OSError:
        free = None
    file.seek(0)
    holder: dict[str, Any] = {}
    with suppress(ValueError, TypeError):
        holder = dict(json.loads(file.read() or "{}"))
    if free is False or (holder and not _has_ended(holder, free)):
        raise ConfigError(_refusal(folder, holder))


def _has_ended(holder: dict[str, Any], free: bool | None) -> bool:
    """Whether the launch that wrote the lock is known to be gone. `free`: what the kernel's lock says."""
    own = _own()
    if own["job"] and holder.get("job") == own["job"] and holder.get("attempt") != own["attempt"]:
        return True  # Slurm starts a job again only after it has ended.
    if holder.get("boot") == own["boot"]:
        return free or not _runs(holder)
    return holder.get("host") == own["host"]


def _runs(holder: dict[str, Any]) -> bool:
    try:
        return abs(psutil.Process(int(holder["pid"])).create_time() - float(holder["began"])) < 2
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return False


def _own() -> dict[str, Any]:
    boot = ""
    with suppress(OSError):
        boot = BOOT_ID.read_text(encoding="utf-8").strip()
    return {
        "host": platform.node(),
        "boot": boot or platform.node(),
        "pid": os.getpid(),
        "began": psutil.Process().create_time(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "attempt": os.environ.get("SLURM_RESTART_COUNT") or "0",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _refusal(folder: Path, holder: dict[str, Any]) -> str:
    host = holder.get("host", "a host that has not said its name yet")
    text = (
        f"run.folder = {folder} is in use by pid {holder.get('pid', '?')} on host {host} since "
        f"{holder.get('time', 'now')}. Wait for it, stop it (write {folder / 'stop'}), or set another "
        "run.folder."
    )
    if host != platform.node():
        text += f" If it no longer runs there, delete {folder / LOCK_FILE}."
    return text


def _write(file: IO[str], text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()
