"""Memory: the peak of this rank for the metrics; anonymous memory of this process and its children for tests
and benchmarks."""

import os
import resource
import threading
from pathlib import Path
from types import TracebackType

import torch

EVERY_S = 0.005


def trainer_mib() -> int:
    """The most this rank has held so far: of its GPU by torch's allocator, without one of the machine's
    memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def anonymous_bytes() -> int:
    """RssAnon of this process and its children: what is neither a file's pages nor shared."""
    total, todo = 0, [os.getpid()]
    while todo:
        pid = todo.pop()
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
            children = [
                task.read_text(encoding="utf-8") for task in Path(f"/proc/{pid}/task").glob("*/children")
            ]
        except OSError:  # it has just ended
            continue
        todo += map(int, " ".join(children).split())
        total += _kib(status, "RssAnon") * 1024
    return total


class PeakAnonymous:
    """Samples `anonymous_bytes` while the block runs: `before` its start and the `peak` since then."""

    def __enter__(self) -> "PeakAnonymous":
        self.before = self.peak = anonymous_bytes()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        # What came after the thread's last look.
        self.peak = max(self.peak, anonymous_bytes())

    @property
    def added(self) -> int:
        return self.peak - self.before

    def _sample(self) -> None:
        while not self._end.wait(EVERY_S):
            self.peak = max(self.peak, anonymous_bytes())


def _kib(status: str, field: str) -> int:
    for line in status.splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    return 0
