"""Selectors against enumeration: brute force over subsets, expectations over draws, numbers of the papers."""

import itertools
import math

import pytest
import torch

from megatron_jackpot.algorithm.advantages import GRPO
from megatron_jackpot.algorithm.objectives import PPO
from megatron_jackpot.algorithm.obrs import counter_uniform
from megatron_jackpot.algorithm.selectors import (
    AERO,
    PODS,
    All,
    DynamicPruning,
    NonzeroStd,
    most_varied,
    posterior_advantage,
)
from megatron_jackpot.algorithm.selectors_base import Group
from tests.unit.flat import Tokens, inputs_of


def group_of(rewards, correct=None, draws=None) -> Group:
    reward_N = torch.tensor(rewards, dtype=torch.float64)
    n = len(rewards)
    return Group(
        reward_N=reward_N,
        correct_N=reward_N >= 1 if correct is None else torch.tensor(correct, dtype=torch.bool),
        advantage_N=GRPO()(reward_N),
        num_tokens_N=torch.full((n,), 7),
        draw_N=torch.arange(n).double() / n if draws is None else torch.tensor(draws, dtype=torch.float64),
    )


def variance(values) -> float:
    return sum(x * x for x in values) / len(values) - (sum(values) / len(values)) ** 2


def test_pods_keeps_a_subset_of_the_largest_variance():
    generator = torch.Generator().manual_seed(3)
    for n, keep in itertools.product((5, 8), (2, 3, 4)):
        for kind in range(6):
            drawn = torch.rand(n, generator=generator, dtype=torch.float64)
            reward_N = 1e6 + 5 * drawn if kind % 2 else (drawn < 0.1 + 0.2 * kind).double()
            index = most_varied(reward_N, keep).tolist()
            assert len(set(index)) == keep
            centred = (reward_N - reward_N.mean()).tolist()
            best = max(variance(subset) for subset in itertools.combinations(centred, keep))
            assert variance([centred[i] for i in index]) == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_pods_takes_the_last_of_equal_rewards_and_half_of_each_verdict():
    assert sorted(most_varied(torch.ones(6, dtype=torch.float64), 2).tolist()) == [4, 5]
    rewards = [0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    index = PODS(keep=4)(group_of(rewards)).index_S.tolist()
    assert sum(rewards[i] for i in index) == 2 and index == sorted(index)


def test_pods_leaves_equal_groups_out_and_small_ones_whole():
    assert len(PODS(keep=2)(group_of([1.0] * 6)).index_S) == 0
    assert PODS(keep=6)(group_of([1.0, 0.0, 0.0])).index_S.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="keep = 1: must be >= 2"):
        PODS(keep=1)


