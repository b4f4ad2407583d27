"""What every correction is: a frozen dataclass from scores to (keep, weight, count), and what it declares.

Shapes: M micro-batches of T tokens, K candidates. Everything is detached.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_jackpot.algorithm.diagnostics import mean_over
from megatron_jackpot.algorithm.divergence import candidate_kl
from megatron_jackpot.algorithm.tokens import SumOverBatch
from megatron_jackpot.records import Correction, Metrics, Scores


@dataclass(frozen=True, kw_only=True)
class CorrectionMethod:
    """Base of every correction: policy loss = -sum keep * weight * surrogate / N, N the global sum of what
    counts (algorithm/aggregation.py knows other sums).

    Fields are the keys under `algorithm.correction` in YAML, checks stand in `__post_init__`, the formula in
    `__call__`, which ends with `corrected`.
    """

    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    """`algorithm.correction.preset` -> settings; "paper" where none is named. Empty: the method has no
    presets."""
    seeded: ClassVar[bool] = False
    """Whether it has a field `seed`, which is run.seed where YAML has none."""
    corrects: ClassVar[bool] = True
    """False where nothing corrects for the server, so that an objective may carry its own ratio to it."""
    denominator: ClassVar[str] = "all"
    """Which tokens count in N; a field of methods that can leave removed ones out."""
    lam: ClassVar[float] = 1.0
    """Accept with min(1, p_target / (lam q)); a field of methods that accept."""
    target_acceptance: ClassVar[float | None] = None
    """Mean acceptance that lam is steered to, one batch behind; a field of methods that can be steered."""

    @property
    def needs_exact_overlap(self) -> bool:
        """Whether scores must hold Z over the whole vocabulary at `lam`."""
        return False

    def __call__(self, scores: Scores, sum_over_batch: SumOverBatch) -> Correction:
        """Every rank of the mini-batch calls it, and `sum_over_batch` equally often."""
        raise NotImplementedError


def corrected(
    scores: Scores, *, keep: Tensor, weight: Tensor, counted: Tensor, accept: Tensor, metrics: Metrics
) -> Correction:
    """The Correction of decisions [M, T]: which tokens stay, their weight, their share of the denominator,
    and the probability with which each was to stay. Weights of removed tokens become 0. What is counted or
    accepted outside the mask is ignored."""
    mask = scores.batch.mask_MT
    kl = candidate_kl(scores.candidate_target_logp_MTK, scores.candidate_server_logp_MTK)
    return Correction(
        keep_MT=keep,
        weight_MT=torch.where(keep, weight, 0.0),
        counted_MT=torch.where(mask, counted, 0).double(),
        accept_MT=torch.where(mask, accept, 0),
        kl=mean_over(kl, mask),
        metrics=metrics,
    )
