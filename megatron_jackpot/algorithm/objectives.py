"""Objectives: the per-token surrogate that is maximised, with the live policy in it.

policy loss = -sum keep * weight * surrogate / N.
Shapes: T tokens; s = p_current / p_old at the sampled token.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_jackpot.algorithm.diagnostics import Metrics, mean_over
from megatron_jackpot.algorithm.obrs import log_ratio


@dataclass(frozen=True, kw_only=True)
class PPO:
    """min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) (arXiv 1707.06347; asymmetric: 2503.14476)."""

    clip_low: float = 0.2
    """s is clipped at 1 - clip_low."""
    clip_high: float = 0.28
    """s is clipped at 1 + clip_high."""
    dual_clip: float | None = None
    """For A < 0 the surrogate is at least dual_clip * A (arXiv 1912.09729); null switches it off."""

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low = {self.clip_low}: must lie in [0, 1]. Use 0.2.")
        if not self.clip_high >= 0:
            raise ValueError(f"clip_high = {self.clip_high}: must be >= 0. Use 0.28.")
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip_high:
            raise ValueError(
                f"dual_clip = {self.dual_clip}: must be > 1 + clip_high = {1 + self.clip_high}. "
                "Use 3.0 or null."
            )

    def __call__(self, logp_T: Tensor, old_logp_T: Tensor, advantage_T: Tensor) -> Tensor:
        """The surrogate [T], to be maximised; gradient flows into logp_T only."""
        advantage_T = advantage_T.detach()
        ratio_T = log_ratio(logp_T, old_logp_T.detach()).exp()
        clipped_T = ratio_T.clamp(1 - self.clip_low, 1 + self.clip_high)
        surrogate_T = torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
        if self.dual_clip is None:
            return surrogate_T
        floor_T = torch.where(advantage_T < 0, self.dual_clip * advantage_T, -math.inf)
        return torch.maximum(surrogate_T, floor_T)

    @torch.no_grad()
    def metrics(self, logp_T: Tensor, old_logp_T: Tensor, advantage_T: Tensor, mask_T: Tensor) -> Metrics:
        """name -> (sum, count) over the mask: share of tokens whose gradient the clip removes, s, and k3."""
        log_ratio_T = log_ratio(logp_T, old_logp_T)
        ratio_T = log_ratio_T.exp()
        high_T = (ratio_T > 1 + self.clip_high) & (advantage_T > 0)
        low_T = (ratio_T < 1 - self.clip_low) & (advantage_T < 0)
        dual_T = (ratio_T > (self.dual_clip or math.inf)) & (advantage_T < 0)
        return {
            "clip_fraction": mean_over(high_T | low_T | dual_T, mask_T),
            "ratio": mean_over(ratio_T, mask_T),
            "update_k3": mean_over(log_ratio_T.expm1() - log_ratio_T, mask_T),
        }


OBJECTIVES = {"ppo": PPO}
