"""What a mini-batch says about the gap between policy, actor (where there is one) and server: sums, counts.

Shapes: M micro-batches of T tokens. Every value is (sum, count), float64 scalars of
this rank; the mean is sum / count after both were summed over all ranks.
log rho = log p - log q with the server's q.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_jackpot.algorithm.divergence import k3
from megatron_jackpot.algorithm.obrs import LOG_RATIO_LIMIT, log_ratio, masked_sum
from megatron_jackpot.algorithm.tokens import SumOverBatch, segment_reduce, trainable
from megatron_jackpot.records import Batch, Correction, Metrics, Pair, Scores

TOP_EDGES = 1 << 15
"""Of bins from 1e-6 to 1e5, each 0.08% wide."""


@torch.no_grad()
def diagnostics(scores: Scores, correction: Correction, sum_over_batch: SumOverBatch) -> Metrics:
    """name -> (sum, count); the ESS ratio is weight/mean ** 2 / weight/mean_square.

    kl/server_{policy,actor}_k1 = -log rho and _k3 = rho - 1 - log rho estimate KL(server || model);
    {policy,actor,server}/log_ppl is the mean -log p, policy/entropy the target's over its vocabulary;
    policy/chi2 = E_q[rho^2] - 1; gap/a_b is the mean |log p_a - log p_b|; kl/target_server is the
    correction's `kl`; rejected/{positive,negative,correct,wrong} the share of tokens with such an advantage
    or verdict that keep removes. By response: policy/chi2_sequence is the mean (product of rho)^2 - 1,
    policy/ppl_ratio the mean exp(-mean log rho). weight/max and weight/min are of kept tokens. Sums over the
    batch once.
    """
    s, batch, mask_MT = scores, scores.batch, scores.batch.mask_MT
    models = {"policy": s.policy_logp_MT}
    if s.actor_logp_MT is not None:
        models["actor"] = s.actor_logp_MT
    known_MT = trainable(mask_MT, *models.values())
    logp = {**models, "server": batch.server_logp_MT}
    log_rho = {model: log_ratio(logp[model], logp["server"]) for model in models}
    of_known: dict[str, Tensor] = {}
    for model, log_rho_MT in log_rho.items():
        of_known[f"kl/server_{model}_k1"] = -log_rho_MT
        of_known[f"kl/server_{model}_k3"] = k3(log_rho_MT)
    of_known |= {f"{model}/log_ppl": -value for model, value in logp.items()}
    for a, b in itertools.combinations(logp, 2):
        of_known[f"gap/{a}_{b}"] = (logp[a] - logp[b]).abs()
    metrics = means_over(of_known, known_MT)
    chi2_MT = log_rho["policy"].double().exp().square() - 1
    metrics["policy/chi2"] = mean_over(chi2_MT, known_MT)
    metrics |= _of_responses(log_rho["policy"], known_MT, batch.segment_MT)
    if s.entropy_MT is not None:
        metrics["policy/entropy"] = mean_over(s.entropy_MT, mask_MT)
    used_MT = torch.where(correction.keep_MT, correction.weight_MT, 0.0).double()
    metrics |= means_over({"weight/mean": used_MT, "weight/mean_square": used_MT.square()}, mask_MT)
    metrics |= _extremes(correction.weight_MT, correction.keep_MT, sum_over_batch)
    metrics |= _rejected(correction.keep_MT, batch)
    metrics["kl/target_server"] = correction.kl
    return metrics


def _rejected(keep_MT: Tensor, batch: Batch) -> Metrics:
    """The share of the tokens that keep removes, by the sign of their advantage and by their verdict."""
    right_MT, advantage_MT = batch.correct_MT, batch.advantage_MT
    kinds = dict(positive=advantage_MT > 0, negative=advantage_MT < 0, correct=right_MT, wrong=~right_MT)
    kind_4MT = torch.stack(list(kinds.values())) & batch.mask_MT
    removed_4, count_4 = (
        one_4MT.sum((1, 2), dtype=torch.float64) for one_4MT in (kind_4MT & ~keep_MT, kind_4MT)
    )
    return {f"rejected/{kind}": (removed_4[i], count_4[i]) for i, kind in enumerate(kinds)}


def _of_responses(log_rho_MT: Tensor, mask_MT: Tensor, segment_MT: Tensor) -> Metrics:
    """Each response counts once, by its tokens in the mask."""
    share_MT = 1 / segment_reduce(mask_MT, mask_MT, segment_MT).clamp(min=1.0)
    total_MT = segment_reduce(log_rho_MT, mask_MT, segment_MT)
    # The logarithm of a product is clamped as that of a token's ratio.
    chi2_MT = (2 * total_MT.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)).exp() - 1
    number = masked_sum(share_MT, mask_MT)
    return {
        "policy/chi2_sequence": (masked_sum(chi2_MT * share_MT, mask_MT), number),
        "policy/ppl_ratio": (masked_sum((-total_MT * share_MT).exp() * share_MT, mask_MT), number),
    }


def _extremes(weight_MT: Tensor, keep_MT: Tensor, sum_over_batch: SumOverBatch) -> Metrics:
    """Largest and least weight of kept tokens over the whole mini-batch: edges of bins 1% wide, the largest
    rounded up, the least down. Sums over the batch once: a histogram."""
    edges = torch.linspace(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, 4096, dtype=torch.float64).to(weight_MT.device)
    index = torch.bucketize(torch.where(keep_MT, weight_MT, 1.0).double().log(), edges).flatten()
    histogram = torch.zeros(len(edges) + 1, dtype=torch.float64, device=edges.device)
    found = sum_over_batch(histogram.index_add_(0, index, keep_MT.flatten().double())).nonzero()[:, 0]
    one = torch.ones([], dtype=torch.float64, device=edges.device)
    if not len(found):
        return {"weight/max": (0 * one, 0 * one), "weight/min": (0 * one, 0 * one)}
    last = len(edges) - 1
    return {
        "weight/max": (edges[found[-1].clamp(max=last)].exp(), one),
        "weight/min": (edges[(found[0] - 1).clamp(min=0)].exp(), one),
    }


def global_quantiles(
    value: Tensor, mask: Tensor, levels: Sequence[float], sum_over_batch: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Quantiles over the whole mini-batch of values in [0, 1], rounded up to a multiple of 1/1000.

    Calls `sum_over_batch` once, with a histogram of 1000 bins.
    """
    bins = 1000
    index = (torch.where(mask, value, 0.0) * bins).ceil().long().clamp(1, bins) - 1
    histogram = torch.zeros(bins, dtype=torch.float64, device=value.device)
    cumulative = running_sum(
        sum_over_batch(histogram.index_add_(0, index.flatten(), mask.flatten().double()))
    )
    wanted = cumulative[-1] * torch.tensor(levels, dtype=torch.float64, device=value.device)
    edge = (torch.searchsorted(cumulative, wanted).double() + 1) / bins
    return list(edge.unbind())