def test_advantages_of_one_right_answer_in_six_are_the_paper_s_example():
    """Theirs have the deviation with n, ours with n - 1."""
    rewards = [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    index_S = PODS(keep=2)(group_of(rewards)).index_S
    selected = GRPO()(torch.tensor(rewards)[index_S]) * math.sqrt(2)
    assert sorted(selected.tolist()) == pytest.approx([-1.0, 1.0], abs=1e-5)
    full = GRPO()(rewards)[index_S] * math.sqrt(6 / 5)
    assert sorted(full.tolist()) == pytest.approx([-0.447, 2.236], abs=1e-3)


REWARDS = [1.0, 0.1, 0.0, 0.3, 0.2, 0.9]
VALUES = [0.7, -2.0, 2.0, 0.95, -0.46, 1.1]
"""What each rollout would add to the gradient; the squares of those that may be pruned add up to 5.11."""


def total_of(found) -> float:
    return sum(w * VALUES[i] for i, w in zip(found.index_S.tolist(), found.weight_S.tolist(), strict=True))


def low(rewards) -> list[int]:
    size = GRPO()(rewards).abs().tolist()
    return [i for i, a in enumerate(size) if a < sum(size) / len(size) - 1e-6]


def prunings(rate: float):
    """(probability, what trains) of every outcome of the draws."""
    few = low(REWARDS)
    assert 2 <= len(few) < len(REWARDS)
    for kept in itertools.product((False, True), repeat=len(few)):
        draws = [0.0] * len(REWARDS)
        for i, stays in zip(few, kept, strict=True):
            draws[i] = rate if stays else 0.999 * rate
        p = math.prod((1 - rate) if stays else rate for stays in kept)
        yield p, DynamicPruning(rate=rate)(group_of(REWARDS, draws=draws))


@pytest.mark.parametrize(("rate", "variance"), [(0.5, 5.11), (0.7, 11.9), (0.9, 46.0)])
def test_bernoulli_pruning_is_unbiased_with_the_variance_of_its_formula(rate, variance):
    mean = square = probability = 0.0
    for p, found in prunings(rate):
        total = total_of(found)
        mean, square, probability = mean + p * total, square + p * total**2, probability + p
    assert probability == pytest.approx(1.0)
    assert mean == pytest.approx(sum(VALUES), rel=1e-12)
    want = sum(VALUES[i] ** 2 for i in low(REWARDS)) * rate / (1 - rate)
    assert square - mean**2 == pytest.approx(want, rel=1e-9)
    assert want == pytest.approx(variance, abs=0.05 if rate > 0.5 else 5e-3)


def test_other_ways_to_prune_are_biased():
    """What multiplies each rollout's gradient, its mean over all draws, against A / n: where N is what was
    kept (`denominator: selected`) or the sum of weights, where advantages are taken anew (`stats: selected`),
    and the published algorithm, which takes floor(rate x n) of the smallest |A| away and weighs nothing."""
    n, size_N = len(REWARDS), GRPO()(REWARDS).double()
    mean = {name: torch.zeros(n).double() for name in ("full", "selected", "weights", "anew")}
    for p, found in prunings(0.5):
        kept_S, weight_S = found.index_S, found.weight_S
        of_S = weight_S * size_N[kept_S]
        anew_S = weight_S * GRPO()(torch.tensor(REWARDS)[kept_S])
        mean["full"][kept_S] += p * of_S / n
        mean["selected"][kept_S] += p * of_S / len(kept_S)
        mean["weights"][kept_S] += p * of_S / weight_S.sum()
        mean["anew"][kept_S] += p * anew_S / n
    rest_S = size_N.abs().argsort(descending=True)[: n - math.floor(0.5 * n)]
    mean["published"] = torch.zeros(n).double().index_put((rest_S,), size_N[rest_S] / len(rest_S))
    torch.testing.assert_close(mean.pop("full"), size_N / n)
    off = {name: (one_N - size_N / n).abs().max().item() for name, one_N in mean.items()}
    assert all(far > 0.1 * (size_N / n).abs().mean() for far in off.values()), off


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_pruning_leaves_the_clipped_surrogate_unbiased_where_weights_multiply_what_was_clipped(rate):
    """Value and gradient. Within the clip, or within a cap on r, the weight would bias them."""
    index_N = torch.arange(len(REWARDS))
    tokens = Tokens(
        old_logp_T=torch.full((len(REWARDS),), -2.0, dtype=torch.float64),
        server_logp_T=torch.full((len(REWARDS),), -2.0, dtype=torch.float64),
        advantage_T=GRPO()(REWARDS).double(),
        mask_T=index_N >= 0,
        segment_T=index_N,
    )
    log_ratio_N = torch.tensor([0.4, -0.5, 0.1, 0.05, -0.1, -0.6], dtype=torch.float64)
    logp_N = (log_ratio_N - 2).requires_grad_()
    surrogate_N = PPO().surrogate(inputs_of(logp_N, tokens))
    (whole_N,) = torch.autograd.grad(surrogate_N.sum(), logp_N, retain_graph=True)
    value, slope_N, inside, capped = 0.0, torch.zeros(len(REWARDS), dtype=torch.float64), 0.0, 0.0
    for p, found in prunings(rate):
        i_S, weight_S = found.index_S, found.weight_S
        total = (weight_S * surrogate_N[i_S]).sum()
        (own_N,) = torch.autograd.grad(total, logp_N, retain_graph=True)
        value, slope_N = value + p * total.item(), slope_N + p * own_N
        ratio_S, advantage_S = weight_S * log_ratio_N[i_S].exp(), tokens.advantage_T[i_S]
        clipped_S = torch.minimum(ratio_S * advantage_S, ratio_S.clamp(0.8, 1.28) * advantage_S)
        inside += p * clipped_S.sum().item()
        capped += p * (ratio_S.clamp(max=1.5) * advantage_S).sum().item()
    assert value == pytest.approx(surrogate_N.sum().item(), rel=1e-12)
    torch.testing.assert_close(slope_N, whole_N)
    assert abs(inside - value) > 0.05
    plain = (log_ratio_N.exp().clamp(max=1.5) * tokens.advantage_T).sum().item()
    assert abs(capped - plain) > 0.05


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9])
def test_a_fixed_number_of_pruned_rollouts_is_unbiased_too(rate):
    few, totals, sizes = low(REWARDS), [], set()
    for order in itertools.permutations(range(len(few))):
        draws = [0.999] * len(REWARDS)
        for i, place in zip(few, order, strict=True):
            draws[i] = place / 10
        found = DynamicPruning(rate=rate, draw="fixed")(group_of(REWARDS, draws=draws))
        totals.append(total_of(found))
        sizes.add(len(found.index_S))
    assert sum(totals) / len(totals) == pytest.approx(sum(VALUES), rel=1e-12)
    assert sizes == {len(REWARDS) - math.floor(rate * len(few))}


