"""What a correction sees and what it returns.

Shapes: T tokens of this rank's mini-batch (all micro-batches flattened, prompt and padding positions included
and masked out), K candidate ids per token. Everything here is detached: gradients live only in objectives.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_jackpot.algorithm.obrs import check_sampled

SumOverBatch = Callable[[Tensor], Tensor]
"""Sums a tensor over every DP x CP rank of the mini-batch; the identity on one rank. Every rank must call it
equally often."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Log-probs of one mini-batch from the no-grad scoring pass."""

    policy_logp_T: Tensor
    """log p_old of the sampled token: policy_old, the policy at the start of the step."""
    target_logp_T: Tensor
    """log p_target of the sampled token: equal to policy_logp_T when the target is "old"."""
    actor_logp_T: Tensor
    """log-prob of the sampled token under the trainer's copy of the actor, before its update."""
    server_logp_T: Tensor
    """log q of the sampled token: the server's own number, the proposal."""
    mask_T: Tensor
    """bool, response tokens with a finite server log-prob."""
    segment_T: Tensor
    """int64, which rollout a token belongs to, 0 .. S-1 on this rank; -1 on padding."""
    rollout_id_T3: Tensor
    """int64 [T, 3], (epoch, prompt id, sample): keys of the random draws."""
    position_T: Tensor
    """int64, position of the token in its sequence: key of the random draws."""
    advantage_T: Tensor
    """float32, the rollout's advantage on each of its tokens."""
    correct_T: Tensor
    """bool, the rollout's verdict on each of its tokens."""
    token_T: Tensor
    """int64, the sampled token."""
    microbatch_T: Tensor
    """int64, which micro-batch of this rank a token lies in."""
    candidate_ids_TK: Tensor
    """int64, server top-k union policy top-k; -1 is padding. The sampled token is never added."""
    candidate_target_logp_TK: Tensor
    """log p_target at the candidates, -inf on padding."""
    candidate_server_logp_TK: Tensor
    """log q at the candidates: the server's top-k, the actor's capped log-prob at policy-only ids; -inf
    otherwise."""
    candidate_shared_TK: Tensor
    """bool, ids in both the server's and the policy's top-k."""
    exact_overlap_T: Tensor | None = None
    """Z over the whole vocabulary, q being the actor's log-probs; only where a correction asks for it."""
    step: int
    """Number of the optimizer step's batch: key of the random draws."""


@dataclass(frozen=True, kw_only=True)
class SampledLogp:
    """Checked log-probs of the sampled tokens, 0 outside the mask."""

    policy_T: Tensor
    target_T: Tensor
    server_T: Tensor
    possible_T: Tensor
    """The mask without tokens to which policy or target give probability 0: they cannot be trained on."""


def sampled_logp(s: Scores) -> SampledLogp:
    """Raises ValueError for a non-finite server log-prob or a NaN of policy or target inside the mask."""
    three = (s.policy_logp_T, s.target_logp_T, s.server_logp_T)
    policy_T, target_T, server_T = (torch.where(s.mask_T, logp_T, 0.0) for logp_T in three)
    check_sampled(policy_T, server_T)
    check_sampled(target_T, server_T)
    possible_T = s.mask_T & (policy_T > -math.inf) & (target_T > -math.inf)
    return SampledLogp(policy_T=policy_T, target_T=target_T, server_T=server_T, possible_T=possible_T)


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What the loss of a mini-batch needs: policy loss = -sum keep * weight * surrogate / denominator."""

    keep_T: Tensor
    """bool, False removes the token from the numerator."""
    weight_T: Tensor
    """float32, detached; finite everywhere."""
    count: Tensor
    """float64 scalar, this rank's contribution to the denominator N (summed over DP x CP by the caller)."""
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """name -> (sum, count) on this rank; divided once, after a global sum."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The constants of one micro-batch beside the live log-probs: what an objective may look at.

    A rollout never spans two micro-batches, so sums over a segment are complete.
    """

    old_logp_T: Tensor
    """log p_old of the sampled token: the model that is trained, at the start of the step."""
    server_logp_T: Tensor
    """log q of the sampled token."""
    advantage_T: Tensor
    """The rollout's advantage on each of its tokens."""
    mask_T: Tensor
    """bool, the tokens that count."""
    segment_T: Tensor
    """int64, which rollout of this rank a token belongs to; -1 on padding."""
