"""What a rank is doing, for everyone to read in RUN/doing/rank-N, and a time limit on it.

Past the limit the phase's name and every thread's stack are written and the rank ends.
"""

import faulthandler
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

EXIT_STUCK = 70
"""Exit code of a rank that was stuck (EX_SOFTWARE of sysexits.h)."""
POLL_S = 0.5
DOING = "doing"
_LINE_BYTES = 256


class Watchdog:
    """`with watchdog.phase("rollout"): ...` on any thread; phases may nest, each has its own limit."""

    def __init__(self, folder: Path, rank: int, limit_s: float) -> None:
        self.file = Path(folder) / f"stacks-rank-{rank}.txt"
        self.rank, self.limit_s = rank, limit_s
        self.doing = Path(folder) / DOING / f"rank-{rank}"
        self._doing_fd: int | None = None
        self._lock = threading.Lock()
        self._phases: dict[object, tuple[str, float]] = {}
        self._thread: threading.Thread | None = None

    @contextmanager
    def phase(self, what: str) -> Iterator[None]:
        """Within, `what` may take `limit_s` seconds; longer ends this process with EXIT_STUCK."""
        key = object()
        with self._lock:
            self._phases[key] = what, time.monotonic() + self.limit_s
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
                self._thread.start()
            self._tell()
        try:
            yield
        finally:
            with self._lock:
                del self._phases[key]
                self._tell()

    def _tell(self) -> None:
        """Time, host:pid and the phases under way in the order of their begin, on one line of a fixed length.

        One write into a file that stays open: many ranks on a shared disk can afford it many times a step.
        """
        who = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {platform.node()}:{os.getpid()}"
        line = f"{who} {'; '.join(what for what, _ in self._phases.values())}"
        # A full disk must not end a run that only tells what it does.
        with suppress(OSError):
            if self._doing_fd is None:
                self.doing.parent.mkdir(parents=True, exist_ok=True)
                self._doing_fd = os.open(self.doing, os.O_WRONLY | os.O_CREAT, 0o644)
            os.pwrite(self._doing_fd, line.encode()[: _LINE_BYTES - 1].ljust(_LINE_BYTES - 1) + b"\n", 0)

    def dump(self, why: str) -> None:
        """Append `why` and every thread's stack to the rank's file in the run's folder, and to stderr."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            for target in (file, sys.stderr):
                print(f"rank {self.rank}: {why}", file=target, flush=True)
                faulthandler.dump_traceback(target.fileno(), all_threads=True)

    def _watch(self) -> None:
        while True:
            time.sleep(POLL_S)
            now = time.monotonic()
            for what, deadline in self._under_way():
                if now > deadline:
                    self.dump(f"'{what}' has run for {self.limit_s:g} s, the limit of run.phase_timeout_s.")
                    os._exit(EXIT_STUCK)

    def _under_way(self) -> list[tuple[str, float]]:
        with self._lock:
            return list(self._phases.values())
