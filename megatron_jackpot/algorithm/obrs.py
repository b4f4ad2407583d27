"""Optimal budgeted rejection sampling (OBRS) token by token: accept probability, normaliser Z, weight, draws.

Shapes: any leading shape, written [...]; K candidate ids per token, V the whole vocabulary, 3 the parts of a
rollout id. Inputs are log-probs, natural logarithm; results are at least fp32 (fp64 stays fp64).
Sources: P = arXiv 2602.06107, V = arXiv 2311.00460 (OBRS), R = the paper's public verl fork.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +- this before any exp."""

LAM_MIN, LAM_MAX = 0.2, 5.0
"""Bounds of lam where it is steered."""

NUM_BINS = 4096
"""Of log r between the bounds: width .0008, which puts the acceptance off by at most a quarter of that."""
RATIO_UNIT = 2.0**-26
"""r is rounded to a multiple of this, so that float64 sums are exact in any order and over any split."""
_ROUNDING = 1e-6
"""Of the mean acceptance: rounding of r and of 1 / lam; an acceptance this near a bound's is reachable."""

ClipOrder = Literal["after_z", "before_z"]


def accept_prob(target_logp: Tensor, server_logp: Tensor, lam: float) -> Tensor:
    """a = min(1, p_target / (lam * q)) of the sampled token, [...] (P Eq. 3; V Theorem 2).

    Exactly 0 where the target cannot produce the token (log-prob -inf). What is not a number stays one: see
    `check_sampled`. Raises ValueError for lam <= 0.
    """
    check_lam(lam)
    accept = (log_ratio(target_logp, server_logp) - math.log(lam)).clamp(max=0.0).exp()
    return torch.where(target_logp == -math.inf, 0.0, accept)


def overlap_mass(target_logp_K: Tensor, server_logp_K: Tensor, lam: float) -> Tensor:
    """Z_k = sum over candidates of min(q, p_target / lam), [..., K] -> [...] (P 4.4.1); padding is -inf.

    A lower bound of Z = E_q[a]; at most min(1, 1/lam). Raises ValueError for lam <= 0 or a NaN.
    """
    check_lam(lam)
    target, server = precise(target_logp_K), precise(server_logp_K)
    overlap = torch.minimum(server, target - math.log(lam)).exp().sum(-1)
    if torch.isnan(overlap).any():
        raise ValueError(
            "candidate log-probs contain NaN: must be numbers or -inf. Mask such tokens at the source."
        )
    return overlap.clamp(max=overlap_limit(lam))


def exact_overlap_mass(target_logp_V: Tensor, server_logp_V: Tensor, lam: float) -> Tensor:
    """Z = sum over the vocabulary of min(q, p_target / lam) = E_q[a], [..., V] -> [...] (P 4.4).

    Both inputs are normalised log-probs over the same ids. At lam = 1, Z = 1 - TV(p_target, q).
    Raises ValueError for lam <= 0 or a NaN.
    """
    return overlap_mass(target_logp_V, server_logp_V, lam)


def overlap_limit(lam: float) -> float:
    """Largest possible Z: min(1, 1/lam)."""
    return min(1.0, 1.0 / lam)


def kappa(
    accept: Tensor, overlap: Tensor, mask: Tensor, sum_over_batch: Callable[[Tensor], Tensor]
) -> Tensor:
    """kappa = (accepted / proposed) / mean(Z_k) over the global mini-batch, float64 scalar (P 4.4.2).

    `accept` [...] is the drawn mask (paper) or the accept probability (half the noise), `overlap` [...] is
    Z_k, `mask` [...] the tokens that count; proposed cancels. Calls `sum_over_batch` once, with [2] float64.
    1 when no overlap was found anywhere.
    """
    sums = [masked_sum(accept, mask), masked_sum(overlap, mask)]
    accepted, total_overlap = sum_over_batch(torch.stack(sums)).unbind()
    return torch.where(total_overlap > 0, accepted / total_overlap, 1.0)


