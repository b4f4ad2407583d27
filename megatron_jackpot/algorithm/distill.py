"""Distillation of the policy (teacher, detached) into the actor (live) on the rollout tokens.

Shapes: T tokens of a micro-batch, K candidate ids per token. A method returns the per-token loss [T], to be
minimised; gradient flows into the actor's log-probs only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from megatron_jackpot.algorithm.divergence import candidate_kl, k3
from megatron_jackpot.algorithm.obrs import LOG_RATIO_LIMIT, log_ratio
from megatron_jackpot.algorithm.registry import Registry
from megatron_jackpot.records import Direction, DistillInputs, Scores


def distill_inputs(
    logp_TK: Tensor, scores: Scores, m: int, kl: Callable[[Direction], Tensor]
) -> DistillInputs:
    """What a distillation may look at in micro-batch m: `logp_TK` [T, 1 + K] is the live actor's at the
    sampled token and, of a method that needs them, at the candidates."""
    num_candidates = logp_TK.shape[1] - 1
    return DistillInputs(
        actor_logp_T=logp_TK[:, 0],
        policy_logp_T=scores.policy_logp_MT[m],
        actor_logp_TK=logp_TK[:, 1:],
        policy_logp_TK=scores.candidate_target_logp_MTK[m][:, :num_candidates],
        kl=kl,
    )


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Base of every distillation: fields are the keys under `actor.distill` in YAML."""

    needs: ClassVar[Literal["sampled", "candidates", "logits"]] = "sampled"
    """What of DistillInputs it reads beside the sampled tokens: nothing, the candidates, or `kl`, for which
    the policy's last hidden states are kept."""

    def __call__(self, t: DistillInputs) -> Tensor:
        """Loss [T]."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class K3Sample(Distillation):
    """e^d - d - 1, d = log p_policy - log p_actor at the sampled token (P Eq. 8; the public verl fork).

    On samples of the actor the value estimates KL(actor || policy), and the gradient (1 - e^d) grad log
    p_actor that of KL(policy || actor). Both limits end the gradient where they are reached.
    """

    limit: float = 10.0
    """Largest loss of one token."""

    def __post_init__(self) -> None:
        if not 0 < self.limit <= LOG_RATIO_LIMIT:
            raise ValueError(f"limit = {self.limit}: must lie in (0, {LOG_RATIO_LIMIT}]. Use 10.")

    def __call__(self, t: DistillInputs) -> Tensor:
        d_T = log_ratio(t.policy_logp_T.detach(), t.actor_logp_T)
        return k3(d_T).clamp(-self.limit, self.limit)


@dataclass(frozen=True, kw_only=True)
class ForwardTopK(Distillation):
    """KL(policy || actor) over the candidates plus one bucket for all other ids.

    A lower bound of the KL over the vocabulary (data processing inequality), equal to it where the candidates
    cover the vocabulary. The bucket's mass 1 - sum is at least 1e-6: less is rounding, and has no gradient.
    """

    needs = "candidates"

    def __call__(self, t: DistillInputs) -> Tensor:
        """-inf in both models is padding; an id to which one gives -inf belongs to the rest."""
        both_TK = (t.policy_logp_TK.detach(), t.actor_logp_TK)
        unknown_TK = (both_TK[0] == -math.inf) | (both_TK[1] == -math.inf)
        return candidate_kl(*(logp_TK.masked_fill(unknown_TK, -math.inf) for logp_TK in both_TK))


@dataclass(frozen=True, kw_only=True)
class _Full(Distillation):
    """The exact divergence over the vocabulary, at most `limit` per token."""

    needs = "logits"
    direction: ClassVar[Direction] = "forward"

    limit: float | None = None
    """Largest loss of one token, without gradient where it is reached; null has none."""

    def __post_init__(self) -> None:
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"limit = {self.limit}: must be > 0 or null. Use null.")

    def __call__(self, t: DistillInputs) -> Tensor:
        kl_T = t.kl(self.direction)
        return kl_T if self.limit is None else kl_T.clamp(max=self.limit)


@dataclass(frozen=True, kw_only=True)
class ForwardFull(_Full):
    """KL(policy || actor) over the vocabulary: the actor covers what the policy does."""


@dataclass(frozen=True, kw_only=True)
class ReverseFull(_Full):
    """KL(actor || policy) over the vocabulary: the actor leaves what the policy would not do."""

    direction = "reverse"


DISTILL = Registry(
    Distillation,
    {
        "k3_sample": K3Sample,
        "forward_topk": ForwardTopK,
        "forward_full": ForwardFull,
        "reverse_full": ReverseFull,
    },
)
