"""Corrections by importance ratios: the published baselines beside Jackpot.

rho = p_old / q at the sampled token, q the server's own number; everything is detached. A weight 0 and a
removed token give the same numerator; `denominator` says whether removed tokens still count in N.
Shapes: T tokens of this rank's mini-batch. Sources: M = Yao et al. 2025 (TIS), Liu et al. 2025 (MIS,
geometric filter), I = IcePop (Ring-1T, arXiv 2510.18855), K = Schulman 2020 (k1, k2, k3), P = Jackpot, arXiv
2602.06107.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_jackpot.algorithm.diagnostics import Metrics, mean_over
from megatron_jackpot.algorithm.obrs import LOG_RATIO_LIMIT, check_cap, log_ratio, masked_sum
from megatron_jackpot.algorithm.registry import check_choice
from megatron_jackpot.algorithm.scores import Correction, SampledLogp, Scores, SumOverBatch, sampled_logp

Weights = tuple[Tensor, Tensor, Metrics]
"""(weight [T], keep [T], metrics)."""


@dataclass(frozen=True, kw_only=True)
class Importance:
    """What every ratio method shares: masking, normalisation, the denominator."""

    batch_normalize: bool = False
    """Divide the weights by their mean over all valid tokens of the global mini-batch."""
    denominator: Literal["all", "kept"] = "all"
    """N counts all valid tokens, or only those that are kept."""

    def __post_init__(self) -> None:
        check_choice("denominator", self.denominator, ("all", "kept"))

    @torch.no_grad()
    def __call__(self, scores: Scores, sum_over_batch: SumOverBatch) -> Correction:
        """Raises ValueError for a non-finite server log-prob inside the mask. Sums over the batch: 1 where
        weights are normalised, else 0."""
        logp = sampled_logp(scores)
        weight_T, keep_T, metrics = self.weigh(logp, scores)
        keep_T = keep_T & logp.possible_T
        weight_T = torch.where(keep_T, weight_T, 0.0).float()
        if self.batch_normalize:
            sums = torch.stack([masked_sum(weight_T, scores.mask_T), scores.mask_T.double().sum()])
            total, count = sum_over_batch(sums).unbind()
            mean = torch.where(total > 0, total / count, 1.0)
            weight_T = (weight_T / mean).float()
            metrics["is/batch_norm"] = (mean, torch.ones_like(mean))
        counted_T = keep_T if self.denominator == "kept" else scores.mask_T
        return Correction(
            keep_T=keep_T,
            weight_T=weight_T,
            count=counted_T.double().sum(),
            metrics={**metrics, "is/kept": mean_over(keep_T, scores.mask_T)},
        )

    def weigh(self, logp: SampledLogp, scores: Scores) -> Weights:
        """The method itself; what lies outside logp.possible_T is ignored."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class NoCorrection(Importance):
    """weight = 1 on every token: plain GRPO on another model's samples."""

    def weigh(self, logp: SampledLogp, scores: Scores) -> Weights:
        return torch.ones_like(logp.server_T), logp.possible_T, {}


@dataclass(frozen=True, kw_only=True)
class TokenIS(Importance):
    """TIS: min(rho, cap); masked instead of truncated it is MIS: rho 1[rho <= cap] (M)."""

    cap: float = 2.0
    """C, the largest weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cap("cap", self.cap)

    def weigh(self, logp: SampledLogp, scores: Scores) -> Weights:
        rho_T = log_ratio(logp.policy_T, logp.server_T).exp()
        return rho_T.clamp(max=self.cap), logp.possible_T, _over(rho_T, self.cap, logp)


@dataclass(frozen=True, kw_only=True)
class MaskedIS(TokenIS):
    """MIS: rho 1[rho <= cap] (M)."""

    def weigh(self, logp: SampledLogp, scores: Scores) -> Weights:
        rho_T = log_ratio(logp.policy_T, logp.server_T).exp()
        return rho_T, rho_T <= self.cap, _over(rho_T, self.cap, logp)


@dataclass(frozen=True, kw_only=True)
class CurrentIS(TokenIS):
    """The paper's No-Clip baseline: min(p_target / q, cap), for algorithm.target "current" and reinforce."""

    def weigh(self, logp: SampledLogp, scores: Scores) -> Weights:
        rho_T = log_ratio(logp.target_T, logp.server_T).exp()
        return rho_T.clamp(max=self.cap), logp.possible_T, _over(rho_T, self.cap, logp)


