"""Corrections by importance ratios: the published baselines beside Jackpot.

rho = p_old / q at the sampled token, q the server's own number; everything is detached. A weight 0 and a
removed token give the same numerator; `denominator` says whether removed tokens still count in N.
Shapes: M micro-batches of T tokens. Sources: M = Yao et al. 2025 (TIS), Liu et al. 2025 (MIS,
geometric filter), I = IcePop (Ring-1T, arXiv 2510.18855), K = Schulman 2020 (k1, k2, k3), P = Jackpot, arXiv
2602.06107.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_jackpot.algorithm.correction_base import CorrectionMethod, corrected
from megatron_jackpot.algorithm.diagnostics import by_tokens, mean_over
from megatron_jackpot.algorithm.divergence import k3
from megatron_jackpot.algorithm.obrs import LOG_RATIO_LIMIT, check_cap, log_ratio, masked_sum
from megatron_jackpot.algorithm.tokens import (
    SampledLogp,
    SumOverBatch,
    sampled_logp,
    segment_mean,
    segment_reduce,
)
from megatron_jackpot.records import Correction, Metrics, Scores

Weights = tuple[Tensor, Tensor, Metrics]
"""(weight [M, T], keep [M, T], metrics)."""


@dataclass(frozen=True, kw_only=True)
class Importance(CorrectionMethod):
    """What every ratio method shares: masking, normalisation, the denominator."""

    weight_only: ClassVar[tuple[str, ...]] = ("batch_normalize", "denominator")
    """Settings that say nothing about which tokens are kept: a filter has none of them."""

    batch_normalize: bool = False
    """Divide the weights by their mean over all valid tokens of the global mini-batch."""
    denominator: Literal["all", "kept"] = "all"
    """N counts all valid tokens, or only those that are kept."""

    @torch.no_grad()
    def __call__(self, scores: Scores, sum_over_batch: SumOverBatch) -> Correction:
        """Raises ValueError for a non-finite server log-prob inside the mask. Sums over the batch: those of
        `prepare`, and 1 where weights are normalised."""
        logp, mask_MT = sampled_logp(scores), scores.batch.mask_MT
        weight_MT, keep_MT, metrics = self.prepare(scores, sum_over_batch).weigh(logp, scores)
        keep_MT = keep_MT & logp.valid
        weight_MT = torch.where(keep_MT, weight_MT, 0.0).float()
        if self.batch_normalize:
            sums = torch.stack([masked_sum(weight_MT, mask_MT), mask_MT.double().sum()])
            total, count = sum_over_batch(sums).unbind()
            mean = torch.where(total > 0, total / count, 1.0)
            weight_MT = (weight_MT / mean).float()
            metrics["is/batch_norm"] = by_tokens(mean, mask_MT)
        return corrected(
            scores,
            keep=keep_MT,
            weight=weight_MT,
            counted=keep_MT if self.denominator == "kept" else mask_MT,
            accept=keep_MT,
            metrics={**metrics, "is/kept": mean_over(keep_MT, mask_MT)},
        )

    def prepare(self, scores: Scores, sum_over_batch: SumOverBatch) -> "Importance":
        """The method to use on this mini-batch; most need nothing of all of it. Every rank calls it."""
        return self

    def weigh(self, logp: SampledLogp, scores: Scores) -> Weights:
        """The method itself; what it says of a token outside logp.valid is ignored.

        What looks at a whole response counts all of its tokens in the mask: one to which the policy gives
        probability 0 has the smallest log rho there is, as the limit of p -> 0 has, and does not fall out.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class NoCorrection(Importance):
    """weight = 1 on every token: plain GRPO on another model's samples."""

    corrects: ClassVar[bool] = False

    def weigh(self, logp: SampledLogp, scores: Scores) -> Weights:
        return torch.ones_like(logp.server), logp.valid, {}


@dataclass(frozen=True, kw_only=True)
class TokenIS(Importance):
    """TIS: min(rho, cap), at least low; masked instead of truncated it is MIS: rho 1[rho <= cap] (M)."""

    cap: float = 2.0
    """C, the largest weight."""
    low: float = 0.0
    """The least weight; 0 switches it off."""

    def __post_init__(self) -> None:
        check_cap("cap", self.cap)
        if not 0 <= self.low <= 1:
            raise ValueError(f"low = {self.low}: must lie in [0, 1]. Use 0.0 to switch it off.")

    def weigh(self, logp: SampledLogp, scores: Scores) -> Weights:
        ratio_MT = self.ratio(logp, scores)
        return ratio_MT.clamp(self.low, self.cap), logp.valid, self._outside(ratio_MT, logp)

    def ratio(self, logp: SampledLogp, scores: Scores) -> Tensor:
        """What is bounded, [M, T]."""
        return log_ratio(logp.policy, logp.server).exp()

    def _outside(self, ratio_MT: Tensor, logp: SampledLogp) -> Metrics:
        below: Metrics = {"is/low_fraction": mean_over(ratio_MT < self.low, logp.valid)} if self.low else {}
        return _over(ratio_MT, self.cap, logp) | below


