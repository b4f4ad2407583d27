"""What is added to the policy's loss beside correction x objective, with weights that may be steered:
docs/objectives.md, "Added terms"."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_jackpot.algorithm.controllers import SteeredWeight
from megatron_jackpot.algorithm.diagnostics import mean_over
from megatron_jackpot.algorithm.entropy import entropy_of
from megatron_jackpot.algorithm.obrs import masked_sum
from megatron_jackpot.algorithm.reference import Estimator, reference_kl
from megatron_jackpot.algorithm.tokens import SumOverBatch, segment_reduce, trainable
from megatron_jackpot.config import Config
from megatron_jackpot.config.algorithm import ReferenceKL
from megatron_jackpot.records import Aggregated, Correction, Metrics, Pair, Scores

LEAST_WEIGHT = 1e-6
"""Of a term that is steered: as good as none."""


@dataclass(frozen=True, kw_only=True)
class TermWeights:
    """What the terms of one mini-batch weigh on each token; 0 leaves a term out."""

    positive_nll: float = 0.0
    """Of -log p on each token of a correct rollout."""
    entropy: float = 0.0
    """Of the entropy at each token, which is taken off."""
    reference_kl: float = 0.0
    """Of the estimate at each token, beside its keep, weight and 1 / N."""
    estimator: Estimator = "k3"


@dataclass
class Terms:
    """Raises ValueError from `from_config` for settings that cannot work."""

    positive_nll: float = 0.0
    entropy_bonus: float = 0.0
    """Of the next update."""
    entropy: SteeredWeight | None = None
    """Steers entropy_bonus, on the last pipeline stage."""
    kl: ReferenceKL | None = None
    """How the policy is held near its reference."""
    kl_weight: float = 0.0
    """Coefficient in the next update, or the next step's rewards."""
    kl_control: SteeredWeight | None = None
    """Steers kl_weight, on the last pipeline stage."""

    @classmethod
    def from_config(cls, config: Config) -> "Terms":
        chosen, kl = config.algorithm.entropy, config.algorithm.reference_kl
        terms = cls(positive_nll=config.algorithm.positive_nll, kl=kl)
        if chosen is not None:
            terms.entropy_bonus = chosen.bonus
            if chosen.target is not None:
                where = "algorithm.entropy.bonus"
                terms.entropy = _steered(where, chosen.bonus, chosen.target, "raises", most=1.0)
        if kl is not None:
            terms.kl_weight = kl.weight
            if kl.target is not None:
                where = "algorithm.reference_kl.weight"
                terms.kl_control = _steered(where, kl.weight, kl.target, "lowers", most=100.0)
        return terms

    @property
    def in_reward(self) -> bool:
        """Whether rewards are known only once the reference has been asked."""
        return self.kl is not None and self.kl.place == "reward"

    def weights(self, num_tokens: float, num_positive: float) -> TermWeights:
        """Of a mini-batch with so many tokens, and of correct rollouts, those of pruned rollouts that count
        among them: what trains is weighted to stand for these too."""
        return TermWeights(
            positive_nll=self.positive_nll / max(num_positive, 1.0),
            entropy=self.entropy_bonus / max(num_tokens, 1.0),
            reference_kl=0.0 if self.in_reward else self.kl_weight,
            estimator="k3" if self.kl is None else self.kl.estimator,
        )

    def steer(self, scores: Scores, aggregated: Aggregated, sum_over_batch: SumOverBatch) -> Metrics:
        """Move what is steered for the next update; what is measured, and what the weights are then, as
        metrics. Sums over the batch once for each that is steered."""
        metrics: Metrics = {}
        if self.entropy is not None:
            measured = mean_over(entropy_of(scores), scores.batch.mask_MT)
            self.entropy_bonus = move(self.entropy, measured, sum_over_batch)
            metrics["policy/entropy_bonus"] = number(self.entropy_bonus, measured)
        if self.kl is not None:
            distances = distance_metrics(scores, aggregated)
            metrics |= distances
            if self.kl_control is not None:
                measured = distances["kl/policy_reference"]
                self.kl_weight = move(self.kl_control, measured, sum_over_batch)
                metrics["policy/reference_weight"] = number(self.kl_weight, measured)
        return metrics

    def punishments(self, scores: Scores, correction: Correction) -> dict[tuple[int, ...], float]:
        """(epoch, prompt id, sample) -> what is added to the reward of each rollout here: -coefficient x the
        sum of keep x weight x estimate over its tokens."""
        assert self.kl is not None, "only where the KL is in the reward"
        batch, weight_MT = scores.batch, correction.weight_MT
        kl_MT = _estimate(scores, self.kl.estimator)
        total_MT = segment_reduce(weight_MT * kl_MT, correction.keep_MT & batch.mask_MT, batch.segment_MT)
        ids_N3, totals_N = batch.rollout_id_MT3[batch.mask_MT], total_MT[batch.mask_MT]
        found = zip(ids_N3.tolist(), totals_N.tolist(), strict=True)
        return {tuple(key): -self.kl_weight * total for key, total in found}

    def controllers(self) -> dict[str, SteeredWeight | None]:
        """name -> controller; None where a weight is not steered."""
        return {"entropy": self.entropy, "reference_kl": self.kl_control}

    def use_controllers(self) -> None:
        """Take the weights of controllers that were loaded."""
        if self.entropy is not None:
            self.entropy_bonus = self.entropy.weight
        if self.kl_control is not None:
            self.kl_weight = self.kl_control.weight


def distance_metrics(scores: Scores, aggregated: Aggregated) -> Metrics:
    """KL(policy_old || reference): with the policy loss's keep, weight and N; as a mean over all tokens of
    the server; and over the vocabulary where it was read. The first two by k3."""
    batch, kl_MT = scores.batch, _estimate(scores, "k3")
    known_MT = trainable(batch.mask_MT, scores.policy_logp_MT)
    weighted = masked_sum(aggregated.weight_MT * kl_MT, aggregated.keep_MT & known_MT)
    metrics: Metrics = {
        "kl/policy_reference": (weighted, aggregated.count),
        "kl/policy_reference_unweighted": mean_over(kl_MT, known_MT),
    }
    if scores.reference_kl_MT is not None:
        metrics["kl/policy_reference_exact"] = mean_over(scores.reference_kl_MT, batch.mask_MT)
    return metrics


def _estimate(scores: Scores, estimator: Estimator) -> Tensor:
    """At p_old, [M, T]; 0 where the policy gives probability 0."""
    assert scores.reference_logp_MT is not None, "where there is a reference it was scored"
    known_MT = trainable(scores.batch.mask_MT, scores.policy_logp_MT)
    policy_MT, reference_MT = (
        torch.where(known_MT, logp_MT, 0.0) for logp_MT in (scores.policy_logp_MT, scores.reference_logp_MT)
    )
    return reference_kl(estimator, policy_MT, policy_MT, reference_MT)


def move(control: SteeredWeight, measured: Pair, sum_over_batch: SumOverBatch) -> float:
    """The weight after the mean of `measured` over the whole mini-batch. Sums over the batch once."""
    total, count = sum_over_batch(torch.stack(measured)).tolist()
    return control.update(total / count if count else math.nan)


def number(value: float, like: Pair) -> Pair:
    """A number that every rank has alike, as a metric."""
    one = torch.ones_like(like[1])
    return one * value, one


def _steered(
    where: str, weight: float, wanted: float, term: Literal["lowers", "raises"], *, most: float
) -> SteeredWeight:
    try:
        return SteeredWeight(
            wanted=wanted, weight=weight, term=term, weight_min=LEAST_WEIGHT, weight_max=most
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
