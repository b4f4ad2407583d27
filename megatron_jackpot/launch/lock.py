"""One launch in a run's folder at a time: RUN/lock names the host and process that has it.

    {"host": "n1", "boot": "8c1f...", "pid": 4711, "began": 1764210000.5, "time": "2026-11-21T16:10:16+0000",
     "cluster": "mini", "job": "17", "array": null, "attempt": "0"}

The kernel's lock on the file tells on one machine, whatever its processes' numbers mean to one another
(containers); where a file system has none, the process id and its time of start do. Of another machine
neither can be asked, so its lock is only passed over where its launch is known to have ended: one before this
machine was started again, or, in a Slurm job, an earlier attempt of it or a job that Slurm says is over.
Processes may outlive their job, as where a node's slurmd is dead: while the kernel's lock is held, Slurm is
given time to end them.
"""

import fcntl
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from megatron_jackpot.config import ConfigError
from megatron_jackpot.launch.said import say
from megatron_jackpot.run.interrupt import EXIT_REQUEUE

LOCK_FILE = "lock"
SQUEUE_LIMIT_S = 30.0
HELD_LIMIT_S = 120.0
"""Slurm's own limits for what does not end: KillWait 30 s, UnkillableStepTimeout 60 s by default."""
POLL_S = 0.5
Holder = dict[str, Any]
"""What a lock says of who has it; {} where nobody does."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class StillHeld(SystemExit):
    """What is left of a launch that has ended for Slurm has the folder: this one is to be queued again."""


@contextmanager
def only_launch(folder: Path) -> Iterator[None]:
    """Hold the folder within. Raises ConfigError when another launch has it, naming that, and StillHeld."""
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        _refuse_if_held(folder, file)
        _write(file, json.dumps(_own()) + "\n")
        try:
            yield
        finally:
            _write(file, "")


def refuse_if_held(folder: Path) -> None:
    """Raises ConfigError when a launch has the folder, and StillHeld; writes nothing."""
    with suppress(OSError):  # No such file, or a folder that cannot be one.
        with (folder / LOCK_FILE).open("r+", encoding="utf-8") as file:
            _refuse_if_held(folder, file)


def _refuse_if_held(folder: Path, file: IO[str]) -> None:
    """Leaves the kernel's lock on `file` where there is one."""
    while True:
        free = _take(file)
        file.seek(0)
        holder: Holder = {}
        with suppress(ValueError, TypeError):
            holder = dict(json.loads(file.read() or "{}"))
        if free is not False and (not holder or _has_ended(holder, free)):
            return
        if not _is_over_for_slurm(holder):
            raise ConfigError(_refusal(folder, holder))
        if free is not False:
            return
        _wait_for_remains(folder, file, holder)


def _take(file: IO[str]) -> bool | None:
    """Whether the kernel's lock is now ours; None where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _wait_for_remains(folder: Path, file: IO[str], holder: Holder) -> None:
    """Until the kernel's lock on `file` is ours. Raises StillHeld after HELD_LIMIT_S."""
    whose = (
        f"{folder / LOCK_FILE} is held by what is left of attempt {holder.get('attempt', '?')} of job "
        f"{holder['job']} (pid {holder.get('pid', '?')} on host {holder.get('host', '?')}), which has ended"
    )
    say(f"{whose}: waiting up to {HELD_LIMIT_S:g} s for its end")
    deadline = time.monotonic() + HELD_LIMIT_S
    while _take(file) is False:
        if time.monotonic() > deadline:
            say(f"{whose}: waited {HELD_LIMIT_S:g} s, to be queued again. End it there, if it stays.")
            raise StillHeld(EXIT_REQUEUE)
        time.sleep(POLL_S)


def _has_ended(holder: Holder, free: bool | None) -> bool:
    """Whether this machine knows that the launch is gone that wrote the lock. `free`: what the kernel's lock
    says."""
    own = _own()
    if holder.get("boot") == own["boot"]:
        return free or not _runs(holder)
    return holder.get("host") == own["host"]


def _is_over_for_slurm(holder: Holder) -> bool:
    """Whether the launch that wrote the lock was of a Slurm job, or an attempt of this one, that has ended.

    A job that waits to be started again is not over: its processes may still be there.
    """
    own, job = _own(), holder.get("job")
    if not own["job"] or not job or holder.get("cluster", own["cluster"]) != own["cluster"]:
        return False
    if job == own["job"]:
        return holder.get("attempt") != own["attempt"]  # Slurm starts a job again only after it has ended.
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--jobs", str(job)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=SQUEUE_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired):  # None in a container; a controller that is away.
        return _is_awaited({job, holder.get("array")})
    if done.returncode:
        return "Invalid job id" in done.stderr or _is_awaited({job, holder.get("array")})
    return not done.stdout.strip()


def _is_awaited(jobs: set[Any]) -> bool:
    """Whether this job was to start only after the end of one of `jobs`: without squeue all that is known."""
    for part in os.environ.get("SLURM_JOB_DEPENDENCY", "").split(","):
        kind, *awaited = part.split(":")
        if kind in ("afterany", "afterok", "afternotok") and jobs & set(awaited):
            return True
    return False


def _runs(holder: Holder) -> bool:
    try:
        return abs(psutil.Process(int(holder["pid"])).create_time() - float(holder["began"])) < 2
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return False


def _own() -> Holder:
    boot = ""
    with suppress(OSError):
        boot = BOOT_ID.read_text(encoding="utf-8").strip()
    return {
        "host": platform.node(),
        "boot": boot or platform.node(),
        "pid": os.getpid(),
        "began": psutil.Process().create_time(),
        "cluster": os.environ.get("SLURM_CLUSTER_NAME"),
        "job": os.environ.get("SLURM_JOB_ID"),
        "array": os.environ.get("SLURM_ARRAY_JOB_ID"),
        "attempt": os.environ.get("SLURM_RESTART_COUNT") or "0",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _refusal(folder: Path, holder: Holder) -> str:
    host = holder.get("host", "a host that has not said its name yet")
    job = f", Slurm job {holder['job']}," if holder.get("job") else ""
    text = (
        f"run.folder = {folder} is in use by pid {holder.get('pid', '?')} on host {host}{job} since "
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
