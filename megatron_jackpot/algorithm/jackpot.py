"""Jackpot: OBRS acceptance, the normaliser Z and the weight, as a correction; and its control z_tis.

Shapes: T tokens of this rank's mini-batch, K candidates. Everything is detached.
Sources: P = arXiv 2602.06107, R = its public verl fork.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_jackpot.algorithm.diagnostics import Metrics, candidate_kl_after, global_quantiles, mean_over
from megatron_jackpot.algorithm.obrs import (
    accept_prob,
    check_cap,
    check_lam,
    draw_keep,
    drift_weight,
    jackpot_weight,
    kappa,
    log_ratio,
    overlap_limit,
    overlap_mass,
    tail_correction,
)
from megatron_jackpot.algorithm.registry import check_choice
from megatron_jackpot.algorithm.scores import Correction, SampledLogp, Scores, SumOverBatch, sampled_logp


@dataclass(frozen=True, kw_only=True)
class Normaliser:
    """Acceptance and its mean Z, estimated or exact; shared by jackpot and z_tis."""

    seed: int = 0
    """Key of the accept draws, together with step, rollout id and position."""
    lam: float = 1.0
    """Accept with min(1, p_target / (lam q)): larger rejects more and lands closer to the target."""
    cap: float = 3.0
    """c1, the cap on p_target / q'."""
    z: Literal["topk", "exact"] = "topk"
    """Normaliser from the candidates (paper), or over the whole vocabulary from the logits of policy and
    actor."""
    candidates: Literal["union", "intersection"] = "union"
    """Ids behind Z_k: in the server's or the policy's top-k (paper), or in both (R)."""
    z_correction: Literal["none", "kappa", "tail"] = "kappa"
    """kappa scales Z_k so that its mean is the acceptance (P 4.4.2); tail adds a share of the uncovered
    mass."""
    kappa_from: Literal["bernoulli", "expected"] | None = None
    """Acceptance behind kappa: drawn (paper) or expected (half the noise); null: drawn where draws decide."""
    kappa_over: Literal["minibatch", "microbatch"] = "minibatch"
    """Tokens behind one kappa: the global mini-batch (paper), or a micro-batch (R; depends on packing)."""

    def __post_init__(self) -> None:
        check_lam(self.lam)
        check_cap("cap", self.cap)
        check_choice("z", self.z, ("topk", "exact"))
        check_choice("candidates", self.candidates, ("union", "intersection"))
        check_choice("z_correction", self.z_correction, ("none", "kappa", "tail"))
        check_choice("kappa_from", self.kappa_from, (None, "bernoulli", "expected"))
        check_choice("kappa_over", self.kappa_over, ("minibatch", "microbatch"))

    @property
    def draws(self) -> bool:
        """Whether the method's own mask is drawn."""
        return False

    def acceptance(self, logp: SampledLogp, scores: Scores) -> tuple[Tensor, Tensor]:
        """(accept probability [T], drawn [T] bool), 0 and False outside the possible tokens."""
        accept_T = torch.where(logp.possible_T, accept_prob(logp.target_T, logp.server_T, self.lam), 0.0)
        return accept_T, draw_keep(accept_T, self.seed, scores.step, scores.rollout_id_T3, scores.position_T)

    def overlap(
        self, accept_T: Tensor, drawn_T: Tensor, scores: Scores, sum_over_batch: SumOverBatch
    ) -> tuple[Tensor, Tensor, Metrics]:
        """(Z [T], Z_k [T], metrics), 0 outside the mask. Sums over the batch: 1 for kappa and for tail."""
        if self.z == "exact":
            z_T = self._exact(scores)
            return z_T, z_T, {}
        z_k_T = self._topk(scores)
        one = torch.ones([], dtype=torch.float64, device=z_k_T.device)
        if self.z_correction == "tail":
            z_T, eta = self._tail(accept_T, z_k_T, scores, sum_over_batch)
            return z_T, z_k_T, {"jackpot/eta": (eta, one)}
        if self.z_correction == "none":
            return z_k_T, z_k_T, {}
        drawn = self.draws if self.kappa_from is None else self.kappa_from == "bernoulli"
        used_T = drawn_T.to(accept_T) if drawn else accept_T
        if self.kappa_over == "minibatch":
            kappa_ = kappa(used_T, z_k_T, scores.mask_T, sum_over_batch)
        else:
            kappa_ = _kappa_of_microbatches(used_T, z_k_T, scores)
        z_T = (kappa_ * z_k_T).to(z_k_T).clamp(max=overlap_limit(self.lam))
        mean = mean_over(kappa_.expand_as(z_k_T), scores.mask_T)
        return z_T, z_k_T, {"jackpot/kappa": mean}

    def _topk(self, scores: Scores) -> Tensor:
        outside_TK = ~scores.mask_T[:, None]
        if self.candidates == "intersection":
            outside_TK = outside_TK | ~scores.candidate_shared_TK
        both = (scores.candidate_target_logp_TK, scores.candidate_server_logp_TK)
        return overlap_mass(*(logp.masked_fill(outside_TK, -math.inf) for logp in both), self.lam)

    def _tail(
        self, accept_T: Tensor, z_k_T: Tensor, scores: Scores, sum_over_batch: SumOverBatch
    ) -> tuple[Tensor, Tensor]:
        server_TK = scores.candidate_server_logp_TK.masked_fill(~scores.mask_T[:, None], -math.inf)
        if self.candidates == "intersection":
            server_TK = server_TK.masked_fill(~scores.candidate_shared_TK, -math.inf)
        target_TK = scores.candidate_target_logp_TK.masked_fill(~scores.mask_T[:, None], -math.inf)
        inside_T = ((scores.candidate_ids_TK == scores.token_T[:, None]) & (server_TK > -math.inf)).any(-1)
        return tail_correction(
            accept_T, inside_T, target_TK, server_TK, z_k_T, self.lam, scores.mask_T, sum_over_batch
        )

    def _exact(self, scores: Scores) -> Tensor:
        if scores.exact_overlap_T is None:
            raise RuntimeError("z = 'exact' was not scored: the scorer must be told to compute it.")
        return torch.where(scores.mask_T, scores.exact_overlap_T, 0.0)


