"""What every objective shares: masking, metrics, preparation, and sums and minima over rollouts.

Shapes: T tokens of one micro-batch; sg() stops the gradient.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_jackpot.algorithm.diagnostics import Metrics, mean_over
from megatron_jackpot.algorithm.obrs import LOG_RATIO_LIMIT, check_sampled, log_ratio, precise
from megatron_jackpot.algorithm.scores import Scores, SumOverBatch, Tokens

Anchor = Literal["server", "old"]
ANCHORS = ("server", "old")


@dataclass(frozen=True, kw_only=True)
class Inside:
    """The live log-probs and the constants of a micro-batch, all 0 outside the mask, at least fp32."""

    logp_T: Tensor
    """The only tensor with a gradient."""
    old_logp_T: Tensor
    server_logp_T: Tensor
    advantage_T: Tensor
    segment_T: Tensor
    """-1 outside the mask."""
    valid_T: Tensor
    """The mask without tokens to which the live or the old model gives probability 0."""

    def log_ratio_T(self, anchor: Anchor = "old") -> Tensor:
        """log s = log p - log p_old, or log p - log q for the anchor "server"."""
        return log_ratio(self.logp_T, self.old_logp_T if anchor == "old" else self.server_logp_T)


def inside(logp_T: Tensor, tokens: Tokens) -> Inside:
    """Raises nothing: a NaN inside the mask stays a NaN, so that a broken model shows in the loss."""
    possible_T = (logp_T.detach() != -math.inf) & (tokens.old_logp_T != -math.inf)
    valid_T = tokens.mask_T & possible_T

    def only(value_T: Tensor) -> Tensor:
        return torch.where(valid_T, precise(value_T), 0.0)

    return Inside(
        logp_T=only(logp_T),
        old_logp_T=only(tokens.old_logp_T.detach()),
        server_logp_T=only(tokens.server_logp_T.detach()),
        advantage_T=only(tokens.advantage_T.detach()),
        segment_T=torch.where(valid_T, tokens.segment_T, -1),
        valid_T=valid_T,
    )


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A surrogate per token, to be maximised: loss = -sum keep * weight * surrogate / N.

    A subclass writes `surrogate` and, where it takes gradients away, `removed`.
    """

    @property
    def corrects(self) -> bool:
        """Whether the method carries its own ratio to the server, so that no correction may be added."""
        return False

    def prepare(self, scores: Scores, sum_over_batch: SumOverBatch) -> "Objective":
        """The objective to use on this mini-batch; most need nothing of the whole mini-batch."""
        return self

    def __call__(self, logp_T: Tensor, tokens: Tokens) -> Tensor:
        """The surrogate [T]; gradient flows into logp_T only. 0 without gradient outside the mask."""
        return self.surrogate(inside(logp_T, tokens))

    def surrogate(self, t: Inside) -> Tensor:
        raise NotImplementedError

    def removed(self, t: Inside) -> Tensor:
        """bool [T], tokens whose gradient the method takes away."""
        return torch.zeros_like(t.valid_T)

    @torch.no_grad()
    def metrics(self, logp_T: Tensor, tokens: Tokens) -> Metrics:
        """name -> (sum, count) over the mask: the share of tokens with an advantage whose gradient the method
        takes away, s = p / p_old, and the k3 estimate of KL(old || current)."""
        t = inside(logp_T, tokens)
        log_ratio_T = t.log_ratio_T()
        return {
            "clip_fraction": mean_over(self.removed(t) & (t.advantage_T != 0), t.valid_T),
            "ratio": mean_over(log_ratio_T.exp(), t.valid_T),
            "update_k3": mean_over(log_ratio_T.expm1() - log_ratio_T, t.valid_T),
        }


