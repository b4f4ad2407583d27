"""The two losses of a step, as closures that Megatron's schedules call once per micro-batch on the last
stage."""

import torch
from torch import Tensor

from megatron_jackpot.algorithm.distill import distill_inputs
from megatron_jackpot.algorithm.objectives_base import (
    AtCandidates,
    Objective,
    at_candidates,
    objective_inputs,
)
from megatron_jackpot.algorithm.obrs import log_ratio
from megatron_jackpot.algorithm.reference import reference_kl
from megatron_jackpot.models.engine import Loss
from megatron_jackpot.models.head import FrozenHead
from megatron_jackpot.parallel.divergence import vocab_parallel_kl
from megatron_jackpot.parallel.linear import Logits
from megatron_jackpot.parallel.vocab import (
    vocab_parallel_entropy,
    vocab_parallel_logp,
    vocab_parallel_logp_at,
)
from megatron_jackpot.parallel.vocab_spec import VocabSpec
from megatron_jackpot.records import Aggregated, Direction, Scores
from megatron_jackpot.train.methods import ActorMethods
from megatron_jackpot.train.terms import TermWeights

TRAINED_GAP = "gap/trained_scored"
"""Mean |log s|, s = trained / scored probability: not 0 before the first update only where the numerics
moved."""


def policy_loss(
    scores: Scores,
    aggregated: Aggregated,
    denominator: float,
    objective: Objective,
    vocab: VocabSpec,
    terms: TermWeights = TermWeights(),  # noqa: B008
) -> Loss:
    """-sum keep * weight * surrogate / N, Eq. 5, and added terms; p_current is live, everything else is a
    constant.

    `objective` is prepared; `denominator` is N over the whole mini-batch: DP x CP ranks and micro-batches.
    """
    batch, old_MT = scores.batch, scores.policy_logp_MT

    def live_logp(logits_TV: Logits, m: int) -> tuple[Tensor, AtCandidates | None]:
        if not objective.needs_candidates:
            return vocab_parallel_logp(logits_TV, batch.labels_MT[m], vocab), None
        # Asked together: one read of the logits.
        ids_TK = torch.cat([batch.labels_MT[m][:, None], scores.candidate_ids_MTK[m]], dim=-1)
        logp_TK = vocab_parallel_logp_at(logits_TV, ids_TK, vocab)
        return logp_TK[:, 0], at_candidates(scores, m, logp_TK[:, 1:])

    def loss(logits_TV: Logits, m: int) -> tuple[Tensor, dict[str, Tensor]]:
        logp_T, candidates = live_logp(logits_TV, m)
        reference = None if scores.reference_logp_MT is None else scores.reference_logp_MT[m]
        inputs = objective_inputs(
            logp_T, old_MT[m], batch, m, candidates=candidates, reference_logp_T=reference
        )
        weighted_T = aggregated.weight_MT[m] * objective.surrogate(inputs)
        value = -torch.where(aggregated.keep_MT[m], weighted_T, 0.0).sum() / denominator
        # Both -inf is no gap; one of them alone is an infinite one.
        known_T = batch.mask_MT[m] & (logp_T.detach() != old_MT[m])
        gap_T = torch.where(known_T, (logp_T.detach() - old_MT[m]).abs(), 0.0)
        added: dict[str, Tensor] = {}
        if terms.positive_nll:
            right_T = inputs.valid_T & batch.correct_MT[m]
            nll_T = batch.loss_weight_MT[m] * inputs.logp_T
            added["positive_nll"] = -terms.positive_nll * torch.where(right_T, nll_T, 0.0).sum()
        if terms.entropy:
            entropy_T = batch.loss_weight_MT[m] * vocab_parallel_entropy(logits_TV, vocab)
            added["entropy"] = -terms.entropy * torch.where(batch.mask_MT[m], entropy_T, 0.0).sum()
        if terms.reference_kl:
            assert scores.reference_logp_MT is not None, "where there is a reference it was scored"
            logps = (inputs.logp_T, inputs.old_logp_T, scores.reference_logp_MT[m])
            kl_T = aggregated.weight_MT[m] * reference_kl(terms.estimator, *logps)
            kept_T = aggregated.keep_MT[m] & inputs.valid_T
            added["reference_kl"] = terms.reference_kl * torch.where(kept_T, kl_T, 0.0).sum() / denominator
        return sum(added.values(), start=value), {
            "policy": value.detach(),
            **{name: term.detach() for name, term in added.items()},
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
