"""Distillation of the policy (teacher, detached) into the actor (live) on the rollout tokens.

Shapes: T tokens, K candidate ids per token. A method returns the per-token loss [T], to be minimised.
`needs` says what it is called with. "sampled": log-probs of the sampled token, (actor [T], policy [T]).
"candidates": log-probs at the same candidate ids, (actor [T, K], policy [T, K]). "logits": (kl [T]), the
exact divergence in the method's `direction`, computed from both models' logits by parallel/divergence.py.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_jackpot.algorithm.diagnostics import REST_FLOOR
from megatron_jackpot.algorithm.obrs import LOG_RATIO_LIMIT, log_ratio, precise


@dataclass(frozen=True, kw_only=True)
class K3Sample:
    """e^d - d - 1, d = log p_policy - log p_actor at the sampled token (P Eq. 8; the public verl fork).

    On samples of the actor the value estimates KL(actor || policy), and the gradient (1 - e^d) grad log
    p_actor that of KL(policy || actor). Both limits end the gradient where they are reached.
    """

    needs: ClassVar[str] = "sampled"

    limit: float = 10.0
    """Largest loss of one token."""

    def __post_init__(self) -> None:
        if not 0 < self.limit <= LOG_RATIO_LIMIT:
            raise ValueError(f"limit = {self.limit}: must lie in (0, {LOG_RATIO_LIMIT}]. Use 10.")

    def __call__(self, actor_logp_T: Tensor, policy_logp_T: Tensor) -> Tensor:
        """Loss [T]; gradient flows into actor_logp_T only."""
        d_T = log_ratio(policy_logp_T.detach(), actor_logp_T)
        return (d_T.expm1() - d_T).clamp(-self.limit, self.limit)


@dataclass(frozen=True, kw_only=True)
class ForwardTopK:
    """KL(policy || actor) over the candidates plus one bucket for all other ids.

    A lower bound of the KL over the vocabulary (data processing inequality), equal to it where the candidates
    cover the vocabulary. The bucket's mass 1 - sum is at least 1e-6: less is rounding, and has no gradient.
    """

    needs: ClassVar[str] = "candidates"

    def __call__(self, actor_logp_TK: Tensor, policy_logp_TK: Tensor) -> Tensor:
        """Loss [T]; gradient flows into actor_logp_TK only.

        -inf in both is padding; an id to which one model gives -inf belongs to the bucket of the others.
        """
        actor_TK, policy_TK = precise(actor_logp_TK), precise(policy_logp_TK.detach())
        known_TK = (actor_TK > -math.inf) & (policy_TK > -math.inf)
        terms_TK = policy_TK.exp() * (policy_TK - actor_TK)
        actor_rest_T, policy_rest_T = (_log_rest(logp_TK, known_TK) for logp_TK in (actor_TK, policy_TK))
        rest_T = policy_rest_T.exp() * (policy_rest_T - actor_rest_T)
        return torch.where(known_TK, terms_TK, 0.0).sum(-1) + rest_T


@dataclass(frozen=True, kw_only=True)
class _Full:
    """The exact divergence over the vocabulary, at most `limit` per token."""

    needs: ClassVar[str] = "logits"

    limit: float | None = None
    """Largest loss of one token, without gradient where it is reached; null has none."""

    def __post_init__(self) -> None:
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"limit = {self.limit}: must be > 0 or null. Use null.")

    def __call__(self, kl_T: Tensor) -> Tensor:
        """Loss [T] from the live divergence in the method's direction."""
        return kl_T if self.limit is None else kl_T.clamp(max=self.limit)


@dataclass(frozen=True, kw_only=True)
class ForwardFull(_Full):
    """KL(policy || actor) over the vocabulary: the actor covers what the policy does."""

    direction: ClassVar[str] = "forward"


@dataclass(frozen=True, kw_only=True)
class ReverseFull(_Full):
    """KL(actor || policy) over the vocabulary: the actor leaves what the policy would not do."""

    direction: ClassVar[str] = "reverse"


DISTILL = {
    "k3_sample": K3Sample,
    "forward_topk": ForwardTopK,
    "forward_full": ForwardFull,
    "reverse_full": ReverseFull,
}


def _log_rest(logp_TK: Tensor, known_TK: Tensor) -> Tensor:
    """Log of the mass outside the known candidates, [T], at least log REST_FLOOR."""
    covered_T = torch.where(known_TK, logp_TK.exp(), 0.0).sum(-1)
    return (1 - covered_T).clamp(min=REST_FLOOR).log()
