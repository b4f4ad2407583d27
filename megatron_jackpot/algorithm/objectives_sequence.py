"""Objectives whose ratio looks at more of the rollout than the token itself.

Shapes: T tokens; i the rollout of token t, |i| its number of counted tokens.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_jackpot.algorithm.objectives_base import (
    Anchor,
    Objective,
    check_that,
    clip_removed,
    clipped,
    earlier_minimum,
    ratio_to,
)
from megatron_jackpot.algorithm.obrs import check_cap
from megatron_jackpot.algorithm.tokens import segment_mean, segment_reduce
from megatron_jackpot.records import ObjectiveInputs


@dataclass(frozen=True, kw_only=True)
class GSPO(Objective):
    """PPO on s_i = exp(mean_t log(p / p_old)), as sg(s_i) p / sg(p) on each token (arXiv 2507.18071, Eq.
    13-14).

    With equal weights on a rollout's tokens this is the gradient of the plain form (Eq. 5); written per
    token, a token that the correction removes gets no gradient from its neighbours.
    """

    clip_low: float = 3e-4
    """s_i is clipped at 1 - clip_low."""
    clip_high: float = 4e-4
    """s_i is clipped at 1 + clip_high."""

    def __post_init__(self) -> None:
        check_that(0 <= self.clip_low <= 1, "clip_low", self.clip_low, "lie in [0, 1]", "Use 3e-4.")
        check_that(self.clip_high >= 0, "clip_high", self.clip_high, "be >= 0", "Use 4e-4.")

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        ratio_T = self._ratio(t) * (t.logp_T - t.logp_T.detach()).exp()
        return clipped(ratio_T, t.advantage_T, 1 - self.clip_low, 1 + self.clip_high, None)

    def removed(self, t: ObjectiveInputs) -> Tensor:
        return clip_removed(self._ratio(t), t.advantage_T, 1 - self.clip_low, 1 + self.clip_high, None)

    @torch.no_grad()
    def _ratio(self, t: ObjectiveInputs) -> Tensor:
        return segment_mean(ratio_to(t), t.counted_T, t.segment_T).exp().to(t.logp_T.dtype)


@dataclass(frozen=True, kw_only=True)
class GMPO(Objective):
    """exp(mean_t c_t) A with c = log s, clipped token by token on the side that A would push it to, as
    sg(exp(mean c)) exp(c) / sg(exp(c)) on each token (arXiv 2507.20673).

    With equal weights on a rollout's tokens and `aggregation: sequence` this is the gradient of the plain
    form.
    """

    clip_low: float = 0.4
    """For A < 0 log s is at least -clip_low."""
    clip_high: float = 0.4
    """For A > 0 log s is at most clip_high."""

    def __post_init__(self) -> None:
        ok = 0 <= self.clip_low < math.inf
        check_that(ok, "clip_low", self.clip_low, "be finite and >= 0", "Use 0.4.")
        check_that(self.clip_high >= 0, "clip_high", self.clip_high, "be >= 0", "Use 0.4.")

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        clipped_T = self._clipped(t)
        fixed_T = clipped_T.detach()
        ratio_T = segment_mean(fixed_T, t.counted_T, t.segment_T).exp().to(t.logp_T.dtype)
        return ratio_T * (clipped_T - fixed_T).exp() * t.advantage_T

    def removed(self, t: ObjectiveInputs) -> Tensor:
        log_ratio_T = ratio_to(t)
        over_T = (log_ratio_T > self.clip_high) & (t.advantage_T > 0)
        return over_T | ((log_ratio_T < -self.clip_low) & (t.advantage_T < 0))

    def _clipped(self, t: ObjectiveInputs) -> Tensor:
        """c [T]; a token that is not trained on is clipped as its rollout's others are."""
        log_ratio_T = ratio_to(t)
        rollout_T = segment_reduce(t.advantage_T, t.valid_T, t.segment_T)
        negative_T = torch.where(t.valid_T, t.advantage_T < 0, rollout_T < 0)
        up_T, down_T = log_ratio_T.clamp(max=self.clip_high), log_ratio_T.clamp(min=-self.clip_low)
        return torch.where(negative_T, down_T, up_T)


@dataclass(frozen=True, kw_only=True)
class TOPR(Objective):
    """A log p for A >= 0, sg(min(p(y)/q(y), 1)) A log p for A < 0, y the whole rollout (arXiv 2503.14286)."""

    level: Literal["sequence", "token"] = "sequence"
    """The ratio of the whole rollout, as in the paper, or of the token alone (ours)."""
    anchor: Anchor = "server"
    """The ratio is p / q (only with correction "none") or p / p_old (with any correction)."""

    @property
    def corrects(self) -> bool:
        return self.anchor == "server"

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        log_ratio_T = ratio_to(t, self.anchor).detach()
        if self.level == "sequence":
            log_ratio_T = segment_reduce(log_ratio_T, t.counted_T, t.segment_T)
        taper_T = log_ratio_T.clamp(max=0.0).exp().to(t.logp_T.dtype)
        return torch.where(t.advantage_T < 0, taper_T, 1.0) * t.advantage_T * t.logp_T


@dataclass(frozen=True, kw_only=True)
class MinPRO(Objective):
    """sg(min(r_t min_{j<t} r_j, cap)) A log p, r = p / q token by token (arXiv 2601.22718).

    The product stands in for the prefix ratio r_1 ... r_t; the first token of a rollout has r_1.
    """

    cap: float = 5.0
    """Upper bound of the weight (ours); .inf switches it off."""
    prefix_at_most_one: bool = False
    """The minimum is at most 1 (ours): ratios above 1 at the start of a rollout raise no weight."""
    anchor: Anchor = "server"
    """The ratio is p / q (only with correction "none") or p / p_old (with any correction)."""

    def __post_init__(self) -> None:
        check_cap("cap", self.cap)

    @property
    def corrects(self) -> bool:
        return self.anchor == "server"

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        log_ratio_T = ratio_to(t, self.anchor).detach()
        least_T = earlier_minimum(log_ratio_T, t)
        if self.prefix_at_most_one:
            least_T = least_T.clamp(max=0.0)
        log_weight_T = log_ratio_T + least_T
        weight_T = log_weight_T.exp().clamp(max=self.cap).to(t.logp_T.dtype)
        return weight_T * t.advantage_T * t.logp_T