def tail_correction(
    accept: Tensor,
    sampled_is_candidate: Tensor,
    target_logp_K: Tensor,
    server_logp_K: Tensor,
    overlap: Tensor,
    lam: float,
    mask: Tensor,
    sum_over_batch: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """(Z_k + eta B [...], eta float64 scalar), B = min(Q', P'/lam) the most that the ids outside can add.

    Q' = 1 - sum q and P' = 1 - sum p over the candidates [..., K] whose q is known; eta = sum of a over
    sampled tokens that are no such candidate / sum B over the global mini-batch, clipped to [0, 1]. `overlap`
    [...] is Z_k, `accept` [...] the accept probability, `mask` [...] the tokens that count.
    Calls `sum_over_batch` once, with [2] float64. eta is 0 where nothing is outside anywhere.
    """
    check_lam(lam)
    server = precise(server_logp_K)
    target = precise(target_logp_K).masked_fill(server == -math.inf, -math.inf)
    rest_q, rest_p = ((1 - logp.exp().sum(-1)).clamp(min=0.0) for logp in (server, target))
    bound = torch.minimum(rest_q, rest_p / lam)
    sums = [masked_sum(accept, mask & ~sampled_is_candidate), masked_sum(bound, mask)]
    outside, total_bound = sum_over_batch(torch.stack(sums)).unbind()
    eta = torch.where(total_bound > 0, outside / total_bound, 0.0).clamp(0.0, 1.0)
    return (overlap + eta * bound).to(overlap).clamp(max=overlap_limit(lam)), eta


def jackpot_weight(
    target_logp: Tensor,
    server_logp: Tensor,
    overlap: Tensor,
    lam: float,
    cap: float,
    clip_order: ClipOrder = "after_z",
) -> Tensor:
    """p_target / q' of an accepted token, capped and detached, [...]; r = p_target / q.

    after_z (P Alg. 1 line 24): min(Z * max(lam, r), cap).  before_z (R): lam * Z * clip(r / lam, 1, cap).
    `overlap` is Z [...]. Raises ValueError for lam <= 0, cap < 1 or an unknown order.
    """
    check_lam(lam)
    check_cap("cap", cap)
    log_scaled = (log_ratio(target_logp, server_logp) - math.log(lam)).clamp(min=0.0)
    if clip_order == "after_z":
        return (lam * overlap * log_scaled.exp()).clamp(max=cap).detach()
    if clip_order == "before_z":
        return (lam * overlap * log_scaled.exp().clamp(max=cap)).detach()
    raise ValueError(
        f"clip_order = {clip_order!r}: must be 'after_z' or 'before_z'. Use 'after_z' for the paper."
    )


def drift_weight(policy_logp: Tensor, target_logp: Tensor, policy_cap: float) -> Tensor:
    """min(p_old / p_target, c2), detached, [...]: 2nd factor of P Alg. 1 line 24; 1 for the target "old"."""
    check_cap("policy_cap", policy_cap)
    return log_ratio(policy_logp, target_logp).exp().clamp(max=policy_cap).detach()


def lambda_for_acceptance(
    log_ratio: Tensor,
    mask: Tensor,
    acceptance: float,
    sum_over_batch: Callable[[Tensor], Tensor],
    *,
    lam_min: float = LAM_MIN,
    lam_max: float = LAM_MAX,
    fallback: float = 1.0,
) -> float:
    """lam with E[min(1, r / lam)] = acceptance over the tokens [...] in the mask of all ranks.

    `log_ratio` is log(p_target / q) at the sampled tokens, which do not depend on lam. The mean falls with
    lam: where it is below `acceptance` at lam_min, or above at lam_max, that bound; `fallback` where no token
    counts. The same on every rank. Calls `sum_over_batch` once, with [2, bins] float64.
    Raises ValueError for an acceptance outside (0, 1), unordered bounds or a NaN inside the mask.
    """
    check_acceptance(acceptance)
    check_bounds("lam", lam_min, lam_max)
    low, high = math.log(lam_min), math.log(lam_max)
    count, total = sum_over_batch(_histogram(log_ratio, mask, low, high)).cpu().unbind()
    num_tokens = count.sum().item()
    if num_tokens == 0:
        return fallback

    def mean_accept(log_lam: float) -> float:
        return torch.minimum(count, total / math.exp(log_lam)).sum().item() / num_tokens

    if mean_accept(low) < acceptance - _ROUNDING:
        return lam_min
    if mean_accept(high) > acceptance + _ROUNDING:
        return lam_max
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_accept(middle) > acceptance else (low, middle)
    return min(max(math.exp(high), lam_min), lam_max)


def draw_keep(accept: Tensor, seed: int, step: int, rollout_id: Tensor, position: Tensor) -> Tensor:
    """keep ~ Bernoulli(accept), bool [...]: accept 1 always keeps, accept 0 never does.

    A function of (seed, step, rollout_id [..., 3], position [...]) alone: the same on every layout and
    packing.
    """
    return counter_uniform(seed, step, rollout_id, position) < accept


def counter_uniform(seed: int, step: int, rollout_id_T3: Tensor, position_T: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) with 24 bits, fp32 [...], bit-identical on CPU and CUDA.

    Philox-4x32-10 (Salmon et al. 2011) with counter (position, sample, prompt id, epoch) and as key two words
    of Philox applied to (seed, step). Every part counts by its low 32 bits, seed and step by 64.
    """
    key = _philox((seed & _WORD, seed >> 32 & _WORD, step & _WORD, step >> 32 & _WORD), (0, 0))[:2]
    epoch_T, prompt_T, sample_T = (part & _WORD for part in rollout_id_T3.long().unbind(-1))
    word_T = torch.as_tensor(_philox((position_T.long() & _WORD, sample_T, prompt_T, epoch_T), key)[0])
    return (word_T >> 8).to(torch.float32) * 2.0**-24


def log_ratio(numerator_logp: Tensor, denominator_logp: Tensor) -> Tensor:
    """log(p / q) clamped to +-LOG_RATIO_LIMIT, at least fp32."""
    return (precise(numerator_logp) - precise(denominator_logp)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def precise(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 where it already is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def masked_sum(value: Tensor, mask: Tensor) -> Tensor:
    """Sum of value [...] where mask [...], float64 scalar; what lies outside the mask may be NaN."""
    return torch.where(mask, value, 0).sum(dtype=torch.float64)


def check_lam(lam: float) -> None:
    if not (math.isfinite(lam) and lam > 0):
        raise ValueError(f"lam = {lam}: must be a finite number > 0. Use 1.0, the paper's value.")


def check_cap(name: str, cap: float) -> None:
    if not cap >= 1:
        raise ValueError(f"{name} = {cap}: must be >= 1. Use .inf to switch the cap off.")


def check_acceptance(acceptance: float) -> None:
    if not 0 < acceptance < 1:
        raise ValueError(f"acceptance = {acceptance}: must lie in (0, 1). Use 0.9.")


def check_bounds(name: str, low: float, high: float) -> None:
    if not 0 < low < high < math.inf:
        raise ValueError(
            f"{name}_min = {low}, {name}_max = {high}: must be 0 < min < max < inf. Leave them out."
        )


def check_sampled(target_logp: Tensor, server_logp: Tensor) -> None:
    """A sampled token has a finite server log-prob, and target log-probs that are numbers or -inf.

    Raises ValueError; the device is waited for once. Callers of a mini-batch check it once (tokens.py).
    """
    strange = ~torch.isfinite(server_logp)
    broken = torch.isnan(target_logp) | (target_logp == math.inf)
    if not bool(strange.any() | broken.any()):
        return
    if strange.any():
        worst = server_logp[strange].flatten()[0].item()
        raise ValueError(
            f"server_logp = {worst}: must be finite at a sampled token. Mask the token at the source."
        )
    raise ValueError(
        "target_logp = nan or inf: must be a number or -inf. The target model's logits are broken."
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


Word = int | Tensor
_WORD = 0xFFFFFFFF


def _multiply(constant: int, word: Word) -> tuple[Word, Word]:
    """(high, low) 32-bit words of constant * word, for a constant of 32 bits whose first is 1.

    Less 2^32 it is negative and above -2^31, so that its product stays within int64; the word counts once
    more in the high half. Few operations: on a GPU each is a launch.
    """
    product = (constant - 2**32) * word
    return (product >> 32) + word, product & _WORD


def _philox(counter: tuple[Word, ...], key: tuple[Word, ...]) -> tuple[Word, ...]:
    """Philox-4x32-10 of four counter words and two key words; Python ints and int64 tensors alike."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3