@dataclass(frozen=True, kw_only=True)
class IcePop(Importance):
    """rho 1[low <= rho <= high] (I)."""

    low: float = 0.5
    """alpha."""
    high: float = 5.0
    """beta."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_band(self.low, self.high)

    def weigh(self, logp: SampledLogp, scores: Scores) -> Weights:
        rho_T = log_ratio(logp.policy_T, logp.server_T).exp()
        return rho_T, (rho_T >= self.low) & (rho_T <= self.high), _over(rho_T, self.high, logp)


@dataclass(frozen=True, kw_only=True)
class SequenceTIS(TokenIS):
    """min(product of rho over the response, cap) on each of its tokens (M)."""

    cap: float = 5.0
    """C, the largest weight of a response."""

    def weigh(self, logp: SampledLogp, scores: Scores) -> Weights:
        rho_T = _sequence_ratio(logp, scores)
        return rho_T.clamp(max=self.cap), logp.possible_T, _over(rho_T, self.cap, logp)


@dataclass(frozen=True, kw_only=True)
class SequenceMIS(SequenceTIS):
    """product of rho over the response where it is at most cap, else the response is removed (M)."""

    def weigh(self, logp: SampledLogp, scores: Scores) -> Weights:
        rho_T = _sequence_ratio(logp, scores)
        return rho_T, rho_T <= self.cap, _over(rho_T, self.cap, logp)


@dataclass(frozen=True, kw_only=True)
class GeometricFilter(Importance):
    """Keeps a response iff low <= exp(mean log rho) <= high and no rho is below veto; weighs min(rho, cap) or
    1 (M)."""

    low: float = 0.999
    """Least geometric mean of rho."""
    high: float = 1.001
    """Largest geometric mean of rho."""
    veto: float | None = 1e-4
    """A single token below this removes the response; null switches it off."""
    cap: float | None = None
    """Kept tokens weigh min(rho, cap); null weighs them 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_band(self.low, self.high)
        if self.veto is not None and not 0 < self.veto < 1:
            raise ValueError(f"veto = {self.veto}: must lie in (0, 1). Use 1e-4 or null.")
        if self.cap is not None:
            check_cap("cap", self.cap)

    def weigh(self, logp: SampledLogp, scores: Scores) -> Weights:
        log_rho_T = log_ratio(logp.policy_T, logp.server_T)
        total_T, count_T = sequence_sum(log_rho_T, logp.possible_T, scores)
        geometric_T = (total_T / count_T.clamp(min=1)).exp()
        keep_T = (geometric_T >= self.low) & (geometric_T <= self.high)
        metrics = {"is/geometric_mean": mean_over(geometric_T, logp.possible_T)}
        if self.veto is not None:
            vetoed_T = sequence_sum((log_rho_T < math.log(self.veto)).float(), logp.possible_T, scores)[0] > 0
            keep_T = keep_T & ~vetoed_T
            metrics["is/vetoed"] = mean_over(vetoed_T, logp.possible_T)
        weight_T = torch.ones_like(log_rho_T) if self.cap is None else log_rho_T.exp().clamp(max=self.cap)
        return weight_T, keep_T, metrics


