"""Objectives with a trust region around the sampling policy: divergence masks, adaptive bounds, second
moments.

Shapes: T tokens, K candidates per token; r = p / q at the sampled token, p the live policy, q the server's
probability.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_jackpot.algorithm.diagnostics import running_sum
from megatron_jackpot.algorithm.divergence import sampled_kl, sampled_tv
from megatron_jackpot.algorithm.objectives_base import (
    Anchor,
    Objective,
    check_that,
    clip_removed,
    clipped,
    constants,
    knobs_of,
    masked_log_ratio,
    ratio_to,
    unprepared,
)
from megatron_jackpot.algorithm.obrs import LOG_RATIO_LIMIT, check_cap
from megatron_jackpot.algorithm.tokens import NumberAlike, SumOverBatch
from megatron_jackpot.records import Metrics, ObjectiveInputs, Scores

KL_FLOOR = 1e-8
"""Added to 1 - p and 1 - q before the logarithm."""


@dataclass(frozen=True, kw_only=True)
class DPPO(Objective):
    """M sg(min(r, cap)) A log p with M = 0 where the update would leave the region further (arXiv
    2602.04879)."""

    delta_low: float
    """Largest distance of a token whose probability fell."""
    delta_high: float
    """Largest distance of a token whose probability rose."""
    cap: float = 20.0
    """Upper bound of r."""
    anchor: Anchor = "server"
    """Region and ratio are around q (only with correction "none") or around p_old (with any correction)."""
    approximation: Literal["binary", "topk"] = "binary"
    """The distance is over two events, the sampled token and all others, or over the sampled token, each of
    the candidates beside it and all others."""
    kl_coef: float = 0.0
    """Weight of log^2 r, which holds every token near the anchor (prime-rl: 1e-3)."""

    def __post_init__(self) -> None:
        check_cap("cap", self.cap)
        ok = 0 <= self.kl_coef < math.inf
        check_that(ok, "kl_coef", self.kl_coef, "be finite and >= 0", "Use 1e-3, or 0 for none.")
        for name in ("delta_low", "delta_high"):
            value = getattr(self, name)
            check_that(value >= 0, name, value, "be >= 0", f"Use {type(self).__dict__[name]}.")

    @property
    def corrects(self) -> bool:
        return self.anchor == "server"

    @property
    def needs_candidates(self) -> bool:
        return self.approximation == "topk"

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        log_ratio_T = ratio_to(t, self.anchor)
        weight_T = log_ratio_T.detach().exp().clamp(max=self.cap)
        surrogate_T = weight_T.masked_fill(self.removed(t), 0.0) * t.advantage_T * t.logp_T
        if self.kl_coef == 0:
            return surrogate_T
        return surrogate_T - torch.where(t.valid_T, self.kl_coef * log_ratio_T.square(), 0.0)

    def removed(self, t: ObjectiveInputs) -> Tensor:
        logp_T, anchor_T = self._pair(t)
        distance_T = self._distance(t)
        rose_T = (distance_T > self.delta_high) & (logp_T > anchor_T)
        fell_T = (distance_T > self.delta_low) & (logp_T < anchor_T)
        return torch.where(t.advantage_T > 0, rose_T, fell_T)

    def _distance(self, t: ObjectiveInputs) -> Tensor:
        """Between p and the anchor at each token's position, float64 [T]."""
        raise NotImplementedError

    def _pair(self, t: ObjectiveInputs) -> tuple[Tensor, Tensor]:
        """(log p, log of the anchor's probability), float64, detached."""
        anchor_T = t.old_logp_T if self.anchor == "old" else t.server_logp_T
        return t.logp_T.detach().double(), anchor_T.double()

    def _candidates(self, t: ObjectiveInputs) -> tuple[Tensor, Tensor]:
        """The same at the candidates beside the sampled token, [T, K]."""
        old = self.anchor == "old"
        return t.candidate_logp_TK, t.candidate_old_logp_TK if old else t.candidate_server_logp_TK


@dataclass(frozen=True, kw_only=True)
class DPPOTV(DPPO):
    """Drops A > 0 where p > q and the total variation is above delta_high, A <= 0 where p < q and it is above
    delta_low."""

    delta_low: float = 0.15
    delta_high: float = 0.15

    def _distance(self, t: ObjectiveInputs) -> Tensor:
        if self.approximation == "topk":
            return sampled_tv(*self._pair(t), *self._candidates(t))
        logp_T, anchor_T = self._pair(t)
        return (logp_T.exp() - anchor_T.exp()).abs()


