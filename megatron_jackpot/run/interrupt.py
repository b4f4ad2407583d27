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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

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
ORPHANED = "torchrun has ended"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ONE_REQUEST_S = 0.5
"""What arrives again this soon is the same request: `timeout` signals its child, and then its group."""
PARENT_ENDS_S = 1.0
"""How long a parent may take to end, once it does: a request to stop is heard that much later."""
_PR_SET_PDEATHSIG = 1

Stop = Callable[[], str | None]
"""Asked all the time while something waits: a reason for which the run is to save and end, or None."""


def never() -> None:
    """The `Stop` of what nobody interrupts."""


class StopRequest:
    """Why the run is to save and end, or None while it is not: `reason()` is cheap and may be asked often.

    Ranks may learn of it at different times; only a reduction over all of them makes it a decision.
    """

    def __init__(self, run: Run, started: float | None = None):
        """`started`, on the monotonic clock: when the time of the run began; None asks the environment."""
        self.file = Path(run.folder) / STOP_FILE
        self.signum, self._signalled = 0, -math.inf
        self.orphaned = False
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
        return self._written() or (ORPHANED if self.orphaned else None)

    def _written(self) -> str | None:
        try:
            return self.file.read_text(encoding="utf-8", errors="replace").strip() or "stop file"
        except PermissionError:
            return "stop file"  # Of another user, who keeps its reason to himself.
        except OSError:
            return None

    def done(self) -> None:
        """The state is saved: leave word for whoever queues the job again. Call it on one rank.

        None is left of torchrun's end, which nobody asked for: the launcher starts training again.
        """
        reason = self.reason() or "stop"
        if reason == ORPHANED:
            return
        self.file.with_name(STOPPED_FILE).write_text(reason + "\n", encoding="utf-8")
        self.file.unlink(missing_ok=True)

    def listen(self) -> None:
        """From now on SIGTERM and SIGUSR1 ask for a stop, and a second one ends this process at once.

        One that comes from the parent's end (`die_with_parent`) asks as well, but only this process.

        A thread hears them, because the main thread may be inside a collective that Python's handlers wait
        for.
        """
        hear, tell = socket.socketpair()
        tell.setblocking(False)
        for signum in SIGNALS:
            signal.signal(signum, lambda *_: None)
        signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
        arguments = (os.getppid(), hear, tell)
        threading.Thread(target=self._hear, args=arguments, daemon=True, name="signals").start()

    def _hear(self, parent: int, hear: socket.socket, _tell: socket.socket) -> None:
        while received := hear.recv(1):
            signum = received[0]
            if signum not in SIGNALS or time.monotonic() - self._signalled < ONE_REQUEST_S:
                continue
            if self.signum or self.orphaned:
                os._exit(128 + signum)
            if signum == signal.SIGTERM and _ends(parent):
                self.orphaned = True
            else:
                self.signum = signum
            self._signalled = time.monotonic()


def _ends(parent: int) -> bool:
    """Whether the signal that was just heard is the kernel's, of the end of this process's parent.

    It comes when the thread that started this process ends; while others of the parent's are still ending,
    on a busy machine for a while, the parent stays who it is.
    """
    deadline = time.monotonic() + PARENT_ENDS_S
    while os.getppid() == parent:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def ending_when_asked() -> Iterator[None]:
    """Within, SIGTERM and SIGUSR1 end this process with EXIT_REQUEUE: there is nothing to save yet."""

    def end(signum: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(EXIT_REQUEUE)

    before = {signum: signal.signal(signum, end) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def slurm_time_left() -> float | None:
    """Seconds until the Slurm job ends; None outside one, or where it has no end ("Unknown", 0)."""
    try:
        end = float(os.environ.get("SLURM_JOB_END_TIME", ""))
    except ValueError:
        return None
    return end - time.time() if end > 0 and math.isfinite(end) else None


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
