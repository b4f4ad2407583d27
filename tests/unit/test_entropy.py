"""The filter that keeps the top share of tokens by entropy, against a sort of all of them."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from megatron_jackpot.algorithm.entropy import EntropyFilter
from tests.unit.flat import on_ranks, run
from tests.unit.test_corrections import part
from tests.unit.test_corrections_oracle import scores
from tests.unit.test_filters import combined


def with_entropy(seed=5):
    """Entropies from almost none to 9 nats; the largest of all lie outside the mask."""
    s = scores()
    entropy_T = 10 ** (torch.rand(len(s.mask_T), generator=torch.Generator().manual_seed(seed)) * 6 - 5.05)
    return replace(s, entropy_T=torch.where(s.mask_T, entropy_T, 100.0))


@pytest.mark.parametrize("share", [0.05, 0.2, 0.77, 1.0])
@pytest.mark.parametrize("denominator", ["all", "kept"])
def test_the_tokens_kept_are_the_first_of_a_sort_and_the_rest_counts_as_the_correction_says(
    share, denominator
):
    s = with_entropy()
    got = run(combined("tis", {"denominator": denominator}, [("entropy", {"share": share})]), s)
    num = int(s.mask_T.sum())
    order = torch.where(s.mask_T, s.entropy_T, -1.0).argsort(descending=True)
    wanted = torch.zeros_like(s.mask_T)
    wanted[order[: max(1, int(share * num + 1e-9))]] = True
    assert 0 < wanted.sum() <= num and torch.equal(got.keep_T, wanted & s.mask_T)
    assert got.count.item() == (num if denominator == "all" else wanted.sum().item())
    assert [float(x) for x in got.metrics["filter/entropy"]] == [wanted.sum(), num]


def test_tokens_of_one_entropy_stay_together_and_certain_ones_never():
    s = with_entropy()
    flat = replace(s, entropy_T=torch.full_like(s.entropy_T, 0.7))
    assert torch.equal(run(combined("none", {}, [("entropy", {"share": 0.1})]), flat).keep_T, s.mask_T)
    certain = replace(s, entropy_T=torch.zeros_like(s.entropy_T))
    assert not run(combined("none", {}, [("entropy", {})]), certain).keep_T.any()


def test_the_share_is_that_of_the_whole_mini_batch_on_any_split():
    s = with_entropy()
    call = combined("jackpot", {"preset": "recommended"}, [("entropy", {"share": 0.3}), ("mis", {})])
    whole = run(call, s)
    index = [(s.microbatch_T == rank).nonzero()[:, 0] for rank in range(3)]
    for i, mine in zip(index, on_ranks([part(s, i) for i in index], partial(run, call)), strict=True):
        assert torch.equal(mine.keep_T, whole.keep_T[i])


def test_what_cannot_work_is_named():
    with pytest.raises(ValueError, match=r"share = 0.0: must lie in \(0, 1\]. Use 0.2"):
        EntropyFilter(share=0.0)
    with pytest.raises(ValueError, match="scores.entropy_MT = None"):
        run(combined("none", {}, [("entropy", {})]), scores())