@dataclass(frozen=True, kw_only=True)
class MaskedIS(Importance):
    """MIS: rho 1[rho <= cap] (M)."""

    cap: float = 2.0
    """C, the largest ratio that is kept."""

    def __post_init__(self) -> None:
        check_cap("cap", self.cap)

    def weigh(self, logp: SampledLogp, scores: Scores) -> Weights:
        rho_MT = log_ratio(logp.policy, logp.server).exp()
        return rho_MT, rho_MT <= self.cap, _over(rho_MT, self.cap, logp)


@dataclass(frozen=True, kw_only=True)
class CurrentIS(TokenIS):
    """The paper's No-Clip baseline: min(p_target / q, cap), for algorithm.target "current" and reinforce."""

    def ratio(self, logp: SampledLogp, scores: Scores) -> Tensor:
        return log_ratio(logp.target, logp.server).exp()


@dataclass(frozen=True, kw_only=True)
class IcePop(Importance):
    """rho 1[low <= rho <= high] (I)."""

    low: float = 0.5
    """alpha."""
    high: float = 5.0
    """beta."""

    def __post_init__(self) -> None:
        check_band(self.low, self.high)

    def weigh(self, logp: SampledLogp, scores: Scores) -> Weights:
        rho_MT = log_ratio(logp.policy, logp.server).exp()
        below = {"is/low_fraction": mean_over(rho_MT < self.low, logp.valid)}
        keep_MT = (rho_MT >= self.low) & (rho_MT <= self.high)
        return rho_MT, keep_MT, _over(rho_MT, self.high, logp) | below


@dataclass(frozen=True, kw_only=True)
class SequenceTIS(TokenIS):
    """min(product of rho over the response, cap), at least low, on each of its tokens (M)."""

    cap: float = 5.0
    """C, the largest weight of a response."""

    def ratio(self, logp: SampledLogp, scores: Scores) -> Tensor:
        """The product, float64; its logarithm is clamped to +-20."""
        log_rho_MT = log_ratio(logp.policy, logp.server)
        total_MT = segment_reduce(log_rho_MT, scores.batch.mask_MT, scores.batch.segment_MT)
        return total_MT.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


@dataclass(frozen=True, kw_only=True)
class SequenceMIS(SequenceTIS):
    """product of rho over the response where it lies in [low, cap], else the response is removed (M)."""

    def weigh(self, logp: SampledLogp, scores: Scores) -> Weights:
        ratio_MT = self.ratio(logp, scores)
        keep_MT = (ratio_MT >= self.low) & (ratio_MT <= self.cap)
        return ratio_MT, keep_MT, self._outside(ratio_MT, logp)


@dataclass(frozen=True, kw_only=True)
class GeometricTIS(TokenIS):
    """min(exp(mean log rho over the response), cap), at least low, on each of its tokens."""

    def ratio(self, logp: SampledLogp, scores: Scores) -> Tensor:
        log_rho_MT = log_ratio(logp.policy, logp.server)
        return segment_mean(log_rho_MT, scores.batch.mask_MT, scores.batch.segment_MT).exp()


