"""What single objectives promise beside their formulas: budgets, bounds that move, shares that are drawn."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_jackpot.algorithm.objectives import OBJECTIVES, PPO
from megatron_jackpot.algorithm.objectives_base import objective_inputs
from megatron_jackpot.algorithm.objectives_sequence import MinPRO
from megatron_jackpot.algorithm.registry import build
from tests.unit.flat import Tokens, identity, inputs_of, number_alone, on_ranks, places
from tests.unit.flat import scores_of as flat_scores
from tests.unit.test_corrections import make_scores
from tests.unit.test_corrections import part as flat_part
from tests.unit.test_objectives import (
    make_tokens,
    part,
    prepared,
)


def test_m2po_keeps_as_many_tokens_as_the_budget_allows():
    """On many tokens the threshold is at most one bin, 0.3%, below the exact one."""
    generator = torch.Generator().manual_seed(3)
    num = 20000
    logp_T, tokens = make_tokens()
    index = torch.randint(int(tokens.mask_T.sum()), (num,), generator=generator)
    at = tokens.mask_T.nonzero()[index, 0]
    tokens, logp_T = part(tokens, at), logp_T[at]
    log_r_T = torch.randn(num, generator=generator, dtype=torch.float64) * 0.5
    logp_T = tokens.server_logp_T + log_r_T
    made = prepared(build("m2po", {"scope": "all"}, OBJECTIVES, "objective"), logp_T, tokens)
    kept_T = log_r_T.abs() <= made.threshold
    assert log_r_T[kept_T].square().mean() <= 0.04
    assert log_r_T[log_r_T.abs() <= made.threshold * 1.004].square().mean() > 0.04
    dropped = made.metrics(inputs_of(logp_T, tokens))["clip_fraction"][0].item()
    assert dropped == (~kept_T & (tokens.advantage_T != 0)).sum().item()


@pytest.mark.parametrize(
    ("limited", "want"), [(False, [1, 1.2, 0.5, 0.5, 0.5]), (True, [1, 1, 0.5, 0.5, 0.5])]
)
def test_the_minimum_of_minpro_is_of_earlier_ratios_and_may_be_held_at_1(limited, want):
    ratio_T = torch.tensor([1.2, 0.5, 1.1, 0.9, 2.0], dtype=torch.float64)
    zeros_T, ones_T = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.bool)
    tokens = Tokens(
        old_logp_T=zeros_T - 3,
        server_logp_T=zeros_T - 3,
        advantage_T=zeros_T + 1,
        mask_T=ones_T,
        segment_T=torch.zeros(5, dtype=torch.int64),
    )
    logp_T = (ratio_T.log() - 3).requires_grad_()
    surrogate_T = MinPRO(cap=math.inf, prefix_at_most_one=limited).surrogate(inputs_of(logp_T, tokens))
    (weight_T,) = torch.autograd.grad(surrogate_T.sum(), logp_T)
    torch.testing.assert_close(weight_T / ratio_T, torch.tensor(want, dtype=torch.float64))


def test_bapo_moves_its_bounds_only_when_negatives_dominate():
    logp_T, tokens = make_tokens(seed=1)
    easy = prepared(build("bapo", {"positive_share": 0.01}, OBJECTIVES, "objective"), logp_T, tokens)
    hard = prepared(build("bapo", {"positive_share": 0.99}, OBJECTIVES, "objective"), logp_T, tokens)
    assert (easy.low, easy.high) == (0.6, 1.2)
    assert hard.low == 0.9 and hard.high == pytest.approx(1.2 + 15 * 0.05)  # Where low is at its end.


def test_bapo_leaves_its_bounds_where_no_advantage_is_above_0():
    logp_T, tokens = make_tokens(seed=1)
    tokens = part(tokens, (tokens.advantage_T < 0).nonzero()[:, 0])
    index = (make_tokens(seed=1)[1].advantage_T < 0).nonzero()[:, 0]
    made = prepared(build("bapo", {"positive_share": 0.99}, OBJECTIVES, "objective"), logp_T[index], tokens)
    assert (made.low, made.high) == (0.6, 1.2)


def test_bapo_s_lower_bound_raises_the_share_of_the_gradient_and_never_that_of_the_values():
    """Why the lower bound first, to its end, is the longer way: each of its steps makes the wanted share
    rarer, and each of the upper bound's makes it more."""
    logp_T, tokens = make_tokens(seed=1, gap=0.8)
    mask_T, advantage_T = tokens.mask_T, tokens.advantage_T[tokens.mask_T]
    weight_T = tokens.server_logp_T[mask_T].exp()

    def shares(low, high):
        r_T = (logp_T - tokens.server_logp_T)[mask_T].exp().requires_grad_()
        value_T = weight_T * torch.minimum(r_T * advantage_T, r_T.clamp(low, high) * advantage_T)
        slope_T = r_T * torch.autograd.grad(value_T.sum(), r_T)[0]
        both = (value_T.detach().abs(), slope_T.abs())
        return [(one_T[advantage_T > 0].sum() / one_T.sum()).item() for one_T in both]

    start, low, high = shares(0.6, 1.2), shares(0.9, 1.2), shares(0.6, 1.8)
    assert low[0] < start[0] < high[0] and low[1] > start[1] and high[1] > start[1]
    wanted = {"positive_share": (start[0] + high[0]) / 2, "high_end": 1.8}
    ends = {}
    for order in ("high_first", "alternate", "low_first"):
        made = prepared(build("bapo", {**wanted, "order": order}, OBJECTIVES, "here"), logp_T, tokens)
        ends[order] = (made.low, made.high)
    assert ends["high_first"][0] == 0.6 < ends["alternate"][0] <= ends["low_first"][0] == 0.9
    assert ends["high_first"][1] < ends["alternate"][1] <= ends["low_first"][1]