@dataclass(frozen=True, kw_only=True)
class DPPOKL(DPPO):
    """The same with KL(q || p) as the distance."""

    delta_low: float = 0.05
    delta_high: float = 0.05

    def _distance(self, t: ObjectiveInputs) -> Tensor:
        if self.approximation == "topk":
            return sampled_kl(*self._pair(t), *self._candidates(t))
        logp_T, anchor_T = self._pair(t)
        rest_p_T, rest_q_T = (KL_FLOOR - torch.expm1(x_T) for x_T in (logp_T, anchor_T))
        return anchor_T.exp() * (anchor_T - logp_T) - torch.expm1(anchor_T) * (rest_q_T / rest_p_T).log()


@dataclass(frozen=True, kw_only=True)
class BAPO(Objective):
    """min(r A, clip(r, low, high) A), the bounds moved for each mini-batch (arXiv 2510.18927, Alg. 1).

    With P = sum over A >= 0 of w min(r, high) A and N = sum over A < 0 of w max(r, low) |A|, w = q or 1, low
    and high grow step by step until P / (P + N) >= positive_share. Only with correction "none": r corrects
    for q.
    """

    positive_share: float = 0.4
    """Wanted share of positive contributions."""
    order: Literal["alternate", "low_first", "high_first"] = "alternate"
    """Which bound moves: both at once until low is at its end (paper), or one to its end and then the
    other (the published code: low_first)."""
    weighted: bool = True
    """Contributions are weighted by q (paper) or count alike (the published code)."""
    low_start: float = 0.6
    """First lower bound of r."""
    low_end: float = 0.9
    """Last lower bound of r."""
    low_step: float = 0.02
    high_start: float = 1.2
    """First upper bound of r."""
    high_end: float = 3.0
    """Last upper bound of r."""
    high_step: float = 0.05
    dual_clip: float | None = None
    """For A < 0 the surrogate is at least dual_clip * A; null switches it off, the published code has 3.0."""

    def __post_init__(self) -> None:
        share, low, high = self.positive_share, self.low_end, self.high_start
        check_that(0 < share < 1, "positive_share", share, "lie in (0, 1)", "Use 0.5.")
        ok = 0 <= self.low_start <= low <= 1
        check_that(ok, "low_end", low, f"lie in [low_start = {self.low_start}, 1]", "Use 0.6 to 0.9.")
        ok = 1 <= high <= self.high_end < math.inf
        check_that(ok, "high_start", high, f"lie in [1, high_end = {self.high_end}]", "Use 1.2 to 3.0.")
        for name in ("low_step", "high_step"):
            step = getattr(self, name)
            check_that(1e-3 <= step < math.inf, name, step, "be >= 0.001 and finite", "Use 0.05.")
        if self.dual_clip is not None:
            rule = f"be >= high_end = {self.high_end}"
            check_that(self.dual_clip >= self.high_end, "dual_clip", self.dual_clip, rule, "Use null.")

    @property
    def corrects(self) -> bool:
        return True

    @torch.no_grad()
    def prepare(
        self, scores: Scores, sum_over_batch: SumOverBatch, number_alike: NumberAlike
    ) -> "PreparedBAPO":
        """The same method with its bounds. Sums over the batch once: P and N for every bound."""
        lows = _steps(self.low_start, self.low_end, self.low_step)
        highs = _steps(self.high_start, self.high_end, self.high_step)
        log_ratio_MT, mask_MT = masked_log_ratio(scores)
        ratio_MT = log_ratio_MT.double().exp()
        advantage_MT = torch.where(mask_MT, scores.batch.advantage_MT, 0.0).double()
        if self.weighted:
            advantage_MT = (
                advantage_MT * torch.where(mask_MT, scores.batch.server_logp_MT, 0.0).double().exp()
            )
        gain_MT, pain_MT = advantage_MT.clamp(min=0), (-advantage_MT).clamp(min=0)
        sums = [(ratio_MT.clamp(max=high) * gain_MT).sum() for high in highs]
        sums += [(ratio_MT.clamp(min=low) * pain_MT).sum() for low in lows]
        totals = sum_over_batch(torch.stack(sums)).tolist()
        gains, pains = totals[: len(highs)], totals[len(highs) :]

        def met(place: tuple[int, int]) -> bool:
            gain, pain = gains[place[1]], pains[place[0]]
            return gain >= self.positive_share * (gain + pain)

        places = self._places(len(lows), len(highs))
        # Without one advantage above 0 no bound could help.
        at, to = next(filter(met, places), places[-1]) if gains[0] > 0 else (0, 0)
        return PreparedBAPO(**knobs_of(self, BAPO), low=lows[at], high=highs[to])

    def _places(self, num_low: int, num_high: int) -> list[tuple[int, int]]:
        """The bounds to be tried in turn, as steps of (low, high)."""
        if self.order == "alternate":
            return [(i, min(i, num_high - 1)) for i in range(num_low)]
        lows, highs = range(num_low), range(num_high)
        if self.order == "low_first":
            return [(i, 0) for i in lows] + [(num_low - 1, j) for j in highs]
        return [(0, j) for j in highs] + [(i, num_high - 1) for i in lows]

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        raise unprepared("bapo")

    def removed(self, t: ObjectiveInputs) -> Tensor:
        raise unprepared("bapo")