@dataclass(frozen=True, kw_only=True)
class GeometricFilter(Importance):
    """Keeps a response iff low <= exp(mean log rho) <= high and no rho is below veto; weighs min(rho, cap) or
    1 (M)."""

    weight_only: ClassVar[tuple[str, ...]] = (*Importance.weight_only, "cap")

    low: float = 0.999
    """Least geometric mean of rho."""
    high: float = 1.001
    """Largest geometric mean of rho."""
    veto: float | None = 1e-4
    """A single token below this removes the response; null switches it off."""
    cap: float | None = None
    """Kept tokens weigh min(rho, cap); null weighs them 1."""

    def __post_init__(self) -> None:
        check_band(self.low, self.high)
        if self.veto is not None and not 0 < self.veto < 1:
            raise ValueError(f"veto = {self.veto}: must lie in (0, 1). Use 1e-4 or null.")
        if self.cap is not None:
            check_cap("cap", self.cap)

    def weigh(self, logp: SampledLogp, scores: Scores) -> Weights:
        log_rho_MT = log_ratio(logp.policy, logp.server)
        mask_MT, segment_MT = scores.batch.mask_MT, scores.batch.segment_MT
        geometric_MT = segment_mean(log_rho_MT, mask_MT, segment_MT).exp()
        keep_MT = (geometric_MT >= self.low) & (geometric_MT <= self.high)
        metrics = {"is/geometric_mean": mean_over(geometric_MT, mask_MT)}
        if self.veto is not None:
            low_MT = log_rho_MT < math.log(self.veto)
            vetoed_MT = segment_reduce(low_MT, mask_MT, segment_MT) > 0
            keep_MT = keep_MT & ~vetoed_MT
            metrics["is/vetoed"] = mean_over(vetoed_MT, mask_MT)
        weight_MT = torch.ones_like(log_rho_MT) if self.cap is None else log_rho_MT.exp().clamp(max=self.cap)
        return weight_MT, keep_MT, metrics


@dataclass(frozen=True, kw_only=True)
class KFilter(Importance):
    """Keeps what has a small k1 = -log rho, k2 = log^2 rho / 2 or k3 = rho - 1 - log rho (K); weighs min(rho,
    cap) or 1."""

    weight_only: ClassVar[tuple[str, ...]] = (*Importance.weight_only, "cap")

    kind: Literal["k1", "k2", "k3"] = "k3"
    """The divergence estimate."""
    level: Literal["token", "seq_sum", "seq_mean", "seq_max"] = "token"
    """What is compared: every token, or the sum, mean or maximum over its response."""
    high: float = 2.0
    """k2, k3: largest value kept. k1: largest ratio exp(-k1) kept."""
    low: float | None = None
    """k1 only: least ratio kept, 0 for none; null means 1 / high."""
    cap: float | None = None
    """Kept tokens weigh min(rho, cap); null weighs them 1."""

    def __post_init__(self) -> None:
        if not self.high > 0:
            raise ValueError(f"high = {self.high}: must be > 0. Use 2.0.")
        if self.low is not None and self.kind != "k1":
            raise ValueError(f"low = {self.low}: only kind = 'k1' has a lower bound. Leave it out.")
        if self.kind == "k1":
            check_band(self._low, self.high)
            if self.level == "seq_max":
                raise ValueError(
                    "level = 'seq_max': must not be used with kind = 'k1', whose largest value is the least "
                    "ratio of a response: no large ratio would ever be removed. Use level = 'token' or "
                    "'seq_mean', or kind = 'k2' or 'k3'."
                )
        if self.cap is not None:
            check_cap("cap", self.cap)

    def weigh(self, logp: SampledLogp, scores: Scores) -> Weights:
        log_rho_MT = log_ratio(logp.policy, logp.server)
        values = {"k1": -log_rho_MT, "k2": log_rho_MT.square() / 2, "k3": k3(log_rho_MT)}
        value_MT = values[self.kind]
        mask_MT, segment_MT = scores.batch.mask_MT, scores.batch.segment_MT
        if self.level == "seq_max":
            value_MT = segment_reduce(value_MT, mask_MT, segment_MT, "max")
        elif self.level == "seq_sum":
            value_MT = segment_reduce(value_MT, mask_MT, segment_MT)
        elif self.level == "seq_mean":
            value_MT = segment_mean(value_MT, mask_MT, segment_MT)
        if self.kind == "k1":
            low = math.log(self._low) if self._low > 0 else -math.inf
            keep_MT = (-value_MT >= low) & (-value_MT <= math.log(self.high))
        else:
            keep_MT = value_MT <= self.high
        weight_MT = torch.ones_like(log_rho_MT) if self.cap is None else log_rho_MT.exp().clamp(max=self.cap)
        return weight_MT, keep_MT, {"is/filter_value": mean_over(value_MT, mask_MT)}

    @property
    def _low(self) -> float:
        """Least ratio that k1 keeps."""
        return 1 / self.high if self.low is None else self.low


def check_band(low: float, high: float) -> None:
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"low = {low}, high = {high}: must be low <= 1 <= high, low >= 0. Use 0.5 and 5.")


def _over(rho_MT: Tensor, cap: float, logp: SampledLogp) -> Metrics:
    return {"is/cap_fraction": mean_over(rho_MT > cap, logp.valid)}
