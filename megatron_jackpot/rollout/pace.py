"""How long something was going on in another thread, and what came of it between two takes of a batch."""

import threading
import time
from collections.abc import Sequence

from megatron_jackpot.records import Rollout
from megatron_jackpot.rollout.collect import Sums


class Stopwatch:
    """Seconds within which at least one `with` block was open, of one thread or several; any may ask."""

    def __init__(self) -> None:
        self._open, self._since, self._seconds = 0, 0.0, 0.0
        # Between the end of a block and its sum, who asks would miss all of it.
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if not self._open:
                self._since = time.perf_counter()
            self._open += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                self._seconds += time.perf_counter() - self._since

    def seconds(self) -> float:
        """So far, with what is open."""
        with self._lock:
            return self._seconds + (time.perf_counter() - self._since if self._open else 0.0)


class Pace:
    """What servers and trainer did since the step before was taken, whichever steps it was for."""

    def __init__(self) -> None:
        self.asking = Stopwatch()
        """Open while servers are asked for a batch."""
        self._came = 0
        """Response tokens so far: the source's thread alone adds to it."""
        self._since = (time.perf_counter(), 0.0, 0)

    def came(self, group: Sequence[Rollout], before: Sequence[Rollout]) -> None:
        """A group came back, of which so much had come before."""
        self._came += sum(len(r.tokens) for r in group) - sum(len(r.tokens) for r in before)

    def taken(self, waited_from: float, dp: int) -> Sums:
        """A step is taken, for which the trainer waited from then on: shares of the time since the last one,
        and the rate of all `dp` leaders' servers while they were asked."""
        then, self._since = self._since, (time.perf_counter(), self.asking.seconds(), self._came)
        period, asked, came = (now - before for now, before in zip(self._since, then, strict=True))
        return {
            "idle/trainer": (self._since[0] - waited_from, period),
            "idle/servers": (max(period - asked, 0.0), period),
            "rollout/tokens_per_s": (came, asked / dp),
        }