def least_of_top(
    value: Tensor, mask: Tensor, share: float, sum_over_batch: Callable[[Tensor], Tensor]
) -> float:
    """From which value on the tokens are the top `share` of the whole mini-batch: at most so many, but at
    least the highest bin (each 0.08% wide, its tokens together); inf where no value reaches 1e-6.

    Calls `sum_over_batch` once, with a histogram.
    """
    edges = torch.logspace(-6, 5, TOP_EDGES, dtype=torch.float64, device=value.device)
    bin_N = torch.bucketize(value.flatten(), edges, right=True)
    histogram = torch.zeros(len(edges) + 1, dtype=torch.float64, device=edges.device)
    histogram = sum_over_batch(histogram.index_add_(0, bin_N, mask.flatten().double()))
    from_here_up = running_sum(histogram.flip(0)).flip(0)
    most = max(1.0, share * float(from_here_up[0]))
    # Bin i + 1 begins at edge i; values below the first edge are never among the top.
    first = int((from_here_up[1:] > most).sum())
    if first < len(edges) and from_here_up[1 + first] == 0:
        first = max(first - 1, 0)  # Where the highest bin holds more than that, it is taken whole.
    return float(edges[first]) if first < len(edges) else math.inf


def running_sum(histogram: Tensor) -> Tensor:
    """Sums over the first dimension up to each entry; on the CPU, since CUDA's order of such sums is not
    fixed."""
    return histogram.cpu().cumsum(0).to(histogram.device)


def mean_over(value: Tensor, mask: Tensor) -> Pair:
    """(sum of value over the mask, size of the mask), float64 scalars."""
    return masked_sum(value, mask), mask.sum(dtype=torch.float64)


def by_tokens(value: Tensor, mask: Tensor) -> Pair:
    """A number of the whole mini-batch as a metric, scalar or [M, 1]: each mini-batch weighs as its tokens
    do, so that one without any says nothing."""
    return mean_over(value.expand_as(mask), mask)


def means_over(values: Mapping[str, Tensor], mask: Tensor) -> Metrics:
    """`mean_over` of each, of the mask's shape, at once: on a GPU every operation on one is a launch. Whole
    numbers below 2^24 and truths stay exact; one in float64 makes all of them so."""
    stacked = torch.stack([one if one.is_floating_point() else one.float() for one in values.values()])
    sums = torch.where(mask, stacked, 0).flatten(1).sum(1, dtype=torch.float64)
    count = mask.sum(dtype=torch.float64)
    return {name: (total, count) for name, total in zip(values, sums.unbind(), strict=True)}
