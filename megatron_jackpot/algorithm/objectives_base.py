"""What every objective shares: masking, metrics, preparation, and sums and minima over rollouts.

Shapes: M micro-batches of T tokens; sg() stops the gradient.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_jackpot.algorithm.diagnostics import mean_over
from megatron_jackpot.algorithm.divergence import k3
from megatron_jackpot.algorithm.obrs import LOG_RATIO_LIMIT, log_ratio, precise
from megatron_jackpot.algorithm.tokens import NumberAlike, SumOverBatch, sampled_logp, trainable
from megatron_jackpot.records import Batch, Metrics, ObjectiveInputs, Scores

Anchor = Literal["server", "old"]

ZERO_LOGP = -1e4
"""Stands for log 0 in what a rollout's other tokens are told: far beyond the clamp of log-ratios, and their
product with an advantage of 0 is 0."""


AtCandidates = tuple[Tensor, Tensor, Tensor, Tensor]
"""Constants at the candidates of a micro-batch, [T, K] each: ids, -1 being padding, and log-probs under the
live policy, the target and the server."""


def at_candidates(scores: Scores, m: int, logp_TK: Tensor) -> AtCandidates:
    """Those of micro-batch m, where the live policy has log-probs `logp_TK`."""
    known = (scores.candidate_target_logp_MTK[m], scores.candidate_server_logp_MTK[m])
    return scores.candidate_ids_MTK[m], logp_TK.detach(), known[0].detach(), known[1].detach()


def objective_inputs(
    logp_T: Tensor,
    old_logp_T: Tensor,
    batch: Batch,
    m: int,
    *,
    candidates: AtCandidates | None = None,
    reference_logp_T: Tensor | None = None,
) -> ObjectiveInputs:
    """What an objective may look at in micro-batch m: live log-probs, those at the start of the step,
    constants; candidates and the reference where it needs them.

    Raises nothing: a NaN inside the mask stays a NaN, so that a broken model shows in the loss.
    """
    counted_T = batch.mask_MT[m]
    valid_T = trainable(counted_T, logp_T.detach(), old_logp_T)

    def only(value_T: Tensor) -> Tensor:
        return torch.where(counted_T, precise(value_T), 0.0)

    def logarithm(value_T: Tensor) -> Tensor:
        return torch.where(value_T == -math.inf, ZERO_LOGP, only(value_T))

    none_TK = logp_T.detach().new_empty(len(logp_T), 0)
    ids_TK, *at_ids = candidates or (none_TK.long(), none_TK, none_TK, none_TK)
    other_TK = counted_T[:, None] & (ids_TK >= 0) & (ids_TK != batch.labels_MT[m][:, None])
    at_others = [torch.where(other_TK, precise(known_TK), -math.inf) for known_TK in at_ids]
    return ObjectiveInputs(
        candidate_logp_TK=at_others[0],
        candidate_old_logp_TK=at_others[1],
        candidate_server_logp_TK=at_others[2],
        logp_T=torch.where(valid_T, only(logp_T), logarithm(logp_T.detach())),
        old_logp_T=logarithm(old_logp_T.detach()),
        server_logp_T=only(batch.server_logp_MT[m].detach()),
        reference_logp_T=(
            torch.zeros_like(logp_T.detach()) if reference_logp_T is None else logarithm(reference_logp_T)
        ),
        advantage_T=torch.where(valid_T, precise(batch.advantage_MT[m].detach()), 0.0),
        segment_T=torch.where(counted_T, batch.segment_MT[m], -1),
        rollout_id_T3=torch.where(counted_T.unsqueeze(-1), batch.rollout_id_MT3[m], 0),
        position_T=torch.where(counted_T, batch.position_MT[m], 0),
        valid_T=valid_T,
    )


def ratio_to(t: ObjectiveInputs, anchor: Anchor = "old") -> Tensor:
    """log s = log p - log p_old, or log p - log q for the anchor "server", [T]; clamped, live."""
    return log_ratio(t.logp_T, t.old_logp_T if anchor == "old" else t.server_logp_T)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A surrogate per token, to be maximised: loss = -sum keep * weight * surrogate / N.

    A subclass writes `surrogate` and, where it takes gradients away, `removed`.
    """

    @property
    def corrects(self) -> bool:
        """Whether the method carries its own ratio to the server, or holds for any law of it, so that no
        correction may be added."""
        return False

    @property
    def needs_candidates(self) -> bool:
        """Whether the method looks at the log-probs of the candidates, which the update reads with the
        sampled token's."""
        return False

    @property
    def needs_reference(self) -> bool:
        """Whether the method looks at the frozen reference, which `policy.reference` names."""
        return False

    def prepare(self, scores: Scores, sum_over_batch: SumOverBatch, number_alike: NumberAlike) -> "Objective":
        """The objective to use on this mini-batch; most need nothing of the whole mini-batch."""
        return self

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        """[T]; gradient flows into t.logp_T only. 0 without gradient outside t.valid_T."""
        raise NotImplementedError

    def removed(self, t: ObjectiveInputs) -> Tensor:
        """bool [T], tokens whose gradient the method takes away."""
        return torch.zeros_like(t.valid_T)

    @torch.no_grad()
    def metrics(self, t: ObjectiveInputs) -> Metrics:
        """name -> (sum, count) over the valid tokens: the share with an advantage whose gradient the method
        takes away, s = p / p_old, and the k3 estimate of KL(old || current)."""
        log_ratio_T = ratio_to(t)
        return {
            "clip_fraction": mean_over(self.removed(t) & (t.advantage_T != 0), t.valid_T),
            "ratio": mean_over(log_ratio_T.exp(), t.valid_T),
            "update_k3": mean_over(k3(log_ratio_T), t.valid_T),
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


def earlier_minimum(log_ratio_T: Tensor, t: ObjectiveInputs) -> Tensor:
    """min over earlier counted tokens of the same rollout, float64; 0 where there are none.

    Tokens of a rollout lie in the order of their positions. One cumulative minimum serves all rollouts: after
    a stable sort each is shifted below everything that the one before it can reach.
    """
    none = LOG_RATIO_LIMIT + 1
    drop = 4 * LOG_RATIO_LIMIT
    sorted_T, order_T = torch.sort(t.segment_T, stable=True)
    offset_T = drop * (sorted_T + 1).double()
    value_T = torch.where(t.counted_T, log_ratio_T.double(), none)[order_T]
    so_far_T = torch.cummin(value_T - offset_T, 0).values + offset_T
    first_T = torch.ones_like(t.counted_T)
    first_T[1:] = sorted_T[1:] != sorted_T[:-1]
    before_T = torch.where(first_T, none, so_far_T.roll(1))
    before_T = torch.where(before_T > LOG_RATIO_LIMIT + 0.5, 0.0, before_T)
    return torch.zeros_like(before_T).index_copy(0, order_T, before_T)


def masked_log_ratio(scores: Scores) -> tuple[Tensor, Tensor]:
    """(log p_target - log q, bool mask), [M, T] of the mini-batch; p = 0 has the least that the clamp allows.

    Raises ValueError for a non-finite server log-prob or a NaN of a model inside the mask.
    """
    logp = sampled_logp(scores)
    return log_ratio(logp.target, logp.server), scores.batch.mask_MT


def unprepared(name: str) -> RuntimeError:
    return RuntimeError(
        f"Objective '{name}' needs numbers of the whole mini-batch. "
        "Call prepare(scores, sum_over_batch) and use the objective that it returns."
    )


def knobs_of(method: Objective, public: type) -> dict[str, Any]:
    """The settings of a method, for the one that is prepared from it."""
    return {item.name: getattr(method, item.name) for item in fields(public)}


def constants(numbers: dict[str, float], like: Tensor) -> Metrics:
    """Numbers as (sum, count) with count 1."""
    made = {name: torch.tensor([value, 1.0], dtype=torch.float64) for name, value in numbers.items()}
    moved = {name: pair.to(like.device) for name, pair in made.items()}
    return {name: (pair[0], pair[1]) for name, pair in moved.items()}


def check_that(ok: bool, name: str, value: float, rule: str, remedy: str) -> None:
    """Raises ValueError with the field, its value, the rule and the remedy unless ok."""
    if not ok:
        raise ValueError(f"{name} = {value}: must {rule}. {remedy}")