@dataclass(frozen=True, kw_only=True)
class PreparedBAPO(BAPO):
    """BAPO with the bounds of one mini-batch."""

    low: float
    high: float

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        ratio_T = ratio_to(t, "server").exp()
        return clipped(ratio_T, t.advantage_T, self.low, self.high, self.dual_clip)

    def removed(self, t: ObjectiveInputs) -> Tensor:
        ratio_T = ratio_to(t, "server").exp()
        return clip_removed(ratio_T, t.advantage_T, self.low, self.high, self.dual_clip)

    def metrics(self, t: ObjectiveInputs) -> Metrics:
        numbers = {"bapo_low": self.low, "bapo_high": self.high}
        return super().metrics(t) | constants(numbers, t.logp_T)


@dataclass(frozen=True, kw_only=True)
class M2PO(Objective):
    """M r A with M = 0 on the largest |log r| until the mean of log^2 r is <= budget (arXiv 2510.01161).

    Only with correction "none": r corrects for q.
    """

    budget: float = 0.04
    """Largest second moment of log r over the tokens in scope that are kept."""
    scope: Literal["outward", "all"] = "outward"
    """Tokens that are counted and may be dropped: those that the update moves further away (A > 0 with r > 1,
    A < 0 with r < 1; the authors' code) or all (AReaL)."""

    def __post_init__(self) -> None:
        ok = 0 < self.budget < math.inf
        check_that(ok, "budget", self.budget, "be a finite number > 0", "Use 0.04.")

    @property
    def corrects(self) -> bool:
        return True

    @torch.no_grad()
    def prepare(
        self, scores: Scores, sum_over_batch: SumOverBatch, number_alike: NumberAlike
    ) -> "PreparedM2PO":
        """The same method with the largest |log r| it keeps. Sums over the batch once: a histogram."""
        log_ratio_MT, mask_MT = masked_log_ratio(scores)
        counted_MT = mask_MT & self.in_scope(log_ratio_MT, scores.batch.advantage_MT)
        distance_MT = torch.where(counted_MT, log_ratio_MT, 0.0).double().abs()
        edges = _edges(distance_MT.device)
        bin_N = torch.bucketize(distance_MT, edges).flatten()
        terms_N2 = torch.stack([counted_MT.double(), distance_MT.square()], -1).flatten(0, 1)
        histogram = torch.zeros(len(edges), 2, dtype=torch.float64, device=edges.device)
        histogram = sum_over_batch(histogram.index_add_(0, bin_N, terms_N2))
        count, moment = running_sum(histogram).unbind(-1)
        num_kept = int((moment <= self.budget * count).sum())
        last = edges[num_kept - 1].item() if num_kept else 0.0
        threshold = math.inf if num_kept == len(edges) else last
        return PreparedM2PO(**knobs_of(self, M2PO), threshold=threshold)

    def in_scope(self, log_ratio_T: Tensor, advantage_T: Tensor) -> Tensor:
        if self.scope == "all":
            return torch.ones_like(log_ratio_T, dtype=torch.bool)
        return (log_ratio_T * advantage_T) > 0

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        raise unprepared("m2po")

    def removed(self, t: ObjectiveInputs) -> Tensor:
        raise unprepared("m2po")


@dataclass(frozen=True, kw_only=True)
class PreparedM2PO(M2PO):
    """M2PO with the threshold of one mini-batch."""

    threshold: float

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        ratio_T = ratio_to(t, "server").exp()
        return (ratio_T * t.advantage_T).masked_fill(self.removed(t), 0.0)

    def removed(self, t: ObjectiveInputs) -> Tensor:
        log_ratio_T = ratio_to(t, "server").detach()
        far_T = log_ratio_T.double().abs() > self.threshold
        return t.valid_T & far_T & self.in_scope(log_ratio_T, t.advantage_T)

    def metrics(self, t: ObjectiveInputs) -> Metrics:
        numbers = {"m2po_threshold": min(self.threshold, LOG_RATIO_LIMIT)}
        return super().metrics(t) | constants(numbers, t.logp_T)


def _edges(device: torch.device) -> Tensor:
    """Upper edges of bins of |log r|, each 0.3% wide, from 1e-4 to the clamp of log-ratios."""
    edges = torch.logspace(-4, math.log10(LOG_RATIO_LIMIT), 4096, dtype=torch.float64, device=device)
    edges[-1] = LOG_RATIO_LIMIT
    return edges


def _steps(start: float, end: float, step: float) -> list[float]:
    num = math.ceil((end - start) / step - 1e-9)
    return [start + i * step for i in range(num)] + [end]
