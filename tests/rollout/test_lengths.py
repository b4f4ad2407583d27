"""No response is preferred because it is short, however far ahead of training it is sampled."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from megatron_jackpot.config import Rollouts
from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.rollout.pipeline import Pipeline
from tests.rollout.leaders import PER_STEP, PROMPTS, leaders
from tests.rollout.sources import HeavyTail

STEPS = 8


@contextmanager
def _sampled() -> Iterator[HeavyTail]:
    source = HeavyTail(0.004)
    try:
        yield source
    finally:
        source.close()


def _lengths(source: HeavyTail, ahead: int) -> list[list[int]]:
    """Of the responses that each step trains on, in order; pushes fall among those under way."""
    config = Rollouts(max_staleness=99)
    pipeline = Pipeline(leaders(1)[0], config, source, lambda: None, {}, limit_s=20)
    loader, found = PromptLoader(PROMPTS, PER_STEP, 0, 1, 5), []
    for step in range(1, STEPS + 1):
        for later in range(step, min(step + ahead, STEPS) + 1):
            pipeline.start(later, loader)
        taken = pipeline.take(step, loader, lambda: None)
        found.append([len(r.tokens) for group in taken.groups for r in group])
        pipeline.pushed(step, "attempt")
    return found


@pytest.mark.parametrize("ahead", [1, 3])
def test_under_a_heavy_tail_every_step_trains_on_the_lengths_it_has_in_turns(ahead: int) -> None:
    with _sampled() as turns, _sampled() as early:
        in_turns, found = _lengths(turns, 0), _lengths(early, ahead)
    assert found == in_turns
    assert (
        early.asked != turns.asked
    )  # The short ones of later steps came before the long ones of earlier ones.
    lengths = sorted(length for step in found for length in step)
    assert lengths[-1] >= 3 * lengths[len(lengths) // 2]