@dataclass(frozen=True, kw_only=True)
class Jackpot(Normaliser):
    """OBRS acceptance and reweighting (P Alg. 1, Eq. 5); the defaults are the paper's form."""

    policy_cap: float | None = 1.28
    """c2, the cap on p_old / p_target; null drops that factor."""
    mask: Literal["bernoulli", "expected"] = "bernoulli"
    """bernoulli draws which tokens stay (paper); expected weights every token by its accept probability."""
    clip_order: Literal["after_z", "before_z"] = "after_z"
    """c1 applied to Z max(lam, r) (paper) or to r / lam before Z (R)."""
    denominator: Literal["accepted", "all"] = "accepted"
    """N counts accepted tokens (paper) or all (rejection then does not raise the step size)."""
    target_acceptance: float | None = None
    """Mean acceptance that lam is steered to, one batch behind, within [0.2, 5]; null keeps lam."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy_cap is not None:
            check_cap("policy_cap", self.policy_cap)
        check_choice("mask", self.mask, ("bernoulli", "expected"))
        check_choice("clip_order", self.clip_order, ("after_z", "before_z"))
        check_choice("denominator", self.denominator, ("accepted", "all"))
        if self.target_acceptance is not None and not 0 < self.target_acceptance < 1:
            raise ValueError(
                f"target_acceptance = {self.target_acceptance}: must lie in (0, 1). Use 0.9 or null."
            )

    @property
    def draws(self) -> bool:
        return self.mask == "bernoulli"

    @torch.no_grad()
    def __call__(self, scores: Scores, sum_over_batch: SumOverBatch) -> Correction:
        """keep * min(Z max(lam, r), c1) * min(p_old / p_target, c2), r = p_target / q.

        Sums over the batch: 1 for kappa or tail where used, 1 for the quantiles of Z.
        Raises ValueError for a non-finite server log-prob inside the mask or a NaN.
        """
        logp = sampled_logp(scores)
        accept_T, drawn_T = self.acceptance(logp, scores)
        z_T, z_k_T, z_metrics = self.overlap(accept_T, drawn_T, scores, sum_over_batch)
        rho_T = jackpot_weight(logp.target_T, logp.server_T, z_T, self.lam, self.cap, self.clip_order)
        if self.policy_cap is not None:
            rho_T = rho_T * drift_weight(logp.policy_T, logp.target_T, self.policy_cap)
        used_T = drawn_T.to(accept_T) if self.draws else accept_T
        keep_T = used_T > 0
        counted_T = used_T if self.denominator == "accepted" else scores.mask_T
        return Correction(
            keep_T=keep_T,
            weight_T=torch.where(keep_T, used_T * rho_T, 0.0),
            count=counted_T.double().sum(),
            metrics={
                **overlap_metrics(self.lam, accept_T, drawn_T, z_T, z_k_T, scores, sum_over_batch),
                **z_metrics,
                **self._cap_fractions(logp, z_T, keep_T),
            },
        )

    def _cap_fractions(self, logp: SampledLogp, z_T: Tensor, keep_T: Tensor) -> Metrics:
        """Shares of the kept tokens whose weight was lowered by c1, and by c2."""
        args = (logp.target_T, logp.server_T, z_T, self.lam)
        over_cap_T = jackpot_weight(*args, math.inf, self.clip_order) > jackpot_weight(
            *args, self.cap, self.clip_order
        )
        policy_cap = math.inf if self.policy_cap is None else self.policy_cap
        over_policy_cap_T = log_ratio(logp.policy_T, logp.target_T).exp() > policy_cap
        return {
            "jackpot/cap_fraction": mean_over(over_cap_T, keep_T),
            "jackpot/policy_cap_fraction": mean_over(over_policy_cap_T, keep_T),
        }


@dataclass(frozen=True, kw_only=True)
class ZTruncatedIS(Normaliser):
    """z_tis: min(Z r, cap) without any mask: what Jackpot is in expectation."""

    @torch.no_grad()
    def __call__(self, scores: Scores, sum_over_batch: SumOverBatch) -> Correction:
        """r = p_target / q. Sums over the batch: as Jackpot. Raises ValueError as Jackpot."""
        logp = sampled_logp(scores)
        accept_T, drawn_T = self.acceptance(logp, scores)
        z_T, z_k_T, z_metrics = self.overlap(accept_T, drawn_T, scores, sum_over_batch)
        weight_T = z_T * log_ratio(logp.target_T, logp.server_T).exp()
        return Correction(
            keep_T=logp.possible_T,
            weight_T=torch.where(logp.possible_T, weight_T.clamp(max=self.cap), 0.0),
            count=scores.mask_T.double().sum(),
            metrics={
                **overlap_metrics(self.lam, accept_T, drawn_T, z_T, z_k_T, scores, sum_over_batch),
                **z_metrics,
                "jackpot/cap_fraction": mean_over(weight_T > self.cap, logp.possible_T),
            },
        )


PRESETS = {
    "paper": {},
    "reference": dict(candidates="intersection", kappa_over="microbatch", clip_order="before_z"),
    "recommended": dict(mask="expected", z_correction="tail", denominator="all"),
}
"""algorithm.correction.preset -> knobs of Jackpot; knobs written beside the preset win."""


def overlap_metrics(
    lam: float,
    accept_T: Tensor,
    drawn_T: Tensor,
    z_T: Tensor,
    z_k_T: Tensor,
    scores: Scores,
    sum_over_batch: SumOverBatch,
) -> Metrics:
    """Acceptance, Z and its quantiles, KL after rejection. Sums over the batch once."""
    candidates = (scores.candidate_target_logp_TK, scores.candidate_server_logp_TK)
    levels = {"jackpot/z_p01": 0.01, "jackpot/z_p05": 0.05, "jackpot/z_p50": 0.5}
    quantiles = global_quantiles(z_T, scores.mask_T, list(levels.values()), sum_over_batch)
    one = torch.ones([], dtype=torch.float64, device=z_T.device)
    return {
        "jackpot/acceptance": mean_over(drawn_T, scores.mask_T),
        "jackpot/acceptance_expected": mean_over(accept_T, scores.mask_T),
        "jackpot/lam": (one * lam, one),
        "jackpot/z": mean_over(z_T, scores.mask_T),
        "jackpot/z_topk": mean_over(z_k_T, scores.mask_T),
        "jackpot/z_zero_fraction": mean_over(z_T == 0, scores.mask_T),
        "jackpot/kl_after": mean_over(candidate_kl_after(*candidates, lam), scores.mask_T),
        **{name: (value, one) for name, value in zip(levels, quantiles, strict=True)},
    }


def _kappa_of_microbatches(used_T: Tensor, z_k_T: Tensor, scores: Scores) -> Tensor:
    """kappa of every token's own micro-batch, float64 [T] (R)."""
    index_T = scores.microbatch_T - scores.microbatch_T.min()
    zeros_M = torch.zeros(int(index_T.max()) + 1, dtype=torch.float64, device=z_k_T.device)
    accepted_M, overlap_M = (
        zeros_M.index_add(0, index_T, torch.where(scores.mask_T, value_T.double(), 0.0))
        for value_T in (used_T, z_k_T)
    )
    return torch.where(overlap_M > 0, accepted_M / overlap_M, 1.0)[index_T]
