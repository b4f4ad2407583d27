"""Asking a run to save and end: a signal to any rank, a file in the run's folder, or a time limit that comes
near."""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from megatron_jackpot.config.run import Run

STOP_FILE = "stop"
"""Whoever wants the run to save and end creates it; its text is the reason."""
STOPPED_FILE = "stopped"
"""What becomes of it when the run has saved: the job is to be queued again."""
EXIT_REQUEUE = 75
"""Exit code of a launcher whose run was saved before its end (EX_TEMPFAIL of sysexits.h)."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Why the run is to save and end, or None while it is not: `reason()` is cheap and may be asked often.

    Ranks may learn of it at different times; only a reduction over all of them makes it a decision.
    """

    def __init__(self, run: Run):
        self.file = Path(run.folder) / STOP_FILE
        self.signum = 0
        limits = [] if run.time_limit_s is None else [run.time_limit_s]
        if slurm_end := os.environ.get("SLURM_JOB_END_TIME"):
            limits.append(float(slurm_end) - time.time())
        # On the monotonic clock, so that a clock that is set anew stops no run.
        self.deadline = time.monotonic() + min(limits) - run.stop_margin_s if limits else None

    def reason(self) -> str | None:
        if self.signum and not self.file.exists():
            write_stop(self.file.parent, signal.Signals(self.signum).name)
        if self.deadline is not None and time.monotonic() > self.deadline:
            return "the time limit is near"
        try:
            return self.file.read_text().strip() or "stop file"
        except OSError:
            return None

    def done(self) -> None:
        """The state is saved: leave word for whoever queues the job again. Call it on one rank."""
        reason = self.reason() or "stop"
        self.file.with_name(STOPPED_FILE).write_text(reason + "\n")
        self.file.unlink(missing_ok=True)

    def listen(self) -> None:
        """From now on SIGTERM and SIGUSR1 ask for a stop, and a second one ends this process at once.

        A thread hears them, because the main thread may be inside a collective that Python's handlers wait
        for.
        """
        hear, tell = socket.socketpair()
        tell.setblocking(False)
        for signum in SIGNALS:
            signal.signal(signum, lambda *_: None)
        signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(hear, tell), daemon=True, name="signals").start()

    def _hear(self, hear: socket.socket, _tell: socket.socket) -> None:
        while received := hear.recv(1):
            signum = received[0]
            if signum not in SIGNALS:
                continue
            if self.signum:
                os._exit(128 + signum)
            self.signum = signum


def write_stop(folder: Path, reason: str) -> None:
    """Ask the run in `folder` to save and end."""
    (Path(folder) / STOP_FILE).write_text(reason + "\n")


def forget_stop(folder: Path) -> None:
    """Before a run starts: what was asked of the one before does not count."""
    for name in (STOP_FILE, STOPPED_FILE):
        (Path(folder) / name).unlink(missing_ok=True)


def was_stopped(folder: Path) -> str | None:
    """The reason, if the run in `folder` saved and ended because it was asked to."""
    with suppress(OSError):
        return (Path(folder) / STOPPED_FILE).read_text().strip()
    return None


def die_with_parent(signum: int) -> None:
    """Have the kernel send `signum` to this process when its parent ends. Linux; elsewhere a no-op."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)