@pytest.mark.parametrize("draw", ["bernoulli", "fixed"])
@pytest.mark.parametrize("rewards", [[1.0, 0.0] * 3, [0.3] * 5, [1.0]])
def test_where_all_advantages_are_equally_large_nothing_is_pruned(draw, rewards):
    found = DynamicPruning(rate=0.9, draw=draw)(group_of(rewards, draws=[0.0] * len(rewards)))
    assert found.index_S.tolist() == list(range(len(rewards))) and (found.weight_S == 1).all()


def test_a_rare_verdict_is_never_pruned():
    found = DynamicPruning(rate=0.9)(group_of([0.0, 0.0, 1.0, 0.0, 0.0], draws=[0.0] * 5))
    assert found.index_S.tolist() == [2] and found.weight_S.tolist() == [1.0]


def test_aero_keeps_every_right_answer_and_as_many_wrong_ones():
    rewards = [0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    draws = [0.9, 0.5, 0.1, 0.8, 0.3, 0.5, 0.7, 0.6]
    found = AERO()(group_of(rewards, draws=draws))
    assert found.index_S.tolist() == [1, 2, 4, 5] and found.advantage_S is None
    balanced = GRPO()(torch.tensor(rewards)[found.index_S])
    # A is +-1 with the papers' deviation, over n; ours is over n - 1.
    both = torch.tensor([1.0, -1.0, -1.0, 1.0])
    torch.testing.assert_close(balanced * math.sqrt(4 / 3), both, rtol=0, atol=1e-5)
    assert len(AERO(ratio=2.0)(group_of(rewards, draws=draws)).index_S) == 6
    half = [1.0, 0.0, 1.0, 0.0]
    assert AERO()(group_of(half)).index_S.tolist() == [0, 1, 2, 3]


def test_one_wrong_answer_for_each_right_one_gives_the_largest_gradient():
    """Normalised on c right and m wrong ones: sqrt(c m) / (c + m) times what the means differ by."""
    for right in range(1, 7):
        size = {m: math.sqrt(right * m) / (right + m) for m in range(1, 30)}
        for wrong, want in size.items():
            advantage_N = GRPO()([1.0] * right + [0.0] * wrong) * math.sqrt(1 + 1 / (right + wrong - 1))
            assert float(advantage_N[:right].sum()) / (right + wrong) == pytest.approx(want, rel=1e-4)
        assert max(size, key=size.__getitem__) == right and size[right] == 0.5


def test_posterior_advantages_are_the_specification_s_numbers():
    table = {
        "standardised": (-0.333, -0.243, 0.333),
        "centred": (-0.100, -0.056, 0.100),
        "constant": (-0.800, -0.889, 0.800),
    }
    for form, want in table.items():
        got = [posterior_advantage(c, n, form) for c, n in ((0, 8), (0, 16), (8, 8))]
        assert got == pytest.approx(want, abs=6e-4), form
    assert posterior_advantage(0, 1, "standardised") == pytest.approx(-0.707, abs=1e-3)


@pytest.mark.parametrize("posterior", ["standardised", "centred", "constant"])
def test_a_homogeneous_group_keeps_some_with_one_finite_advantage_of_its_verdict_s_sign(posterior):
    for n, reward in itertools.product(range(1, 65), (0.0, 1.0)):
        found = AERO(posterior=posterior)(group_of([reward] * n))
        assert len(found.index_S) == min(n, 4)
        value = found.advantage_S[0].item()
        assert math.isfinite(value) and value * (2 * reward - 1) > 0
        assert (found.advantage_S == value).all()


def test_one_verdict_with_rewards_that_differ_has_advantages_of_its_own():
    found = AERO()(group_of([0.0, -0.5, -0.25, 0.0, 0.0, 0.0], correct=[False] * 6))
    assert len(found.index_S) == 6 and found.advantage_S is None


def test_nonzero_std_looks_at_rewards_or_at_verdicts():
    shaped = group_of([1.0, 0.75, 1.0], correct=[True] * 3)
    assert len(NonzeroStd()(shaped).index_S) == 3
    assert len(NonzeroStd(metric="correct")(shaped).index_S) == 0
    assert len(NonzeroStd()(group_of([0.1 + 0.2, 0.3])).index_S) == 0
    assert len(NonzeroStd()(group_of([1.0])).index_S) == 0
    assert All()(shaped).index_S.tolist() == [0, 1, 2]


def test_draws_of_selection_and_of_keep_masks_are_independent():
    """P(stays and is kept) = P(stays) P(is kept): the weights' expectations factorise."""
    ids_N3 = torch.stack([torch.zeros(40000), torch.arange(40000) // 8, torch.arange(40000) % 8], -1).long()
    stays_N, kept_N = (counter_uniform(7, 3, ids_N3, torch.full((40000,), at)) >= 0.4 for at in (-1, 0))
    together = (stays_N & kept_N).double().mean().item()
    assert together == pytest.approx(0.36, abs=5 * math.sqrt(0.36 * 0.64 / 40000))
