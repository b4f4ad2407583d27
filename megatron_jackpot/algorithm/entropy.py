"""The top share of tokens by entropy, as a filter (arXiv 2506.01939)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_jackpot.algorithm.diagnostics import least_of_top
from megatron_jackpot.algorithm.importance import Importance, Weights
from megatron_jackpot.algorithm.tokens import SampledLogp, SumOverBatch
from megatron_jackpot.records import Scores


@dataclass(frozen=True, kw_only=True)
class EntropyFilter(Importance):
    """Keeps the tokens at which the target's entropy is among the largest `share` of the mini-batch."""

    share: float = 0.2
    """How many of all tokens are kept; those of one bin (0.08%) together or not, at least one bin."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share = {self.share}: must lie in (0, 1]. Use 0.2.")

    @torch.no_grad()
    def prepare(self, scores: Scores, sum_over_batch: SumOverBatch) -> "PreparedEntropyFilter":
        """The same filter with the least entropy it keeps. Sums over the batch once."""
        mask_MT, entropy_MT = scores.batch.mask_MT, entropy_of(scores)
        masked_MT = torch.where(mask_MT, entropy_MT, 0.0)
        least = least_of_top(masked_MT, mask_MT, self.share, sum_over_batch) if self.share < 1 else -math.inf
        return PreparedEntropyFilter(share=self.share, least=least)

    def weigh(self, logp: SampledLogp, scores: Scores) -> Weights:
        raise RuntimeError("The filter 'entropy' needs the whole mini-batch. Call prepare(...) first.")


@dataclass(frozen=True, kw_only=True)
class PreparedEntropyFilter(EntropyFilter):
    """EntropyFilter with the number of one mini-batch."""

    least: float
    """Entropy in nats from which on a token is kept."""

    def weigh(self, logp: SampledLogp, scores: Scores) -> Weights:
        return torch.ones_like(logp.server), entropy_of(scores) >= self.least, {}


def entropy_of(scores: Scores) -> Tensor:
    """The target's entropy [M, T]. Raises ValueError where the scores have none."""
    if scores.entropy_MT is None:
        raise ValueError("scores.entropy_MT = None: must hold the target's entropy. Score with entropy=True.")
    return scores.entropy_MT
