"""Divergences between two models at candidate ids, and the one estimator from samples.

Shapes: any leading shape [...], K candidate ids per token, B = K + 1 buckets: the candidates and all other
ids.
"""

import math

import torch
from torch import Tensor

from megatron_jackpot.algorithm.obrs import precise

REST_FLOOR = 1e-6
"""Least mass of the bucket of all ids outside the candidates: below it fp32 sums are rounding."""
P_FLOOR = 1e-12
"""Least probability that a divergence from an anchor divides by."""


def k3(log_ratio: Tensor) -> Tensor:
    """e^d - d - 1 of d = log p - log q at samples of q: estimates KL(q || p), never negative (Schulman
    2020)."""
    return log_ratio.expm1() - log_ratio


def candidate_kl(target_logp_K: Tensor, server_logp_K: Tensor) -> Tensor:
    """KL(p_target || q) over the candidates with a known q plus one bucket for all other ids, [..., K] ->
    [...].

    A lower bound of the KL over the whole vocabulary (data processing inequality).
    """
    return _kl(*with_rest(target_logp_K, server_logp_K))


def candidate_kl_after(target_logp_K: Tensor, server_logp_K: Tensor, lam: float) -> Tensor:
    """KL(p_target || q') with q' = min(q, p_target / lam) / Z, over the same buckets as `candidate_kl`,
    [...].

    Never larger than `candidate_kl`: it is OBRS on the bucketed distributions.
    """
    log_p_B, log_q_B = with_rest(target_logp_K, server_logp_K)
    log_kept_B = torch.minimum(log_q_B, log_p_B - math.log(lam))
    return _kl(log_p_B, log_kept_B - log_kept_B.logsumexp(-1, keepdim=True))


def sampled_tv(logp: Tensor, anchor_logp: Tensor, logp_K: Tensor, anchor_logp_K: Tensor) -> Tensor:
    """Total variation of two models over the sampled token, the candidates beside it with a known anchor and
    one bucket for all other ids: [...] and [..., K] -> [...].

    At most that over the whole vocabulary, |p - q| of the sampled token at K = 0 (arXiv 2602.04879).
    """
    log_p_B, log_q_B = _with_sampled(logp, anchor_logp, logp_K, anchor_logp_K)
    return (log_p_B.exp() - log_q_B.exp()).abs().sum(-1) / 2


def sampled_kl(logp: Tensor, anchor_logp: Tensor, logp_K: Tensor, anchor_logp_K: Tensor) -> Tensor:
    """KL(anchor || p) over the buckets of `sampled_tv`, [...]; p counts as at least P_FLOOR in each."""
    log_p_B, log_q_B = _with_sampled(logp, anchor_logp, logp_K, anchor_logp_K)
    return _kl(log_q_B, log_p_B.clamp(min=math.log(P_FLOOR)))


def _with_sampled(
    logp: Tensor, anchor_logp: Tensor, logp_K: Tensor, anchor_logp_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probs of both over the sampled token, the candidates and the rest, float64 [..., K + 2]."""
    both = ((logp, logp_K), (anchor_logp, anchor_logp_K))
    return with_rest(*(torch.cat([own[..., None], own_K], -1).double() for own, own_K in both))


def with_rest(target_logp_K: Tensor, server_logp_K: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of target and server over the candidates with a known q and, last, the bucket of the rest."""
    target_K, server_K = precise(target_logp_K), precise(server_logp_K)
    target_K = target_K.masked_fill(server_K == -math.inf, -math.inf)
    return torch.cat([target_K, log_rest(target_K)], -1), torch.cat([server_K, log_rest(server_K)], -1)


def log_rest(logp_K: Tensor) -> Tensor:
    """Log of the mass outside the candidates, [..., 1], at least log REST_FLOOR; -inf is no candidate."""
    return (1 - logp_K.exp().sum(-1, keepdim=True)).clamp(min=REST_FLOOR).log()


def _kl(log_p_B: Tensor, log_q_B: Tensor) -> Tensor:
    terms_B = log_p_B.exp() * (log_p_B - log_q_B)
    return torch.where(log_p_B > -math.inf, terms_B, 0.0).sum(-1)
