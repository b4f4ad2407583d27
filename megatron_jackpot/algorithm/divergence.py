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
