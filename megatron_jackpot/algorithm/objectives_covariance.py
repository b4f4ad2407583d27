"""Objectives that hold back the tokens which lower the entropy most (arXiv 2505.22617): those with a large
cov = (log p - mean log p) (A - mean A), the means over all tokens of the mini-batch.

Shapes: M micro-batches of T tokens; log p is at least -20 in cov.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_jackpot.algorithm.diagnostics import least_of_top, mean_over
from megatron_jackpot.algorithm.objectives_base import (
    Objective,
    check_that,
    constants,
    knobs_of,
    masked_log_ratio,
    ratio_to,
    unprepared,
)
from megatron_jackpot.algorithm.objectives_token import PPO
from megatron_jackpot.algorithm.obrs import LOG_RATIO_LIMIT, RATIO_UNIT, counter_uniform
from megatron_jackpot.algorithm.tokens import NumberAlike, SumOverBatch
from megatron_jackpot.records import Metrics, ObjectiveInputs, Scores

STREAM = 1 << 32
"""Added to the seed: other numbers than a correction draws with the same one."""


class Means(NamedTuple):
    """Over the tokens of the global mini-batch."""

    logp: float
    advantage: float
    count: float


@dataclass(frozen=True, kw_only=True)
class ClipCov(PPO):
    """PPO without the gradient of a few tokens, drawn among those with cov_low < cov < cov_high."""

    share: float = 2e-4
    """Expected number of tokens drawn, as a share of all."""
    cov_low: float = 1.0
    """Tokens with a smaller covariance are never drawn."""
    cov_high: float = 5.0
    """Nor are those with a larger one."""
    seed: int = 0
    """Key of the draws, together with step, rollout id and position."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self.share)
        for name in ("cov_low", "cov_high"):
            value = getattr(self, name)
            check_that(math.isfinite(value), name, value, "be finite", "Use 1.0 and 5.0.")
        ok = self.cov_low < self.cov_high
        check_that(ok, "cov_low", self.cov_low, f"be < cov_high = {self.cov_high}", "Use 1.0 and 5.0.")

    @torch.no_grad()
    def prepare(
        self, scores: Scores, sum_over_batch: SumOverBatch, number_alike: NumberAlike
    ) -> "PreparedClipCov":
        """The same method with the means and the chance of a draw. Sums over the batch twice."""
        means, cov_MT, mask_MT = _prepared(scores, sum_over_batch)
        inside = float(sum_over_batch((mask_MT & self._inside(cov_MT)).sum().double()))
        chance = min(self.share * means.count / inside, 1.0) if inside else 0.0
        return PreparedClipCov(**knobs_of(self, ClipCov), means=means, chance=chance, step=scores.step)

    def _inside(self, cov_T: Tensor) -> Tensor:
        return (cov_T > self.cov_low) & (cov_T < self.cov_high)

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        raise unprepared("clip_cov")

    def removed(self, t: ObjectiveInputs) -> Tensor:
        raise unprepared("clip_cov")


@dataclass(frozen=True, kw_only=True)
class PreparedClipCov(ClipCov):
    """ClipCov with the numbers of one mini-batch."""

    means: Means
    chance: float
    """Of each token inside the bounds to be drawn."""
    step: int

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        return PPO.surrogate(self, t).masked_fill(self._drawn(t), 0.0)

    def removed(self, t: ObjectiveInputs) -> Tensor:
        return PPO.removed(self, t) | self._drawn(t)

    def metrics(self, t: ObjectiveInputs) -> Metrics:
        return super().metrics(t) | {"cov_fraction": mean_over(self._drawn(t), t.valid_T)}

    def _drawn(self, t: ObjectiveInputs) -> Tensor:
        uniform_T = counter_uniform(self.seed + STREAM, self.step, t.rollout_id_T3, t.position_T)
        inside_T = self._inside(_covariance(t.logp_T, t.advantage_T, self.means))
        return t.valid_T & inside_T & (uniform_T < self.chance)


@dataclass(frozen=True, kw_only=True)
class KLCov(Objective):
    """s A, minus coef |log s| on the tokens with the largest covariance."""

    share: float = 2e-3
    """This share of all tokens is held back, at least one; those of one bin (0.08%) together or not."""
    coef: float = 1.0
    """Weight of |log s| there."""

    def __post_init__(self) -> None:
        _check_share(self.share)
        check_that(0 < self.coef < math.inf, "coef", self.coef, "be finite and > 0", "Use 1.0.")

    @torch.no_grad()
    def prepare(
        self, scores: Scores, sum_over_batch: SumOverBatch, number_alike: NumberAlike
    ) -> "PreparedKLCov":
        """The same method with the least covariance that is held back. Sums over the batch twice."""
        means, cov_MT, mask_MT = _prepared(scores, sum_over_batch)
        least = least_of_top(cov_MT, mask_MT, self.share, sum_over_batch)
        return PreparedKLCov(**knobs_of(self, KLCov), means=means, least=least)

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        raise unprepared("kl_cov")

    def metrics(self, t: ObjectiveInputs) -> Metrics:
        raise unprepared("kl_cov")


@dataclass(frozen=True, kw_only=True)
class PreparedKLCov(KLCov):
    """KLCov with the numbers of one mini-batch."""

    means: Means
    least: float
    """Covariance from which on a token is held back."""

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        log_ratio_T = ratio_to(t)
        held_T = torch.where(self._held(t), self.coef * log_ratio_T.abs(), 0.0)
        return log_ratio_T.exp() * t.advantage_T - held_T

    def metrics(self, t: ObjectiveInputs) -> Metrics:
        numbers = {"cov_least": min(self.least, 1e5)}
        held = {"cov_fraction": mean_over(self._held(t), t.valid_T)}
        return Objective.metrics(self, t) | held | constants(numbers, t.logp_T)

    def _held(self, t: ObjectiveInputs) -> Tensor:
        return t.valid_T & (_covariance(t.logp_T, t.advantage_T, self.means) >= self.least)


def _prepared(scores: Scores, sum_over_batch: SumOverBatch) -> tuple[Means, Tensor, Tensor]:
    """(means, cov [M, T] float64, mask): at the target policy's log-probs. Sums over the batch once."""
    _, mask_MT = masked_log_ratio(scores)  # Refuses what is not a number.
    logp_MT = torch.where(mask_MT, scores.target_logp_MT, 0.0).double().clamp(min=-LOG_RATIO_LIMIT)
    advantage_MT = torch.where(mask_MT, scores.batch.advantage_MT, 0.0).double()
    # Rounded, so that the sums are exact in any order and over any split.
    sums = [(x / RATIO_UNIT).round().sum() * RATIO_UNIT for x in (logp_MT, advantage_MT)]
    logp, advantage, count = sum_over_batch(torch.stack([*sums, mask_MT.sum().double()])).tolist()
    means = Means(logp / max(count, 1.0), advantage / max(count, 1.0), count)
    return means, _covariance(logp_MT, advantage_MT, means), mask_MT


def _covariance(logp_T: Tensor, advantage_T: Tensor, means: Means) -> Tensor:
    """(log p - mean log p) (A - mean A), float64, detached."""
    logp_T = logp_T.detach().double().clamp(min=-LOG_RATIO_LIMIT)
    return (logp_T - means.logp) * (advantage_T.double() - means.advantage)


def _check_share(share: float) -> None:
    check_that(0 < share < 1, "share", share, "lie in (0, 1)", "Use 2e-4 for clip_cov, 2e-3 for kl_cov.")
