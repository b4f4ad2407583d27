"""The two losses of a step, as closures that Megatron's schedules call once per micro-batch on the last stage."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_jackpot.algorithm.obrs import log_ratio
from megatron_jackpot.algorithm.scores import Correction, Scores
from megatron_jackpot.batch import Batch
from megatron_jackpot.config import Actor
from megatron_jackpot.models.engine import Loss
from megatron_jackpot.parallel.vocab import vocab_parallel_logp

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


def policy_loss(
    mini: Batch, scores: Scores, correction: Correction, denominator: float, objective: Objective, vocab: dict
) -> Loss:
    """-sum keep * weight * surrogate / N, Eq. 5; p_current is live, everything else is a constant.

    `denominator` is N over the whole mini-batch: DP x CP ranks and micro-batches.
    """
    shape = mini.tokens_MT.shape
    old_MT, keep_MT = scores.policy_logp_T.view(shape), correction.keep_T.view(shape)
    weight_MT = correction.weight_T.view(shape)

    def loss(logits_TV: Tensor, m: int) -> tuple[Tensor, dict[str, Tensor]]:
        logp_T = vocab_parallel_logp(logits_TV, mini.labels_MT[m], **vocab)
        surrogate_T = objective(logp_T, old_MT[m], mini.advantage_MT[m])
        value = -torch.where(keep_MT[m], weight_MT[m] * surrogate_T, 0.0).sum() / denominator
        return value, {"policy": value.detach()}

    return loss


def actor_loss(
    mini: Batch,
    teacher: Scores,
    knobs: Actor,
    distill: Any,
    denominator: float,
    objective: Objective,
    vocab: dict,
) -> Loss:
    """PPO on the same samples, weighted by min(p_actor_old/q, C), plus lambda_distill times distillation, Eq. 6-8.

    All valid tokens count: the actor's samples are its own, nothing is rejected.
    """
    shape = mini.tokens_MT.shape
    old_MT, policy_MT = teacher.actor_logp_T.view(shape), teacher.policy_logp_T.view(shape)
    weight_MT = log_ratio(old_MT, mini.server_logp_MT).exp().clamp(max=knobs.tis_cap)

    def loss(logits_TV: Tensor, m: int) -> tuple[Tensor, dict[str, Tensor]]:
        logp_T = vocab_parallel_logp(logits_TV, mini.labels_MT[m], **vocab)
        surrogate_T = weight_MT[m] * objective(logp_T, old_MT[m], mini.advantage_MT[m])
        mask_T = mini.mask_MT[m]
        rl = -torch.where(mask_T, surrogate_T, 0.0).sum() / denominator
        kl = torch.where(mask_T, distill(logp_T, policy_MT[m]), 0.0).sum() / denominator
        value = knobs.rl_weight * rl + knobs.distill_weight * kl
        return value, {"actor": value.detach(), "actor_rl": rl.detach(), "distill": kl.detach()}

    return loss
