"""How sequences are laid into micro-batches: each once, within its room, in no more of them than need be."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

from megatron_jackpot.data.bins import fill_bins, fill_from_window
from megatron_jackpot.data.packing import Packer, split_groups
from tests.tiny import groups


def next_fit(lengths, capacity) -> int:
    """Micro-batches of the simplest rule: in order, a new one where the last has no room."""
    number, room = 0, 0
    for length in lengths:
        if length > room:
            number, room = number + 1, capacity
        room -= length
    return number


@pytest.mark.parametrize("window", [1, 3, 8, 400])
def test_a_window_fills_micro_batches_with_each_sequence_once(window):
    draw = random.Random(window)
    lengths = [draw.randint(64, 1600) for _ in range(400)]
    bins = fill_from_window(lengths, 8192, window)
    assert sorted(i for content in bins for i in content) == list(range(400))
    assert all(sum(lengths[i] for i in content) <= 8192 for content in bins)
    bound = math.ceil(sum(lengths) / 8192)
    assert bound <= len(bins) <= next_fit(lengths, 8192)
    if window == 1:
        assert len(bins) == next_fit(lengths, 8192)


def test_a_window_of_8_reaches_the_lower_bound_where_next_fit_needs_three_more():
    """The specification's numbers: 400 sequences, bins of 8,192 tokens, lengths that fit its bound."""
    draw = random.Random(10)
    lengths = [draw.randint(64, 1600) for _ in range(400)]
    assert math.ceil(sum(lengths) / 8192) == len(fill_from_window(lengths, 8192, 8)) == 42
    assert next_fit(lengths, 8192) == 45


def test_the_longest_that_fits_is_taken_from_the_window_which_is_refilled_after_each():
    assert fill_from_window([4, 3, 6, 2, 1], 7, 2) == [[0, 1], [2, 4], [3]]
    assert fill_from_window([5, 5, 2], 7, 3) == [[0, 2], [1]]


@pytest.mark.parametrize("fill", [fill_bins, lambda *given: fill_from_window(*given, 3)], ids=["all", "3"])
def test_without_packing_each_sequence_has_its_own_micro_batch(fill):
    assert sorted(fill([3, 1, 2, 5], 0)) == [[0], [1], [2], [3]]
    assert fill([], 8) == []


def test_micro_batches_are_as_few_as_their_room_allows_filled_evenly_and_no_longer_than_need_be():
    alone = dict(tp=1, pp=1, dp=1, dp_rank=0, is_leader=True, device=torch.device("cpu"))
    mesh = SimpleNamespace(**alone, tensors_from_leader=lambda columns: columns)
    rollouts = groups(range(16))
    total = sum(r.num_tokens for group in rollouts for r in group)
    packer = Packer(mesh, tokens=512, enabled=True, num_minibatches=1, vpp=None)
    batch = packer.pack(rollouts, 8)
    longest = max(r.num_tokens for group in rollouts for r in group)
    assert batch.num_microbatches == math.ceil(total / 512) == 2
    assert 0 <= batch.tokens_MT.numel() - total < 2 * (16 + longest) < 1024 - total
    assert (batch.segment_MT >= 0).sum() == total and max(batch.longest) == longest


@pytest.mark.parametrize("dp", [1, 2, 3, 8, 16])
@pytest.mark.parametrize(("prompts", "num_minibatches"), [(16, 4), (12, 2), (16, 16), (6, 3), (1, 1)])
def test_mini_batches_hold_the_same_prompts_on_every_layout(
    prompts: int, num_minibatches: int, dp: int
) -> None:
    step = groups(range(prompts))
    whole = split_groups(step, num_minibatches, 0, 1, prompts)
    assert [r for mini in whole for r in mini] == [r for group in step for r in group]
    assert len({len(mini) for mini in whole}) == 1
    leaders = [split_groups(step[rank::dp], num_minibatches, rank, dp, prompts) for rank in range(dp)]
    for mini, of_leaders in zip(whole, zip(*leaders, strict=True), strict=True):
        assert sorted(r.key for r in mini) == sorted(r.key for own in of_leaders for r in own)


def test_leaders_to_whom_an_allocator_gave_different_numbers_lose_no_group() -> None:
    first, second = groups(range(5)), groups(range(5, 6))
    minis = [split_groups(own, 3, rank, 2, 6) for rank, own in enumerate((first, second))]
    assert sum(len(mini) for own in minis for mini in own) == sum(map(len, first + second))
