"""Asking a run to save and end: a signal to any rank, a file in the run's folder, or a time limit that comes
near."""

import ctypes
import math
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
STARTED_VARIABLE = "JACKPOT_STARTED"
"""When the launch began, on this machine's monotonic clock: servers, and ranks that are started again, have
used a part of run.time_limit_s."""
TIME_LIMIT = "the time limit is near"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ONE_REQUEST_S = 0.5
"""What arrives again this soon is the same request: `timeout` signals its child, and then its group."""
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Why the run is to save and end, or None while it is not: `reason()` is cheap and may be asked often.

    Ranks may learn of it at different times; only a reduction over all of them makes it a decision.
    """

    def __init__(self, run: Run, started: float | None = None):
        """`started`, on the monotonic clock: when the time of the run began; None asks the environment."""
        self.file = Path(run.folder) / STOP_FILE
        self.signum, self._signalled = 0, -math.inf
        now = time.monotonic()
        self.started = float(os.environ.get(STARTED_VARIABLE, now)) if started is None else started
        # On the monotonic clock, so that a clock that is set anew stops no run.
        ends = [] if run.time_limit_s is None else [self.started + run.time_limit_s]
        if (left_s := slurm_time_left()) is not None:
            ends.append(now + left_s)
        self.deadline = min(ends) - run.stop_margin_s if ends else None

    def reason(self) -> str | None:
        if self.signum and not self.file.exists():
            write_stop(self.file.parent, signal.Signals(self.signum).name)
        if self.deadline is not None and time.monotonic() > self.deadline:
            return TIME_LIMIT
        try:
            return self.file.read_text(encoding="utf-8", errors="replace").strip() or "stop file"
        except OSError:
            return None

    def done(self) -> None:
        """The state is saved: leave word for whoever queues the job again. Call it on one rank."""
        reason = self.reason() or "stop"
        self.file.with_name(STOPPED_FILE).write_text(reason + "\n", encoding="utf-8")
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
            if signum not in SIGNALS or time.monotonic() - self._signalled < ONE_REQUEST_S:
                continue
            if self.signum:
                os._exit(128 + signum)
            self.signum, self._signalled = signum, time.monotonic()


def slurm_time_left() -> float | None:
    """Seconds until the Slurm job ends; None outside one, or where it has no end ("Unknown")."""
    try:
        left_s = float(os.environ.get("SLURM_JOB_END_TIME", "")) - time.time()
    except ValueError:
        return None
    return left_s if math.isfinite(left_s) else None


def write_stop(folder: Path, reason: str) -> None:
    """Ask the run in `folder` to save and end."""
    (Path(folder) / STOP_FILE).write_text(reason + "\n", encoding="utf-8")


def forget_stop(folder: Path) -> None:
    """Before a run starts: what was asked of the one before does not count."""
    for name in (STOP_FILE, STOPPED_FILE):
        (Path(folder) / name).unlink(missing_ok=True)


def was_stopped(folder: Path) -> str | None:
    """The reason, if the run in `folder` saved and ended because it was asked to."""
    with suppress(OSError):
        return (Path(folder) / STOPPED_FILE).read_text(encoding="utf-8", errors="replace").strip()
    return None


def die_with_parent(signum: int) -> None:
    """Have the kernel send `signum` to this process when its parent ends. Linux; elsewhere a no-op."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)
