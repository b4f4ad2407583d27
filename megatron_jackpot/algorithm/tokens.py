"""Which tokens can be trained on, and sums over the tokens of one rollout.

Shapes: any leading shape [...], the same for all arguments of a call; tokens of one rollout share a segment.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_jackpot.algorithm.obrs import check_sampled
from megatron_jackpot.records import Scores

SumOverBatch = Callable[[Tensor], Tensor]
"""Sums a tensor over every DP x CP rank of the mini-batch; the identity on one rank. Every rank must call it
equally often."""
NumberAlike = Callable[[Tensor], tuple[Tensor, int]]
"""From ids [..., k] to (the number of each [...], how many numbers there are), the same on every DP x CP rank
of the mini-batch, whatever ids it holds itself. Every rank must call it equally often."""


def trainable(mask: Tensor, *logp: Tensor) -> Tensor:
    """bool [...]: response tokens with a server log-prob to which no model of `logp` gives probability 0.

    A NaN counts as a log-prob: a broken model shows in what is computed from it, or is refused.
    """
    for one in logp:
        mask = mask & (one != -math.inf)
    return mask


@dataclass(frozen=True, kw_only=True)
class SampledLogp:
    """Checked log-probs [...] of the sampled tokens, 0 outside the mask."""

    policy: Tensor
    target: Tensor
    server: Tensor
    valid: Tensor
    """bool, tokens that can be trained on."""


def sampled_logp(s: Scores) -> SampledLogp:
    """Raises ValueError for a non-finite server log-prob or a NaN of policy or target inside the mask."""
    mask = s.batch.mask_MT
    three = (s.policy_logp_MT, s.target_logp_MT, s.batch.server_logp_MT)
    policy, target, server = (torch.where(mask, logp, 0.0) for logp in three)
    check_sampled(torch.stack([policy, target]), server)
    return SampledLogp(policy=policy, target=target, server=server, valid=trainable(mask, policy, target))


def segment_reduce(
    value: Tensor, mask: Tensor, segment: Tensor, how: Literal["sum", "max"] = "sum"
) -> Tensor:
    """The sum (float64) or maximum of `value` over the masked tokens of each token's segment, on every token.

    Segments count from 0, -1 is padding, whose tokens share one result. The sum over nothing is 0, the
    maximum -inf. Tokens are added in their order, whatever the shape, so that no packing changes a bit.
    """
    index = segment.flatten().long() + 1
    size = int(index.max()) + 1 if index.numel() else 1
    if how == "max":
        masked = torch.where(mask, value, -math.inf).flatten()
        result = masked.new_full((size,), -math.inf).scatter_reduce(0, index, masked, "amax")
    else:
        masked = torch.where(mask, value.double(), 0.0).flatten()
        result = masked.new_zeros(size).index_add(0, index, masked)
    return result[index].view(segment.shape)


def segment_mean(value: Tensor, mask: Tensor, segment: Tensor) -> Tensor:
    """The mean over the masked tokens of each token's segment, float64; 0 over nothing."""
    count = segment_reduce(mask, mask, segment)
    return segment_reduce(value, mask, segment) / count.clamp(min=1.0)
