"""One correction with any filters, against the NumPy oracle of each alone, and the same on any split."""

from functools import partial

import numpy as np
import pytest
import torch

from megatron_jackpot.algorithm.corrections import CORRECTIONS, make_correction
from megatron_jackpot.algorithm.filters import FILTERS, filtered, make_filters
from tests.unit.flat import on_ranks, run
from tests.unit.test_corrections import part
from tests.unit.test_corrections_oracle import oracle, scores

CHOSEN = [
    ("mis", {"cap": 1.6}),
    ("icepop", {"low": 0.4, "high": 2.5}),
    ("seq_mis", {"cap": 4.0, "low": 3e-5}),
    ("geo_rs", {"low": 0.77, "high": 1.5, "veto": None}),
    ("k_filter", {"kind": "k3", "high": 0.3}),
    ("k_filter", {"kind": "k2", "level": "seq_max", "high": 1.2}),
]
CORRECTED = [
    ("none", {}),
    ("tis", {"cap": 1.3, "batch_normalize": True}),
    ("geo_tis", {"cap": 1.05, "denominator": "kept"}),
    ("seq_tis", {"cap": 4.0}),
    ("jackpot", {"mask": "expected", "z_correction": "tail"}),
    ("jackpot", {"preset": "recommended"}),
]


def combined(name, knobs, chosen):
    method = make_correction(name, knobs, 0)
    filters = make_filters(chosen, "filters")

    def call(scores, sum_over_batch):
        found = method(scores, sum_over_batch)
        return filtered(found, filters, scores, sum_over_batch, counts_all=method.denominator == "all")

    return call


@pytest.mark.parametrize("number", [1, 2, len(CHOSEN)])
@pytest.mark.parametrize(("name", "knobs"), CORRECTED)
def test_keeps_are_and_ed_and_every_statistic_is_that_of_all_tokens(name, knobs, number):
    s, chosen = scores(), CHOSEN[-number:]
    got, alone = run(combined(name, knobs, chosen), s), run(make_correction(name, knobs, 0), s)
    mask = s.mask_T.numpy()
    stays = [oracle(one, {"low": 0.0, **settings}, s)[0] for one, settings in chosen]
    together = np.logical_and.reduce([mask, *stays])
    assert all(0 < one.sum() < mask.sum() for one in stays) and together.any()
    assert np.array_equal(got.keep_T.numpy(), alone.keep_T.numpy() & together)
    torch.testing.assert_close(got.weight_T, torch.where(torch.from_numpy(together), alone.weight_T, 0.0))
    accept, counted = (
        getattr(alone.record, field).flatten().numpy() for field in ("accept_MT", "counted_MT")
    )
    inside = together[np.argsort(s.microbatch_T.numpy(), kind="stable")]
    every = make_correction(name, knobs, 0).denominator == "all"
    assert got.count.item() == pytest.approx(mask.sum() if every else counted[inside].sum(), rel=1e-9)
    assert float(got.acceptance[0]) == pytest.approx(accept[inside].sum(), rel=1e-6)
    for metric, pair in alone.metrics.items():
        assert torch.equal(torch.stack(pair), torch.stack(got.metrics[metric])), metric
    assert float(got.metrics["filter/kept"][0]) == together.sum()
    first = [one for one in got.metrics if one.startswith("filter/")][0]
    assert float(got.metrics[first][0]) == stays[0].sum()


@pytest.mark.parametrize(("name", "knobs"), CORRECTED)
def test_a_filtered_correction_is_the_same_on_any_split(name, knobs):
    s, call = scores(), combined(name, knobs, CHOSEN[2:])
    whole = run(call, s)
    index = [(s.microbatch_T == rank).nonzero()[:, 0] for rank in range(3)]
    split = on_ranks([part(s, i) for i in index], partial(run, call))
    for i, mine in zip(index, split, strict=True):
        assert torch.equal(mine.keep_T, whole.keep_T[i])
        torch.testing.assert_close(mine.weight_T, whole.weight_T[i], rtol=1e-6, atol=1e-7)
    assert sum(mine.count for mine in split).item() == pytest.approx(whole.count.item(), rel=1e-12)


def test_without_filters_nothing_is_touched():
    s = scores()
    method = make_correction("jackpot", {}, 0)
    found = run(method, s).record
    assert filtered(found, [], None, None, counts_all=False) is found


def test_names_of_filters_and_what_they_refuse():
    twice = make_filters([("k_filter", {}), ("mis", {}), ("k_filter", {"kind": "k2"})], "algorithm.filters")
    assert [name for name, _ in twice] == ["k_filter", "mis", "k_filter_2"]
    assert set(FILTERS) - {"entropy"} <= set(CORRECTIONS)  # Which weighs nothing.
    with pytest.raises(ValueError) as caught:
        chosen = [
            ("geo_rs", {"cap": 2.0}),
            ("gro_ts", {}),
            ("icepop", {"low": 2.0}),
            ("mis", {"denominator": "kept"}),
        ]
        make_filters(chosen, "algorithm.filters")
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()] == [
        "algorithm.filters[0].cap = 2.0",
        "algorithm.filters[1].name = 'gro_ts' is unknown. Did you mean 'geo_rs'?",
        "algorithm.filters[2].low = 2.0, high = 5.0",
        "algorithm.filters[3].denominator = 'kept'",
    ]
    assert "a filter keeps or removes, algorithm.correction weighs. Leave it out." in str(caught.value)
