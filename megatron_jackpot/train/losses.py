"""The two losses of a step, as closures that Megatron's schedules call once per micro-batch on the last
stage."""

import torch
from torch import Tensor

from megatron_jackpot.algorithm.distill import distill_inputs
from megatron_jackpot.algorithm.objectives_base import Objective, objective_inputs
from megatron_jackpot.algorithm.obrs import log_ratio
from megatron_jackpot.models.engine import Loss
from megatron_jackpot.models.head import FrozenHead
from megatron_jackpot.parallel.divergence import vocab_parallel_kl
from megatron_jackpot.parallel.linear import Logits
from megatron_jackpot.parallel.vocab import vocab_parallel_logp, vocab_parallel_logp_at
from megatron_jackpot.parallel.vocab_spec import VocabSpec
from megatron_jackpot.records import Aggregated, Direction, Scores
from megatron_jackpot.train.methods import ActorMethods

TRAINED_GAP = "gap/trained_scored"
"""Mean |log s|, s = trained / scored probability: not 0 before the first update only where the numerics
moved."""


def policy_loss(
    scores: Scores,
    aggregated: Aggregated,
    denominator: float,
    objective: Objective,
    vocab: VocabSpec,
    *,
    nll_weight: float = 0.0,
) -> Loss:
    """-sum keep * weight * surrogate / N, Eq. 5; p_current is live, everything else is a constant.

    `objective` is prepared; `denominator` is N over the whole mini-batch: DP x CP ranks and micro-batches.
    `nll_weight` is that of -log p on each token of a correct rollout.
    """
    batch, old_MT = scores.batch, scores.policy_logp_MT

    def loss(logits_TV: Logits, m: int) -> tuple[Tensor, dict[str, Tensor]]:
        logp_T = vocab_parallel_logp(logits_TV, batch.labels_MT[m], vocab)
        inputs = objective_inputs(logp_T, old_MT[m], batch, m)
        weighted_T = aggregated.weight_MT[m] * objective.surrogate(inputs)
        value = -torch.where(aggregated.keep_MT[m], weighted_T, 0.0).sum() / denominator
        # Both -inf is no gap; one of them alone is an infinite one.
        known_T = batch.mask_MT[m] & (logp_T.detach() != old_MT[m])
        gap_T = torch.where(known_T, (logp_T.detach() - old_MT[m]).abs(), 0.0)
        added = {}
        if nll_weight:
            right_T = inputs.valid_T & batch.correct_MT[m]
            nll = -nll_weight * torch.where(right_T, batch.loss_weight_MT[m] * inputs.logp_T, 0.0).sum()
            added = {"positive_nll": nll.detach()}
        total = value + nll if nll_weight else value
        return total, {
            "policy": value.detach(),
            **added,
            TRAINED_GAP: torch.stack([gap_T.sum(), batch.mask_MT[m].sum()]),
            **{f"objective/{name}": torch.stack(pair) for name, pair in objective.metrics(inputs).items()},
        }

    return loss


def actor_loss(
    scores: Scores,
    methods: ActorMethods,
    denominator: float,
    vocab: VocabSpec,
    teacher: FrozenHead | None,
    *,
    rl_weight: float,
) -> Loss:
    """PPO on the same samples, weighted by min(p_actor_old/q, C), plus lambda_distill times distillation, Eq.
    6-8.

    All valid tokens count: the actor's samples are its own, nothing is rejected; what a selector weighs is
    weighed here too. `teacher` has the policy's
    logits of this mini-batch, for a distillation over the whole vocabulary.
    """
    batch, old_MT = scores.batch, scores.actor_logp_MT
    assert old_MT is not None, "whoever trains an actor has scored it"
    weight_MT = log_ratio(old_MT, batch.server_logp_MT).exp().clamp(max=methods.tis_cap)
    weight_MT = weight_MT * batch.loss_weight_MT
    distill_weight, at_candidates = methods.distill_weight, methods.distill.needs == "candidates"

    def loss(logits_TV: Logits, m: int) -> tuple[Tensor, dict[str, Tensor]]:
        ids_TK = batch.labels_MT[m][:, None]
        if at_candidates:
            # Asked together: one read of the logits forward, one backward.
            ids_TK = torch.cat([ids_TK, scores.candidate_ids_MTK[m]], dim=-1)
        logp_TK = vocab_parallel_logp_at(logits_TV, ids_TK, vocab)
        mask_T, logp_T = batch.mask_MT[m], logp_TK[:, 0]
        surrogate_T = methods.objective.surrogate(objective_inputs(logp_T, old_MT[m], batch, m))
        rl = -torch.where(mask_T, weight_MT[m] * surrogate_T, 0.0).sum() / denominator

        def full_kl(direction: Direction) -> Tensor:
            assert teacher is not None, "the scorer keeps the policy's head where distillation needs logits"
            both = (logits_TV, teacher.logits(m))
            return vocab_parallel_kl(*both, teacher.common(vocab), direction=direction)

        inputs = distill_inputs(logp_TK, scores, m, full_kl)
        kl = torch.where(mask_T, batch.loss_weight_MT[m] * methods.distill(inputs), 0.0).sum() / denominator
        value = rl_weight * rl + distill_weight * kl
        return value, {"actor": value.detach(), "actor_rl": rl.detach(), "distill": kl.detach()}

    return loss
