"""What a mini-batch says about the gap between server, actor and policy: sums and counts.

Shapes: T tokens of this rank's mini-batch, K candidates. Every value is (sum, count), float64 scalars of
this rank; the mean is sum / count after both were summed over all ranks.
log rho = log p - log q with the server's q.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_jackpot.algorithm.obrs import log_ratio, masked_sum, precise
from megatron_jackpot.algorithm.scores import Correction, Scores

Metrics = dict[str, tuple[Tensor, Tensor]]

REST_FLOOR = 1e-6
"""Least mass of the bucket of all ids outside the candidates: below it fp32 sums are rounding."""


@torch.no_grad()
def diagnostics(scores: Scores, correction: Correction) -> Metrics:
    """name -> (sum, count); the ESS ratio is weight/mean ** 2 / weight/mean_square.

    kl/server_{policy,actor}_k1 = -log rho and _k3 = rho - 1 - log rho estimate KL(server || model);
    {policy,actor,server}/log_ppl is the mean -log p; policy/chi2 = E_q[rho^2] - 1; gap/a_b is the mean
    |log p_a - log p_b|; kl/target_server is `candidate_kl`; rejected/{positive,negative,correct,wrong} the
    share of tokens with such an advantage or verdict that keep removes.
    """
    s, mask_T = scores, _finite(scores)
    logp_T = {"policy": s.policy_logp_T, "actor": s.actor_logp_T, "server": s.server_logp_T}
    metrics: Metrics = {}
    for model in ("policy", "actor"):
        log_rho_T = log_ratio(logp_T[model], logp_T["server"])
        metrics[f"kl/server_{model}_k1"] = mean_over(-log_rho_T, mask_T)
        metrics[f"kl/server_{model}_k3"] = mean_over(log_rho_T.expm1() - log_rho_T, mask_T)
    rho_T = log_ratio(s.policy_logp_T, s.server_logp_T).double().exp()
    metrics["policy/chi2"] = mean_over(rho_T.square() - 1, mask_T)
    for model, value_T in logp_T.items():
        metrics[f"{model}/log_ppl"] = mean_over(-value_T, mask_T)
    for a, b in (("policy", "actor"), ("policy", "server"), ("actor", "server")):
        metrics[f"gap/{a}_{b}"] = mean_over((logp_T[a] - logp_T[b]).abs(), mask_T)
    used_T = torch.where(correction.keep_T, correction.weight_T, 0.0).double()
    metrics["weight/mean"] = mean_over(used_T, s.mask_T)
    metrics["weight/mean_square"] = mean_over(used_T.square(), s.mask_T)
    rejected_T = ~correction.keep_T
    metrics["rejected/positive"] = mean_over(rejected_T, s.mask_T & (s.advantage_T > 0))
    metrics["rejected/negative"] = mean_over(rejected_T, s.mask_T & (s.advantage_T < 0))
    metrics["rejected/correct"] = mean_over(rejected_T, s.mask_T & s.correct_T)
    metrics["rejected/wrong"] = mean_over(rejected_T, s.mask_T & ~s.correct_T)
    kl_T = candidate_kl(s.candidate_target_logp_TK, s.candidate_server_logp_TK)
    metrics["kl/target_server"] = mean_over(kl_T, s.mask_T)
    return metrics


def candidate_kl(target_logp_TK: Tensor, server_logp_TK: Tensor) -> Tensor:
    """KL(p_target || q) over the candidates with a known q plus one bucket for all other ids, [T].

    A lower bound of the KL over the whole vocabulary (data processing inequality).
    """
    log_p_TB, log_q_TB = _with_rest(target_logp_TK, server_logp_TK)
    return _kl(log_p_TB, log_q_TB)


def candidate_kl_after(target_logp_TK: Tensor, server_logp_TK: Tensor, lam: float) -> Tensor:
    """KL(p_target || q') with q' = min(q, p_target / lam) / Z, over the same buckets as `candidate_kl`, [T].

    Never larger than `candidate_kl`: it is OBRS on the bucketed distributions.
    """
    log_p_TB, log_q_TB = _with_rest(target_logp_TK, server_logp_TK)
    log_kept_TB = torch.minimum(log_q_TB, log_p_TB - math.log(lam))
    return _kl(log_p_TB, log_kept_TB - log_kept_TB.logsumexp(-1, keepdim=True))


def global_quantiles(
    value_T: Tensor, mask_T: Tensor, levels: Sequence[float], sum_over_batch: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Quantiles over the whole mini-batch of values in [0, 1], rounded up to a multiple of 1/1000.

    Calls `sum_over_batch` once, with a histogram of 1000 bins.
    """
    bins = 1000
    index_T = (torch.where(mask_T, value_T, 0.0) * bins).ceil().long().clamp(1, bins) - 1
    histogram = torch.zeros(bins, dtype=torch.float64, device=value_T.device)
    cumulative = running_sum(sum_over_batch(histogram.index_add_(0, index_T, mask_T.double())))
    wanted = cumulative[-1] * torch.tensor(levels, dtype=torch.float64, device=value_T.device)
    edge = (torch.searchsorted(cumulative, wanted).double() + 1) / bins
    return list(edge.unbind())


def running_sum(histogram: Tensor) -> Tensor:
    """Sums over the first dimension up to each entry; on the CPU, since CUDA's order of such sums is not
    fixed."""
    return histogram.cpu().cumsum(0).to(histogram.device)


def mean_over(value_T: Tensor, mask_T: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of value over the mask, size of the mask), float64 scalars."""
    return masked_sum(value_T, mask_T), mask_T.double().sum()


def _finite(s: Scores) -> Tensor:
    """Masked tokens to which policy and actor both give a log-prob; ids outside a vocabulary have -inf."""
    return s.mask_T & torch.isfinite(s.policy_logp_T) & torch.isfinite(s.actor_logp_T)


def _with_rest(target_logp_TK: Tensor, server_logp_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of target and server over the candidates with a known q and, last, the bucket of the rest."""
    target_TK, server_TK = precise(target_logp_TK), precise(server_logp_TK)
    target_TK = target_TK.masked_fill(server_TK == -math.inf, -math.inf)
    both = (target_TK, server_TK)
    rest = [(1 - logp.exp().sum(-1, keepdim=True)).clamp(min=REST_FLOOR).log() for logp in both]
    return torch.cat([target_TK, rest[0]], -1), torch.cat([server_TK, rest[1]], -1)


def _kl(log_p_TB: Tensor, log_q_TB: Tensor) -> Tensor:
    terms_TB = log_p_TB.exp() * (log_p_TB - log_q_TB)
    return torch.where(log_p_TB > -math.inf, terms_TB, 0.0).sum(-1)
