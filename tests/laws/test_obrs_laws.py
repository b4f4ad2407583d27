"""The laws of OBRS on distributions that hypothesis looks for: zeros, one-hot, equal, lam at the extreme
ratios."""

import math

import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from megatron_jackpot.algorithm.obrs import (
    LOG_RATIO_LIMIT,
    accept_prob,
    exact_overlap_mass,
    jackpot_weight,
    lambda_for_acceptance,
)

WEIGHTS = st.lists(st.integers(0, 1000), min_size=2, max_size=50)
LAM = st.floats(0.2, 5.0)
LAWS = settings(max_examples=300, deadline=None, derandomize=True)


def distributions(a: list[int], b: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p, log q) over the same ids, fp64, with exact zeros."""
    size = min(len(a), len(b))
    assume(sum(a[:size]) > 0 and sum(b[:size]) > 0)
    p, q = (torch.tensor(x[:size], dtype=torch.float64) for x in (a, b))
    return (p / p.sum()).log(), (q / q.sum()).log()


def on_support(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids that the server can sample."""
    possible = q > -math.inf
    return p[possible], q[possible]


def check(p: torch.Tensor, q: torch.Tensor, lam: float) -> None:
    z = exact_overlap_mass(p, q, lam)
    assert 0 <= z <= min(1.0, 1 / lam)
    p_s, q_s = on_support(p, q)
    accept = accept_prob(p_s, q_s, lam)
    assert ((0 <= accept) & (accept <= 1)).all()
    torch.testing.assert_close((q_s.exp() * accept).sum(), z, rtol=1e-12, atol=1e-12)
    if z == 0:
        return
    clamped = ((p_s - q_s).abs() > LOG_RATIO_LIMIT) & (p_s > -math.inf)
    assert not clamped.any(), "integer weights up to 1000 keep every ratio inside the clamp"
    weight = jackpot_weight(p_s, q_s, z, lam, math.inf)
    law = q_s.exp() * accept / z
    # Identity 1: the mass of p on what q covers.
    torch.testing.assert_close((law * weight).sum(), p_s.exp().sum(), rtol=1e-12, atol=1e-12)
    # Identity 3: after the cap, in expectation over the draw.
    capped = accept * jackpot_weight(p_s, q_s, z, lam, 3.0)
    torch.testing.assert_close(capped, (z * (p_s - q_s).exp()).clamp(max=3.0), rtol=1e-12, atol=1e-12)
    # Identity 2, where KL(p || q) is finite: rejection does not move away from the target.
    if (q[p > -math.inf] > -math.inf).all():
        inside = p_s > -math.inf
        before = (p_s.exp() * (p_s - q_s))[inside].sum()
        after = (p_s.exp() * (p_s - law.log()))[inside].sum()
        assert after <= before + 1e-12


@LAWS
@given(WEIGHTS, WEIGHTS, LAM)
@example([1, 0], [1, 0], 1.0)
@example([1, 0], [0, 1], 1.0)
@example([1, 0, 0], [1, 1, 1], 5.0)
@example([1, 1, 1], [1, 0, 0], 0.2)
@example([3, 3, 3], [3, 3, 3], 1.0)
def test_identities_hold_on_any_pair(a: list[int], b: list[int], lam: float) -> None:
    check(*distributions(a, b), lam)


@LAWS
@given(WEIGHTS, WEIGHTS)
def test_identities_hold_with_lam_at_the_smallest_and_largest_ratio(a: list[int], b: list[int]) -> None:
    p, q = distributions(a, b)
    p_s, q_s = on_support(p, q)
    ratios = (p_s - q_s).exp()[p_s > -math.inf]
    assume(len(ratios) > 0)
    for lam in (ratios.min().item(), ratios.max().item()):
        check(p, q, lam)


@LAWS
@given(WEIGHTS, WEIGHTS, st.floats(0.01, 0.99))
def test_a_lam_for_an_acceptance_is_found_or_is_the_bound_that_stops_it(a, b, acceptance) -> None:
    p, q = on_support(*distributions(a, b))
    # One token per id, repeated by the server's weight: the mean over tokens is E_q[a].
    counts = torch.tensor(b[: len(a)])[torch.tensor(b[: len(a)]) > 0][: len(p)]
    log_r = (p - q).repeat_interleave(counts)
    mask = torch.ones_like(log_r, dtype=torch.bool)
    lam = lambda_for_acceptance(log_r, mask, acceptance, lambda sums: sums)
    mean = (log_r - math.log(lam)).clamp(max=0).exp().mean().item()
    assert 0.2 <= lam <= 5.0
    assert mean > acceptance - 1e-3 or lam == 0.2
    assert mean < acceptance + 1e-3 or lam == 5.0


def test_a_baseline_adds_nothing_to_the_expected_gradient_until_the_cap_binds() -> None:
    """E of keep x weight x grad log p in the logits: 0 without a cap, so that a group's mean may be taken off
    any reward; with one it grows as the cap falls."""
    generator = torch.Generator().manual_seed(0)
    p_NV, gap_NV = (torch.randn(200, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    p_NV, q_NV = p_NV.log_softmax(-1), (p_NV + 0.7 * gap_NV).log_softmax(-1)
    z_N1 = torch.minimum(p_NV, q_NV).exp().sum(-1, keepdim=True)
    size = []
    for cap in (math.inf, 3.0, 1.0):
        kept_NV = q_NV.exp() * accept_prob(p_NV, q_NV, 1.0) * jackpot_weight(p_NV, q_NV, z_N1, 1.0, cap)
        drift_NV = kept_NV - p_NV.exp() * kept_NV.sum(-1, keepdim=True)
        size.append(float(drift_NV.norm(dim=-1).mean()))
    assert size[0] < 1e-15 and 10 * size[1] < size[2]