def test_bapo_s_orders_end_where_the_specification_says():
    """A batch whose shares are its numbers: .369 of the values, .351 with the lower bound at .9, of the
    gradient .262 and .303; .395 of the values is met first at (.6, 1.8), by `low_first` never.

    It says that `alternate` meets .395 at (.9, 1.95). With these numbers it cannot: the gain is concave in
    `high`, and with .369 at 1.2 and less than .395 at 1.75 it is so small at 1.95 that the share is at most
    .385 there. (.9, 1.95) is where `alternate` ends all the same.
    """
    gain_by_ratio = {1.0: 0.3208, 1.3: 0.1256, 3.0: 0.0944}
    pain_by_ratio = {0.3: 0.1605, 0.75: 0.2211, 1.0: 0.7378}
    ratios = torch.tensor([*gain_by_ratio, *pain_by_ratio]).double()
    sizes = [*gain_by_ratio.values(), *(-pain for pain in pain_by_ratio.values())]
    zeros_T = torch.zeros(len(ratios)).double()
    tokens = Tokens(
        old_logp_T=zeros_T - 3,
        server_logp_T=zeros_T - 3,
        advantage_T=torch.tensor(sizes).double(),
        mask_T=zeros_T == 0,
        segment_T=torch.arange(len(ratios)),
    )
    logp_T = ratios.log() - 3

    def shares(low: float, high: float) -> list[float]:
        r_T = ratios.clone().requires_grad_()
        a_T = tokens.advantage_T
        value_T = torch.minimum(r_T * a_T, r_T.clamp(low, high) * a_T)
        slope_T = r_T * torch.autograd.grad(value_T.sum(), r_T)[0]
        both = (value_T.detach().abs(), slope_T.abs())
        return [(one_T[a_T > 0].sum() / one_T.sum()).item() for one_T in both]

    assert shares(0.6, 1.2) == pytest.approx([0.369, 0.262], abs=5e-4)
    assert shares(0.9, 1.2) == pytest.approx([0.351, 0.303], abs=5e-4)
    ends = {}
    for order, high_end in (("high_first", 3.0), ("alternate", 3.0), ("low_first", 2.0)):
        knobs = {"positive_share": 0.395, "weighted": False, "order": order, "high_end": high_end}
        made = prepared(build("bapo", knobs, OBJECTIVES, "here"), logp_T, tokens)
        ends[order] = (made.low, made.high)
    assert ends["high_first"] == pytest.approx((0.6, 1.8)) and shares(*ends["high_first"])[0] >= 0.395
    # In units of the pain at .6: the gain at 1.2 and 1.75, and at most .2 / .55 of their difference more.
    at_1_2, at_1_75 = (share / (1 - share) for share in (0.369, 0.395))
    most = at_1_75 + (at_1_75 - at_1_2) * 0.2 / 0.55
    assert most / (most + at_1_2 / 0.351 - at_1_2) == pytest.approx(0.385, abs=5e-4)
    assert ends["alternate"] == pytest.approx((0.9, 1.95)) and shares(*ends["alternate"])[0] < 0.385
    assert ends["low_first"] == pytest.approx((0.9, 2.0)) and shares(*ends["low_first"])[0] < 0.395


def test_clip_cov_draws_its_share_of_the_tokens_inside_whatever_the_split():
    """Every token has its own draw. Over many steps the share that is drawn is what is asked."""
    s = make_scores(seed=1)
    objective = build("clip_cov", {"share": 0.1, "cov_low": 0.1, "cov_high": 2.0}, OBJECTIVES, "objective")
    logp, a, mask = s.target_logp_T.double().numpy(), s.advantage_T.numpy(), s.mask_T.numpy()
    cov = (logp - logp[mask].mean()) * (a - a[mask].mean())
    inside = mask & (cov > 0.1) & (cov < 2.0)
    assert 0.15 * mask.sum() < inside.sum() < 0.6 * mask.sum()

    def drawn(flat, sum_over_batch=identity):
        scores = flat_scores(flat)
        made = objective.prepare(scores, sum_over_batch, number_alone)
        row_T, column_T, _, _ = places(flat)
        inputs = [
            objective_inputs(scores.target_logp_MT[m], scores.policy_logp_MT[m], scores.batch, m)
            for m in range(len(scores.target_logp_MT))
        ]
        plain = [PPO().removed(t) for t in inputs]
        removed = [made.removed(t) & ~own for t, own in zip(inputs, plain, strict=True)]
        return torch.stack(removed)[row_T, column_T], torch.stack(plain)[row_T, column_T].numpy()

    whole_T, clipped = drawn(s)
    index = [(s.microbatch_T == rank).nonzero()[:, 0].flip(0) for rank in range(3)]
    for i, (own_T, _) in zip(index, on_ranks([flat_part(s, i) for i in index], drawn), strict=True):
        assert torch.equal(own_T, whole_T[i])
    found = [drawn(replace(s, step=step))[0].numpy() for step in range(200)]
    assert not any((one & ~inside).any() for one in found)
    seen, wanted = (
        np.mean([one.sum() for one in found]),
        0.1 * mask.sum() * (inside & ~clipped).sum() / inside.sum(),
    )
    assert seen == pytest.approx(wanted, rel=0.05)  # 200 x 24 draws: a deviation of 1.3%.