def clipped(ratio_T: Tensor, advantage_T: Tensor, low: float, high: float, dual: float | None) -> Tensor:
    """min(r A, clip(r, low, high) A), for A < 0 at least dual * A (PPO arXiv 1707.06347; 1912.09729)."""
    surrogate_T = torch.minimum(ratio_T * advantage_T, ratio_T.clamp(low, high) * advantage_T)
    if dual is None:
        return surrogate_T
    return torch.maximum(surrogate_T, torch.where(advantage_T < 0, dual * advantage_T, -math.inf))


def clip_removed(ratio_T: Tensor, advantage_T: Tensor, low: float, high: float, dual: float | None) -> Tensor:
    """bool [T], where `clipped` is flat in r."""
    high_T = (ratio_T > high) & (advantage_T > 0)
    low_T = (ratio_T < low) & (advantage_T < 0)
    dual_T = (ratio_T > (math.inf if dual is None else dual)) & (advantage_T < 0)
    return high_T | low_T | dual_T


def segment_sum(value_T: Tensor, segment_T: Tensor) -> Tensor:
    """The sum over a token's rollout, on each of its tokens, float64; tokens with segment -1 share one
    sum."""
    index_T, num_segments = _slots(segment_T)
    sums = torch.zeros(num_segments, dtype=torch.float64, device=value_T.device)
    return sums.index_add(0, index_T, value_T.double())[index_T]


def segment_mean(value_T: Tensor, t: Inside) -> Tensor:
    """The mean over the valid tokens of a token's rollout, float64; `value_T` is 0 outside the mask."""
    count_T = segment_sum(t.valid_T, t.segment_T).clamp(min=1.0)
    return segment_sum(value_T, t.segment_T) / count_T


def earlier_minimum(log_ratio_T: Tensor, t: Inside) -> Tensor:
    """min over earlier valid tokens of the same rollout, float64; 0 where there are none.

    Tokens of a rollout lie in the order of their positions. One cumulative minimum serves all rollouts: after
    a stable sort each is shifted below everything that the one before it can reach.
    """
    none = LOG_RATIO_LIMIT + 1
    drop = 4 * LOG_RATIO_LIMIT
    sorted_T, order_T = torch.sort(t.segment_T, stable=True)
    offset_T = drop * (sorted_T + 1).double()
    value_T = torch.where(t.valid_T, log_ratio_T.double(), none)[order_T]
    so_far_T = torch.cummin(value_T - offset_T, 0).values + offset_T
    first_T = torch.ones_like(t.valid_T)
    first_T[1:] = sorted_T[1:] != sorted_T[:-1]
    before_T = torch.where(first_T, none, so_far_T.roll(1))
    before_T = torch.where(before_T > LOG_RATIO_LIMIT + 0.5, 0.0, before_T)
    return torch.zeros_like(before_T).index_copy(0, order_T, before_T)


def valid_log_ratio(scores: Scores) -> tuple[Tensor, Tensor]:
    """(log p_target - log q, bool mask without tokens the target cannot produce), [T] of the mini-batch.

    Raises ValueError for a non-finite server log-prob or a NaN target inside the mask.
    """
    valid_T = scores.mask_T & (scores.target_logp_T != -math.inf)
    target_T, server_T = (torch.where(valid_T, x, 0.0) for x in (scores.target_logp_T, scores.server_logp_T))
    check_sampled(target_T, server_T)
    return log_ratio(target_T, server_T), valid_T


def unprepared(name: str) -> RuntimeError:
    return RuntimeError(
        f"Objective '{name}' needs numbers of the whole mini-batch. "
        "Call prepare(scores, sum_over_batch) and use the objective that it returns."
    )


def check_that(ok: bool, name: str, value: float, rule: str, remedy: str) -> None:
    """Raises ValueError with the field, its value, the rule and the remedy unless ok."""
    if not ok:
        raise ValueError(f"{name} = {value}: must {rule}. {remedy}")


def _slots(segment_T: Tensor) -> tuple[Tensor, int]:
    """Segments shifted so that -1 has slot 0, and the number of slots."""
    index_T = segment_T.long() + 1
    return index_T, int(index_T.max()) + 1 if index_T.numel() else 1