@dataclass(frozen=True, kw_only=True)
class KFilter(Importance):
    """Keeps what has a small k1 = -log rho, k2 = log^2 rho / 2 or k3 = rho - 1 - log rho (K); weighs min(rho,
    cap) or 1."""

    kind: Literal["k1", "k2", "k3"] = "k3"
    """The divergence estimate."""
    level: Literal["token", "seq_sum", "seq_mean", "seq_max"] = "token"
    """What is compared: every token, or the sum, mean or maximum over its response."""
    high: float = 2.0
    """k2, k3: largest value kept. k1: largest ratio exp(-k1) kept."""
    low: float | None = None
    """k1 only: least ratio kept; null means 1 / high."""
    cap: float | None = None
    """Kept tokens weigh min(rho, cap); null weighs them 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("kind", self.kind, ("k1", "k2", "k3"))
        check_choice("level", self.level, ("token", "seq_sum", "seq_mean", "seq_max"))
        if not self.high > 0:
            raise ValueError(f"high = {self.high}: must be > 0. Use 2.0.")
        if self.low is not None and self.kind != "k1":
            raise ValueError(f"low = {self.low}: only kind = 'k1' has a lower bound. Leave it out.")
        if self.kind == "k1":
            check_band(self.low or 1 / self.high, self.high)
        if self.cap is not None:
            check_cap("cap", self.cap)

    def weigh(self, logp: SampledLogp, scores: Scores) -> Weights:
        log_rho_T = log_ratio(logp.policy_T, logp.server_T)
        values = {"k1": -log_rho_T, "k2": log_rho_T.square() / 2, "k3": log_rho_T.expm1() - log_rho_T}
        value_T = values[self.kind]
        if self.level == "seq_max":
            value_T = sequence_max(value_T, logp.possible_T, scores)
        elif self.level != "token":
            total_T, count_T = sequence_sum(value_T, logp.possible_T, scores)
            value_T = total_T if self.level == "seq_sum" else total_T / count_T.clamp(min=1)
        if self.kind == "k1":
            low = math.log(self.low or 1 / self.high)
            keep_T = (-value_T >= low) & (-value_T <= math.log(self.high))
        else:
            keep_T = value_T <= self.high
        weight_T = torch.ones_like(log_rho_T) if self.cap is None else log_rho_T.exp().clamp(max=self.cap)
        return weight_T, keep_T, {"is/filter_value": mean_over(value_T, logp.possible_T)}


def sequence_sum(value_T: Tensor, mask_T: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Sum over a token's response and number of summands, float64 [T]; rollouts never span two ranks."""
    segment_T = scores.segment_T.clamp(min=0)
    size = int(segment_T.max()) + 1 if segment_T.numel() else 1
    zeros_S = torch.zeros(size, dtype=torch.float64, device=value_T.device)
    total_S = zeros_S.index_add(0, segment_T, torch.where(mask_T, value_T.double(), 0.0))
    count_S = zeros_S.index_add(0, segment_T, mask_T.double())
    return total_S[segment_T], count_S[segment_T]


def _sequence_ratio(logp: SampledLogp, scores: Scores) -> Tensor:
    """Product of rho over a token's response, float64 [T]; its logarithm is clamped to +-20."""
    total_T, _ = sequence_sum(log_ratio(logp.policy_T, logp.server_T), logp.possible_T, scores)
    return total_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def sequence_max(value_T: Tensor, mask_T: Tensor, scores: Scores) -> Tensor:
    """Largest value of a token's response, [T]; -inf where nothing counts."""
    segment_T = scores.segment_T.clamp(min=0)
    size = int(segment_T.max()) + 1 if segment_T.numel() else 1
    lowest_S = value_T.new_full((size,), -math.inf)
    return lowest_S.scatter_reduce(0, segment_T, torch.where(mask_T, value_T, -math.inf), "amax")[segment_T]


def check_band(low: float, high: float) -> None:
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"low = {low}, high = {high}: must be low <= 1 <= high, low >= 0. Use 0.5 and 5.")


def _over(rho_T: Tensor, cap: float, logp: SampledLogp) -> Metrics:
    return {"is/cap_fraction": mean_over(rho_T > cap, logp.possible_T)}
