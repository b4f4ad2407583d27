"""How the terms of a mini-batch's tokens become one loss, and N: docs/objectives.md, "Aggregation".

policy loss = -sum keep * weight * loss_weight * share * surrogate / N. c is what a token counts by the
correction's `denominator`: 1, whether it is kept, or its accept probability; C its sum over a response or a
prompt. Rollouts that a selector prunes and N counts all the same (`pruned_MP4`) count each of their tokens.
Shapes: M micro-batches of T tokens, P pruned rollouts, G prompts of the mini-batch.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_jackpot.algorithm.registry import Registry
from megatron_jackpot.algorithm.tokens import NumberAlike, SumOverBatch, segment_reduce
from megatron_jackpot.records import Aggregated, Batch, Correction


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """Base of every aggregation. Fields are the keys under `algorithm.aggregation` in YAML."""

    counts_all: ClassVar[bool] = False
    """Whether it has a meaning only where N counts removed tokens too: `denominator: all`."""

    @torch.no_grad()
    def __call__(
        self,
        batch: Batch,
        correction: Correction,
        sum_over_batch: SumOverBatch,
        number_alike: NumberAlike,
    ) -> Aggregated:
        """Every rank of the mini-batch calls it, and what it is given equally often."""
        share_MT, count = self.shares(batch, correction.counted_MT, sum_over_batch, number_alike)
        weight_MT = correction.weight_MT * batch.loss_weight_MT
        if share_MT is not None:
            weight_MT = torch.where(correction.keep_MT, weight_MT * share_MT, 0.0).float()
        return Aggregated(keep_MT=correction.keep_MT, weight_MT=weight_MT, count=count)

    def shares(
        self, batch: Batch, counted_MT: Tensor, sum_over_batch: SumOverBatch, number_alike: NumberAlike
    ) -> tuple[Tensor | None, Tensor]:
        """(share of each token, float64 [M, T]; this rank's part of N, float64 scalar); no share is 1."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TokenMean(Aggregation):
    """The mean over all tokens of the mini-batch, a long response weighs more (DAPO, arXiv 2503.14476)."""

    def shares(
        self, batch: Batch, counted_MT: Tensor, sum_over_batch: SumOverBatch, number_alike: NumberAlike
    ) -> tuple[Tensor | None, Tensor]:
        return None, counted_MT.sum() + batch.pruned_MP4[..., 2].sum()


@dataclass(frozen=True, kw_only=True)
class SequenceMean(Aggregation):
    """The mean over responses of each one's token mean (GRPO, arXiv 2402.03300; GSPO, 2507.18071).

    Responses without a token that counts are left out of both.
    """

    def shares(
        self, batch: Batch, counted_MT: Tensor, sum_over_batch: SumOverBatch, number_alike: NumberAlike
    ) -> tuple[Tensor | None, Tensor]:
        share_MT = _inverse(segment_reduce(counted_MT, batch.mask_MT, batch.segment_MT))
        return share_MT, (share_MT * counted_MT).sum() + _num_pruned(batch)


@dataclass(frozen=True, kw_only=True)
class ConstantLength(Aggregation):
    """The mean over responses of each one's sum over `length` (Dr. GRPO, arXiv 2503.20783)."""

    counts_all: ClassVar[bool] = True

    length: int
    """What each response's sum is divided by, whatever its length; Dr. GRPO has rollout.max_new_tokens."""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length = {self.length}: must be >= 1. Use rollout.max_new_tokens.")

    def shares(
        self, batch: Batch, counted_MT: Tensor, sum_over_batch: SumOverBatch, number_alike: NumberAlike
    ) -> tuple[Tensor | None, Tensor]:
        own_MT = segment_reduce(counted_MT, batch.mask_MT, batch.segment_MT)
        responses = (_inverse(own_MT) * counted_MT).sum() + _num_pruned(batch)
        return torch.full_like(own_MT, 1 / self.length), responses


@dataclass(frozen=True, kw_only=True)
class PromptMean(Aggregation):
    """The mean over prompts of the token mean of each one's responses: every prompt weighs the same.

    Prompts without a token that counts are left out of both.
    """

    def shares(
        self, batch: Batch, counted_MT: Tensor, sum_over_batch: SumOverBatch, number_alike: NumberAlike
    ) -> tuple[Tensor | None, Tensor]:
        """Asks `number_alike` once, and for the sum of [G] float64 once: a prompt's responses may lie on
        several ranks."""
        ids, pruned_N4 = batch.rollout_id_MT3[..., :2], batch.pruned_MP4.flatten(0, 1)
        index_N, num = number_alike(torch.cat([ids.flatten(0, 1), pruned_N4[:, :2]]))
        counted_N = torch.cat([counted_MT.flatten(), pruned_N4[:, 2].to(counted_MT)])
        own_G = counted_MT.new_zeros(num).index_add(0, index_N, counted_N)
        share_N = _inverse(sum_over_batch(own_G))[index_N]
        share_MT = share_N[: counted_MT.numel()].view(counted_MT.shape)
        return share_MT, (share_N * counted_N).sum()


AGGREGATIONS = Registry(
    Aggregation,
    {"token": TokenMean, "sequence": SequenceMean, "constant": ConstantLength, "prompt": PromptMean},
)


def _num_pruned(batch: Batch) -> Tensor:
    """Pruned rollouts with a token that counts."""
    return (batch.pruned_MP4[..., 2] > 0).sum()


def _inverse(total: Tensor) -> Tensor:
    """1 / total, 0 where it is 0."""
    return torch.where(total > 0, 1 / total.clamp(min=1e-300), 0.0)
