"""A time limit on every phase of a rank: past it, its name and every thread's stack are written and the rank ends."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_STUCK = 70
"""Exit code of a rank that was stuck (EX_SOFTWARE of sysexits.h)."""
POLL_S = 0.5


class Watchdog:
    """`with watchdog.phase("rollout"): ...` on any thread; phases may nest, each has its own limit."""

    def __init__(self, folder: Path, rank: int, limit_s: float) -> None:
        self.file = Path(folder) / f"stacks-rank-{rank}.txt"
        self.rank, self.limit_s = rank, limit_s
        self._phases: dict[object, tuple[str, float]] = {}
        self._thread: threading.Thread | None = None

    @contextmanager
    def phase(self, what: str) -> Iterator[None]:
        """Within, `what` may take `limit_s` seconds; longer ends this process with EXIT_STUCK."""
        key = object()
        self._phases[key] = what, time.monotonic() + self.limit_s
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self._thread.start()
        try:
            yield
        finally:
            del self._phases[key]

    def dump(self, why: str) -> None:
        """Append `why` and every thread's stack to the rank's file in the run's folder, and to stderr."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            for target in (file, sys.stderr):
                print(f"rank {self.rank}: {why}", file=target, flush=True)
                faulthandler.dump_traceback(target.fileno(), all_threads=True)

    def _watch(self) -> None:
        while True:
            time.sleep(POLL_S)
            now = time.monotonic()
            for what, deadline in list(self._phases.values()):
                if now > deadline:
                    self.dump(f"'{what}' has run for {self.limit_s:g} s, the limit of run.phase_timeout_s.")
                    os._exit(EXIT_STUCK)
