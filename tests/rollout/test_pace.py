"""How fast rollouts came and who waited, where batches overlap and another thread asks."""

import threading
import time

import pytest

from megatron_jackpot.algorithm.allocators import Rescue
from megatron_jackpot.algorithm.allocators_base import Allocator, Fixed
from megatron_jackpot.rollout import pace
from megatron_jackpot.rollout.pace import Stopwatch
from tests.rollout.leaders import Run, first_right


@pytest.mark.parametrize("allocator", [Fixed(), Rescue(extra=2, most=10)], ids=["fixed", "rounds"])
def test_tokens_per_second_counts_every_token_once_and_no_second_twice(allocator: Allocator) -> None:
    """Three batches in flight, each asked for during 0.1 s at least: their own seconds are more than there
    were."""
    run = Run(allocator, first_right, ahead=2)
    run.source.delay_s = 0.1
    started = time.perf_counter()
    try:
        taken = []
        for steps_left in range(7, -1, -1):
            run.ahead = min(2, steps_left)
            taken.append(run.step())
        elapsed = time.perf_counter() - started
    finally:
        run.source.close()
    tokens, seconds = map(sum, zip(*(one.sums["rollout/tokens_per_s"] for one in taken), strict=True))
    assert tokens == sum(len(r.tokens) for one in taken for group in one.sampled for r in group)
    assert 0.1 <= seconds <= elapsed


def test_who_asks_while_a_block_ends_misses_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, clock, read = Stopwatch(), [0.0], list[float]()
    asker = threading.Thread(target=lambda: read.append(watch.seconds()))

    def now() -> float:
        if clock[0] and threading.current_thread() is not asker:
            asker.start()
            asker.join(0.2)  # As far as it comes while the block's end reads the clock.
        return clock[0]

    monkeypatch.setattr(pace.time, "perf_counter", now)
    with watch:
        clock[0] = 5.0
    asker.join()
    assert read == [5.0]
