"""What a rank is doing, for everyone to read in RUN/doing/rank-N, and a time limit on it.

Past the limit the phase's name and every thread's stack are written and the rank ends. Waits within a phase
have limits of their own, whose messages say more: the watchdog comes after them (run/limits.py).
"""

import faulthandler
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from megatron_jackpot.run.limits import watched

EXIT_STUCK = 70
"""Exit code of a rank that was stuck (EX_SOFTWARE of sysexits.h)."""
POLL_S = 0.5
DOING = "doing"
_LINE_BYTES = 256
_IN_PHASES = re.compile(r"\S+ \S+ within (\d+) s: (.+)")


@dataclass(frozen=True)
class Doing:
    """What a rank has said last in RUN/doing/rank-N. It says another thing, or has ended, before `within_s`
    seconds are over: the watchdog sees to it."""

    phases: tuple[str, ...]
    """Under way, the newest last; () between two."""
    within_s: float
    age_s: float

    @property
    def goes_on(self) -> bool:
        """Whether the rank may still be in a phase that it spoke of."""
        return bool(self.phases) and self.age_s < self.within_s


def read_doing(folder: Path, rank: int) -> Doing | None:
    """None where the rank has said nothing."""
    path = Path(folder) / DOING / f"rank-{rank}"
    try:
        # The file's own time: that in its line is of another machine's zone.
        line, written = path.read_text(encoding="utf-8", errors="replace"), path.stat().st_mtime
    except FileNotFoundError:
        return None
    found = _IN_PHASES.fullmatch(line.strip())
    within_s, phases = (float(found[1]), tuple(found[2].split("; "))) if found else (0.0, ())
    return Doing(phases, within_s, max(0.0, time.time() - written))


@dataclass
class _Phase:
    what: str
    limit_s: float
    deadline: float
    thread: int


class Watchdog:
    """`with watchdog.phase("rollout"): ...` on any thread. Phases may nest: the time of an inner one is none
    of the outer one's, whose clock stands still."""

    def __init__(self, folder: Path, rank: int, limit_s: float) -> None:
        """`limit_s`: the longest that anything in a phase waits, run.phase_timeout_s."""
        self.file = Path(folder) / f"stacks-rank-{rank}.txt"
        self.rank, self.limit_s = rank, limit_s
        self.doing = Path(folder) / DOING / f"rank-{rank}"
        self._doing_fd: int | None = None
        self._lock = threading.Lock()
        self._phases: dict[object, _Phase] = {}
        self._thread: threading.Thread | None = None

    @contextmanager
    def phase(self, what: str, at_least_s: float = 0.0) -> Iterator[None]:
        """Within, `what` may wait for `limit_s` seconds, or where that is more for `at_least_s`; when the
        time for it to say so is over too, this process ends with EXIT_STUCK."""
        key, began, limit_s = object(), time.monotonic(), max(self.limit_s, at_least_s)
        with self._lock:
            own = threading.get_ident()
            # The next one alone: its own end adds this time, with its own, to those around it.
            outer = [phase for phase in self._phases.values() if phase.thread == own][-1:]
            self._phases[key] = _Phase(what, limit_s, began + watched(limit_s), own)
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
                self._thread.start()
            self._tell()
        try:
            yield
        finally:
            with self._lock:
                del self._phases[key]
                for phase in outer:
                    phase.deadline += time.monotonic() - began
                self._tell()

    def _tell(self) -> None:
        """Time, host:pid and the phases under way in the order of their begin, with the seconds within which
        another line or the rank's end comes, on one line of a fixed length. Called with the lock held.

        One write into a file that stays open: many ranks on a shared disk can afford it many times a step.
        """
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {platform.node()}:{os.getpid()}"
        if self._phases:
            within_s = min(phase.deadline for phase in self._innermost()) - time.monotonic()
            line += f" within {max(0.0, within_s):.0f} s: "
            line += "; ".join(phase.what for phase in self._phases.values())
        # A full disk must not end a run that only tells what it does.
        with suppress(OSError):
            if self._doing_fd is None:
                self.doing.parent.mkdir(parents=True, exist_ok=True)
                self._doing_fd = os.open(self.doing, os.O_WRONLY | os.O_CREAT, 0o644)
            os.pwrite(self._doing_fd, line.encode()[: _LINE_BYTES - 1].ljust(_LINE_BYTES - 1) + b"\n", 0)

    def dump(self, why: str) -> None:
        """Append `why` and every thread's stack to stderr, and to the rank's file in the run's folder."""
        _say_stacks(sys.stderr, f"rank {self.rank}: {why}")
        # A full disk must not keep the thread that watches from ending a rank that is stuck.
        with suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                _say_stacks(file, f"rank {self.rank}: {why}")

    def _watch(self) -> None:
        while True:
            time.sleep(POLL_S)
            with self._lock:
                innermost = self._innermost()
            now = time.monotonic()
            for phase in innermost:
                if now > phase.deadline:
                    self.dump(
                        f"'{phase.what}' has run for {watched(phase.limit_s):g} s. What waits in it has at "
                        f"most {phase.limit_s:g} s (run.phase_timeout_s) and has not said what for."
                    )
                    os._exit(EXIT_STUCK)

    def _innermost(self) -> list[_Phase]:
        """Of each thread. Called with the lock held."""
        return [*{phase.thread: phase for phase in self._phases.values()}.values()]


def _say_stacks(file: TextIO, why: str) -> None:
    with suppress(OSError):
        print(why, file=file, flush=True)
        faulthandler.dump_traceback(file.fileno(), all_threads=True)
