"""Selectors by their name in the configuration: docs/sampling.md has formulas, sources and what each biases.

Shapes: N rollouts of one group, c of them correct; L those of low advantage.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_jackpot.algorithm.registry import Registry
from megatron_jackpot.algorithm.selectors_base import (
    TIE,
    Group,
    Selection,
    Selector,
    chosen,
    drawn,
    nothing,
    whole,
)


@dataclass(frozen=True, kw_only=True)
class All(Selector):
    """Every rollout trains, with weight 1."""

    selects: ClassVar[bool] = False

    def __call__(self, group: Group) -> Selection:
        return whole(group)


@dataclass(frozen=True, kw_only=True)
class NonzeroStd(Selector):
    """Groups whose rewards differ, whole; the others train nothing (DAPO, arXiv 2503.14476)."""

    metric: Literal["reward", "correct"] = "reward"
    """What must differ: the reward with what is added to it, or the verdict."""

    def __call__(self, group: Group) -> Selection:
        alike = group.dead if self.metric == "reward" else len(set(group.correct_N.tolist())) < 2
        return nothing() if alike else whole(group)


@dataclass(frozen=True, kw_only=True)
class PODS(Selector):
    """The `keep` rollouts whose rewards vary most: the i highest and keep - i lowest (arXiv 2504.13818).

    A group of equal rewards trains nothing.
    """

    keep: int = 16
    """m, rollouts that train of each group: fewer than rollout.samples_per_prompt, or nothing is left out."""

    def __post_init__(self) -> None:
        if self.keep < 2:
            raise ValueError(f"keep = {self.keep}: must be >= 2, one reward does not vary. Use 16.")

    def __call__(self, group: Group) -> Selection:
        if group.dead:
            return nothing()
        if len(group) <= self.keep:
            return whole(group)
        return chosen(most_varied(group.reward_N, self.keep))


@dataclass(frozen=True, kw_only=True)
class DynamicPruning(Selector):
    """Rollouts with |A| below their group's mean |A| are pruned at `rate`, what stays of them weighs more.

    The expected gradient is that of all rollouts (arXiv 2603.04135, with the draws that its proof needs).
    """

    stats: Literal["full", "selected"] = "full"
    """Where the advantages' mean and deviation are taken; "selected" is biased."""
    denominator: Literal["full", "selected"] = "full"
    """Whether N counts the tokens of rollouts that are left out; "selected" is biased."""
    rate: float = 0.5
    """P, with which a rollout of low advantage is pruned."""
    draw: Literal["bernoulli", "fixed"] = "bernoulli"
    """Each one's own draw and weight 1 / (1 - P), or a fixed number of them and weight |L| / number."""

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate = {self.rate}: must lie in [0, 1). Use 0.5.")

    def __call__(self, group: Group) -> Selection:
        size_N = group.advantage_N.double().abs()
        low_N = size_N < size_N.mean() - TIE
        low_C, weight_N = low_N.nonzero()[:, 0], torch.ones(len(group), dtype=torch.float64)
        if self.draw == "bernoulli":
            kept_C = low_C[group.draw_N[low_C] >= self.rate]
            weight_N[kept_C] = 1 / (1 - self.rate)
        else:
            number = len(low_C) - math.floor(self.rate * len(low_C))
            kept_C = drawn(low_C, group.draw_N, number)
            weight_N[kept_C] = len(low_C) / max(number, 1)
        index_S = torch.cat([(~low_N).nonzero()[:, 0], kept_C]).sort().values
        return Selection(index_S=index_S, weight_S=weight_N[index_S])


Posterior = Literal["standardised", "centred", "constant"]


@dataclass(frozen=True, kw_only=True)
class AERO(Selector):
    """Of few correct rollouts all and as many wrong ones; of an equal group some, with a Bayesian advantage
    (arXiv 2602.14338).

    With c of n correct: c / n >= 1/2 trains the whole group, less trains c correct and `ratio` c wrong ones.
    All equal: `keep` of them, with an advantage from the mean U = (c + 1) / (n + 2) of the Beta(1, 1)
    posterior.
    """

    ratio: float = 1.0
    """k: wrong rollouts that are kept for each correct one, at the largest gradient at 1."""
    keep: int = 4
    """Rollouts that train of a group of one verdict and one reward."""
    posterior: Posterior = "standardised"
    """Advantage there, r = 1 where correct, else 0: (r - U) / sqrt(U (1 - U)), r - U, or 2 U - 1."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < math.inf:
            raise ValueError(f"ratio = {self.ratio}: must be > 0 and finite. Use 1.0.")
        if self.keep < 1:
            raise ValueError(f"keep = {self.keep}: must be >= 1. Use 4.")

    def __call__(self, group: Group) -> Selection:
        right_C, wrong_C = group.correct_N.nonzero()[:, 0], (~group.correct_N).nonzero()[:, 0]
        correct, n = len(right_C), len(group)
        if 0 < correct < n:
            if 2 * correct >= n:
                return whole(group)
            number = max(1, math.floor(self.ratio * correct))
            return chosen(torch.cat([right_C, drawn(wrong_C, group.draw_N, number)]))
        if not group.dead:
            # One verdict, but rewards that differ: they have advantages of their own.
            return whole(group)
        some = chosen(drawn(torch.arange(n), group.draw_N, self.keep))
        advantage = posterior_advantage(correct, n, self.posterior)
        return replace(some, advantage_S=torch.full((len(some.index_S),), advantage, dtype=torch.float32))


SELECTORS = Registry(
    Selector,
    {"all": All, "nonzero_std": NonzeroStd, "aero": AERO, "pods": PODS, "dynamic_pruning": DynamicPruning},
)


def most_varied(reward_N: Tensor, keep: int) -> Tensor:
    """Indices of `keep` < N rewards of the largest variance, in any order; O(N log N) by prefix sums.

    Some optimum is the i highest and keep - i lowest (Lemma 3.1 of arXiv 2504.13818). Of equally good i, keep
    comes first, then the smallest.
    """
    order_N = reward_N.argsort(stable=True)
    # Centred, so that squares of large equal parts do not swallow the differences.
    sorted_N = reward_N[order_N] - reward_N.mean()
    sums, squares = (
        torch.cat([torch.zeros(1, dtype=torch.float64), part.cumsum(0)])
        for part in (sorted_N, sorted_N.square())
    )
    n, best, largest = len(reward_N), keep, -math.inf
    rounding = 1e-12 * float(squares[-1])
    for high in (keep, *range(keep)):
        low = keep - high
        total = float(sums[low] + sums[n] - sums[n - high])
        square = float(squares[low] + squares[n] - squares[n - high])
        variance = square / keep - (total / keep) ** 2
        if variance > largest + rounding:
            best, largest = high, variance
    return torch.cat([order_N[: keep - best], order_N[n - best :]])


def posterior_mean(correct: int, n: int) -> float:
    """U = (c + 1) / (n + 2), the mean of a pass rate that was uniform before `n` rollouts were seen."""
    return (correct + 1) / (n + 2)


def posterior_advantage(correct: int, n: int, form: Posterior) -> float:
    """Of each rollout of a group of `n` with `correct` = 0 or n; never 0 (AERO, three readings)."""
    u, r = posterior_mean(correct, n), float(correct > 0)
    if form == "constant":
        return 2 * u - 1
    return (r - u) / (math.sqrt(u * (1 - u)) if form == "standardised" else 1.0)
