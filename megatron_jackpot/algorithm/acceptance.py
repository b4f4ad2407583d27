"""The lam at which OBRS accepts a wanted share of the tokens."""

import math

import torch
from torch import Tensor

from megatron_jackpot.algorithm.scores import SumOverBatch

LAM_MIN, LAM_MAX = 0.2, 5.0
"""Bounds of lam where it is steered."""

NUM_BINS = 4096
"""Of log r between the bounds: width .0008, which puts the acceptance off by at most a quarter of that."""
RATIO_UNIT = 2.0**-26
"""r is rounded to a multiple of this, so that float64 sums are exact in any order and over any split."""


def lambda_for_acceptance(
    log_ratio: Tensor,
    mask: Tensor,
    acceptance: float,
    sum_over_batch: SumOverBatch,
    *,
    lam_min: float = LAM_MIN,
    lam_max: float = LAM_MAX,
    fallback: float = 1.0,
) -> tuple[float, bool]:
    """(lam, reachable) with E[min(1, r / lam)] = acceptance over the tokens [...] in the mask of all ranks.

    `log_ratio` is log(p_target / q) at the sampled tokens, which do not depend on lam. The mean falls with
    lam: where it is below `acceptance` at lam_min, or above at lam_max, that bound and False; `fallback` and
    False where no token counts. The same on every rank. Calls `sum_over_batch` once, with [2, bins] float64.
    Raises ValueError for an acceptance outside (0, 1), unordered bounds or a NaN inside the mask.
    """
    check_acceptance(acceptance)
    check_bounds("lam", lam_min, lam_max)
    low, high = math.log(lam_min), math.log(lam_max)
    count, total = sum_over_batch(_histogram(log_ratio, mask, low, high)).cpu().unbind()
    num_tokens = count.sum().item()
    if num_tokens == 0:
        return fallback, False

    def mean_accept(log_lam: float) -> float:
        return torch.minimum(count, total / math.exp(log_lam)).sum().item() / num_tokens

    if mean_accept(low) < acceptance:
        return lam_min, False
    if mean_accept(high) > acceptance:
        return lam_max, False
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_accept(middle) > acceptance else (low, middle)
    return min(max(math.exp(high), lam_min), lam_max), True


def check_acceptance(acceptance: float) -> None:
    if not 0 < acceptance < 1:
        raise ValueError(f"acceptance = {acceptance}: must lie in (0, 1). Use 0.9.")


def check_bounds(name: str, low: float, high: float) -> None:
    if not 0 < low < high < math.inf:
        raise ValueError(
            f"{name}_min = {low}, {name}_max = {high}: must be 0 < min < max < inf. Leave them out."
        )


def _histogram(log_ratio: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    """Number of tokens and sum of r per bin of log r, [2, bins + 2]: below `low` first, above `high` last.

    A bin adds min(count, sum / lam) to the acceptance: exact unless lam lies inside the bin.
    """
    log_r_T = torch.where(mask, log_ratio.detach().double(), 0.0).flatten()
    if torch.isnan(log_r_T).any():
        raise ValueError("log_ratio = nan: must be a number in the mask. Mask the token at the source.")
    bin_T = ((log_r_T - low) * (NUM_BINS / (high - low))).floor().clamp(-1, NUM_BINS).long() + 1
    r_T = (log_r_T.exp() / RATIO_UNIT).round() * RATIO_UNIT
    mask_T = mask.flatten().double()
    sums = torch.zeros(2, NUM_BINS + 2, dtype=torch.float64, device=log_r_T.device)
    return sums.index_add_(1, bin_T, torch.stack([mask_T, mask_T * r_T]))
