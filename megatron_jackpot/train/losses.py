"""The two losses of a step, as closures that Megatron's schedules call once per micro-batch on the last
stage."""

from typing import Any

import torch
from torch import Tensor

from megatron_jackpot.algorithm.obrs import log_ratio
from megatron_jackpot.algorithm.scores import Correction, Scores, Tokens
from megatron_jackpot.config import Actor
from megatron_jackpot.models.engine import Loss
from megatron_jackpot.models.head import FrozenHead
from megatron_jackpot.parallel.divergence import vocab_parallel_kl
from megatron_jackpot.parallel.linear import Logits
from megatron_jackpot.parallel.vocab import vocab_parallel_logp, vocab_parallel_logp_at
from megatron_jackpot.parallel.vocab_spec import VocabSpec
from megatron_jackpot.records import Batch
from megatron_jackpot.train.methods import Methods

TRAINED_GAP = "gap/trained_scored"
"""Mean |log s|, s = trained / scored probability: not 0 before the first update only where the numerics
moved."""


def policy_loss(
    mini: Batch, scores: Scores, correction: Correction, denominator: float, objective: Any, vocab: VocabSpec
) -> Loss:
    """-sum keep * weight * surrogate / N, Eq. 5; p_current is live, everything else is a constant.

    `objective` is prepared; `denominator` is N over the whole mini-batch: DP x CP ranks and micro-batches.
    """
    shape = mini.tokens_MT.shape
    old_MT, keep_MT = scores.policy_logp_T.view(shape), correction.keep_T.view(shape)
    weight_MT = correction.weight_T.view(shape)

    def loss(logits_TV: Logits, m: int) -> tuple[Tensor, dict[str, Tensor]]:
        logp_T = vocab_parallel_logp(logits_TV, mini.labels_MT[m], vocab)
        tokens = tokens_of(mini, old_MT, m)
        surrogate_T = objective(logp_T, tokens)
        value = -torch.where(keep_MT[m], weight_MT[m] * surrogate_T, 0.0).sum() / denominator
        measured = objective.metrics(logp_T.detach(), tokens)
        mask_T = mini.mask_MT[m]
        gap_T = torch.where(mask_T, (logp_T.detach() - old_MT[m]).abs(), 0.0)
        return value, {
            "policy": value.detach(),
            TRAINED_GAP: torch.stack([gap_T.sum(), mask_T.sum()]),
            **{f"objective/{name}": torch.stack(pair) for name, pair in measured.items()},
        }

    return loss


def actor_loss(
    mini: Batch,
    scores: Scores,
    knobs: Actor,
    methods: Methods,
    denominator: float,
    vocab: VocabSpec,
    teacher: FrozenHead | None,
) -> Loss:
    """PPO on the same samples, weighted by min(p_actor_old/q, C), plus lambda_distill times distillation, Eq.
    6-8.

    All valid tokens count: the actor's samples are its own, nothing is rejected. `teacher` has the policy's
    logits of this mini-batch, for a distillation over the whole vocabulary.
    """
    shape = mini.tokens_MT.shape
    old_MT = scores.actor_logp_T.view(shape)
    weight_MT = log_ratio(old_MT, mini.server_logp_MT).exp().clamp(max=knobs.tis_cap)
    distill_weight = methods.distill_weight

    candidates_MTK = None
    if methods.distill.needs == "candidates":
        candidates_MTK = scores.candidate_ids_TK.unflatten(0, shape)

    def loss(logits_TV: Logits, m: int) -> tuple[Tensor, dict[str, Tensor]]:
        ids_TK = mini.labels_MT[m][:, None]
        if candidates_MTK is not None:
            # Asked together: one read of the logits forward, one backward.
            ids_TK = torch.cat([ids_TK, candidates_MTK[m]], dim=-1)
        logp_TK = vocab_parallel_logp_at(logits_TV, ids_TK, vocab)
        logp_T, candidates_TK = logp_TK[:, 0], logp_TK[:, 1:]
        mask_T = mini.mask_MT[m]
        surrogate_T = methods.actor_objective(logp_T, tokens_of(mini, old_MT, m))
        rl = -torch.where(mask_T, weight_MT[m] * surrogate_T, 0.0).sum() / denominator
        distilled_T = distillation(
            methods.distill, mini, scores, teacher, vocab, logits_TV, logp_T, candidates_TK, m
        )
        kl = torch.where(mask_T, distilled_T, 0.0).sum() / denominator
        value = knobs.rl_weight * rl + distill_weight * kl
        return value, {"actor": value.detach(), "actor_rl": rl.detach(), "distill": kl.detach()}

    return loss


def distillation(
    method: Any,
    mini: Batch,
    scores: Scores,
    teacher: FrozenHead | None,
    vocab: VocabSpec,
    logits_TV: Logits,
    logp_T: Tensor,
    candidates_TK: Tensor,
    m: int,
) -> Tensor:
    """Loss [T] of `method` on micro-batch m, fed with what it needs: see algorithm/distill.py."""
    shape = mini.tokens_MT.shape
    if method.needs == "sampled":
        return method(logp_T, scores.policy_logp_T.view(shape)[m])
    if method.needs == "candidates":
        return method(candidates_TK, scores.candidate_target_logp_TK.unflatten(0, shape)[m])
    assert teacher is not None, "the scorer keeps the policy's head where distillation needs logits"
    common = teacher.common(vocab)
    return method(vocab_parallel_kl(logits_TV, teacher.logits(m), common, direction=method.direction))


def tokens_of(mini: Batch, old_MT: Tensor, m: int) -> Tokens:
    """What an objective may look at in micro-batch m: rejected tokens too, so that a response's ratio is
    whole."""
    return Tokens(
        old_logp_T=old_MT[m],
        server_logp_T=mini.server_logp_MT[m],
        advantage_T=mini.advantage_MT[m],
        mask_T=mini.mask_MT[m],
        segment_T=mini.segment_MT[m],
    )
