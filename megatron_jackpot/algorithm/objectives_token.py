"""Objectives that look at the token alone, opsm apart, which drops whole rollouts.

Shapes: T tokens; s = p / p_old at the sampled token, p the live policy.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_jackpot.algorithm.objectives_base import (
    Anchor,
    Objective,
    check_that,
    clip_removed,
    clipped,
    ratio_to,
)
from megatron_jackpot.algorithm.obrs import check_cap, log_ratio
from megatron_jackpot.algorithm.tokens import segment_mean
from megatron_jackpot.records import ObjectiveInputs


@dataclass(frozen=True, kw_only=True)
class PPO(Objective):
    """min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) (arXiv 1707.06347; asymmetric: 2503.14476)."""

    clip_low: float = 0.2
    """s is clipped at 1 - clip_low."""
    clip_high: float = 0.28
    """s is clipped at 1 + clip_high."""
    dual_clip: float | None = None
    """For A < 0 the surrogate is at least dual_clip * A (arXiv 1912.09729); null switches it off."""

    def __post_init__(self) -> None:
        check_that(0 <= self.clip_low <= 1, "clip_low", self.clip_low, "lie in [0, 1]", "Use 0.2.")
        check_that(self.clip_high >= 0, "clip_high", self.clip_high, "be >= 0", "Use 0.28.")
        if self.dual_clip is not None:
            rule = f"be > 1 + clip_high = {1 + self.clip_high}"
            ok = self.dual_clip > 1 + self.clip_high
            check_that(ok, "dual_clip", self.dual_clip, rule, "Use 3.0 or null.")

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        return clipped(ratio_to(t).exp(), t.advantage_T, *self._bounds())

    def removed(self, t: ObjectiveInputs) -> Tensor:
        return clip_removed(ratio_to(t).exp(), t.advantage_T, *self._bounds())

    def _bounds(self) -> tuple[float, float, float | None]:
        return 1 - self.clip_low, 1 + self.clip_high, self.dual_clip


@dataclass(frozen=True, kw_only=True)
class DecoupledPPO(PPO):
    """sg(min(p_old / q, cap)) times PPO, p_old being the proximal policy (arXiv 2505.24298, AReaL).

    It carries its own weight p_old / q: only with correction "none".
    """

    clip_high: float = 0.2
    """s is clipped at 1 + clip_high."""
    cap: float = 5.0
    """Upper bound of p_old / q; .inf switches it off, as in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cap("cap", self.cap)

    @property
    def corrects(self) -> bool:
        return True

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        weight_T = log_ratio(t.old_logp_T, t.server_logp_T).exp().clamp(max=self.cap)
        return weight_T * super().surrogate(t)


@dataclass(frozen=True, kw_only=True)
class OPSM(PPO):
    """PPO without rollouts that have A < 0 and mean log(p_old / p) > delta (slime, --use-opsm), or mean
    log(q / p) > delta (DeepSeek-V3.2, arXiv 2512.02556)."""

    delta: float = 1e-4
    """Largest k1 estimate of the KL per token, from the anchor to p, that a rollout with A < 0 may have."""
    anchor: Anchor = "old"
    """The KL is from p_old, or from the server's q; it only removes, so that any correction goes with it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_that(self.delta >= 0, "delta", self.delta, "be >= 0", "Use 1e-4.")

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        return super().surrogate(t).masked_fill(self._dropped(t), 0.0)

    def removed(self, t: ObjectiveInputs) -> Tensor:
        return super().removed(t) | self._dropped(t)

    def _dropped(self, t: ObjectiveInputs) -> Tensor:
        kl_T = segment_mean(-ratio_to(t, self.anchor).detach(), t.counted_T, t.segment_T)
        return t.valid_T & (t.advantage_T < 0) & (kl_T > self.delta)


@dataclass(frozen=True, kw_only=True)
class SAPO(Objective):
    """(4 / tau) sigmoid(tau (s - 1)) A, tau by the sign of A: a soft gate in place of a clip (arXiv
    2511.20347)."""

    tau_positive: float = 1.0
    """tau where A > 0."""
    tau_negative: float = 1.05
    """tau where A <= 0: larger, so that the gate closes sooner."""

    def __post_init__(self) -> None:
        for name in ("tau_positive", "tau_negative"):
            value = getattr(self, name)
            check_that(0 < value < math.inf, name, value, "be a finite number > 0", "Use 1.0 and 1.05.")

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        tau_T = torch.full_like(t.logp_T.detach(), self.tau_negative)
        tau_T = tau_T.masked_fill(t.advantage_T > 0, self.tau_positive)
        return 4 / tau_T * torch.sigmoid(tau_T * (ratio_to(t).exp() - 1)) * t.advantage_T


@dataclass(frozen=True, kw_only=True)
class CISPO(Objective):
    """sg(clip(s, 1 - clip_low, 1 + clip_high)) A log p (arXiv 2506.13585, Eq. 4-5): no token loses its
    gradient."""

    clip_low: float = 1.0
    """The weight is at least 1 - clip_low; 1 means no lower bound, as in the paper."""
    clip_high: float = 4.0
    """The weight is at most 1 + clip_high."""

    def __post_init__(self) -> None:
        check_that(0 <= self.clip_low <= 1, "clip_low", self.clip_low, "lie in [0, 1]", "Use 1.0.")
        check_that(self.clip_high >= 0, "clip_high", self.clip_high, "be >= 0", "Use 4.0.")

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        weight_T = ratio_to(t).detach().exp().clamp(1 - self.clip_low, 1 + self.clip_high)
        return weight_T * t.advantage_T * t.logp_T


@dataclass(frozen=True, kw_only=True)
class Reinforce(Objective):
    """A log p: the policy gradient without ratio or clip (Williams 1992)."""

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        return t.advantage_T * t.logp_T
