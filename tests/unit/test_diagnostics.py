"""Sums and quantiles of a mini-batch, of which metrics are made."""

import torch

from megatron_jackpot.algorithm.diagnostics import global_quantiles, mean_over, means_over
from tests.unit.flat import identity


def test_many_means_at_once_are_the_means_one_by_one_and_what_is_outside_may_be_nan():
    draw = torch.Generator().manual_seed(0)
    mask = torch.rand(7, 90, generator=draw) < 0.6
    values = {
        "single": torch.randn(7, 90, generator=draw),
        "broken outside": torch.where(mask, torch.randn(7, 90, generator=draw), torch.nan),
        "truth": torch.rand(7, 90, generator=draw) < 0.3,
        "number": torch.randint(-9, 9, (7, 90), generator=draw),
    }
    for more in ({}, {"double": torch.randn(7, 90, dtype=torch.float64, generator=draw) * 1e30}):
        found = means_over(values | more, mask)
        assert found.keys() == values.keys() | more.keys()
        for name, value in (values | more).items():
            torch.testing.assert_close(found[name], mean_over(value, mask), rtol=1e-14, atol=1e-13)
            assert found[name][0].dtype == found[name][1].dtype == torch.float64


def test_global_quantiles_are_quantiles_of_the_union():
    values = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5000) % 3 > 0
    for level, got in zip(
        (0.01, 0.5, 1.0), global_quantiles(values, mask, (0.01, 0.5, 1.0), identity), strict=True
    ):
        exact = torch.quantile(values[mask], level, interpolation="higher").item()
        assert exact - 1e-3 <= got.item() <= exact + 1.1e-3
    ones = torch.ones(4)
    assert global_quantiles(ones, ones > 0, (0.01,), identity)[0] == 1
