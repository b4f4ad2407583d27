"""Jackpot: OBRS acceptance, the normaliser Z and the weight, as a correction; and its control z_tis.

Shapes: M micro-batches of T tokens, K candidates. Everything is detached.
Sources: P = arXiv 2602.06107, R = its public verl fork.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_jackpot.algorithm.correction_base import CorrectionMethod, corrected
from megatron_jackpot.algorithm.diagnostics import by_tokens, global_quantiles, mean_over, means_over
from megatron_jackpot.algorithm.divergence import candidate_kl_after
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
from megatron_jackpot.algorithm.tokens import SampledLogp, SumOverBatch, sampled_logp
from megatron_jackpot.records import Correction, Metrics, Scores


@dataclass(frozen=True, kw_only=True)
class Normaliser(CorrectionMethod):
    """Acceptance and its mean Z, estimated or exact; shared by jackpot and z_tis."""

    seeded: ClassVar[bool] = True

    seed: int = 0
    """Key of the accept draws, together with step, rollout id and position."""
    lam: float = 1.0
    """Accept with min(1, p_target / (lam q)): larger rejects more and lands closer to the target."""
    cap: float = 3.0
    """c1, the cap on p_target / q'."""
    z: Literal["topk", "exact"] = "topk"
    """Normaliser from the candidates (paper), or over the whole vocabulary from the logits of policy and
    actor; where the policy samples both are one, and exact Z is min(1, 1 / lam)."""
    candidates: Literal["union", "intersection"] = "union"
    """Ids behind Z_k: in the server's or the policy's top-k (paper), or in both (R)."""
    z_correction: Literal["none", "kappa", "tail"] = "kappa"
    """kappa scales Z_k so that its mean is the acceptance (P 4.4.2); tail adds a share of the uncovered
    mass."""
    kappa_from: Literal["bernoulli", "expected"] | None = None
    """Acceptance behind kappa: drawn (paper) or expected (half the noise); null: drawn where draws decide."""
    kappa_over: Literal["minibatch", "microbatch"] = "minibatch"
    """Tokens behind one kappa: the global mini-batch (paper), or a micro-batch (R; depends on packing)."""

    z_clamp: Literal["limit", "none"] = "limit"
    """kappa Z_k is at most min(1, 1 / lam), which no Z can exceed, or is left as it comes out (P)."""

    def __post_init__(self) -> None:
        check_lam(self.lam)
        check_cap("cap", self.cap)

    @property
    def needs_exact_overlap(self) -> bool:
        return self.z == "exact"

    @property
    def draws(self) -> bool:
        """Whether the method's own mask is drawn."""
        return False

    def accepted(self, logp: SampledLogp, scores: Scores) -> tuple[Tensor, Tensor]:
        """(accept probability [M, T], drawn [M, T] bool), 0 and False outside the valid tokens."""
        batch = scores.batch
        accept_MT = torch.where(logp.valid, accept_prob(logp.target, logp.server, self.lam), 0.0)
        drawn_MT = draw_keep(accept_MT, self.seed, scores.step, batch.rollout_id_MT3, batch.position_MT)
        return accept_MT, drawn_MT

    def overlap(
        self, accept_MT: Tensor, drawn_MT: Tensor, scores: Scores, sum_over_batch: SumOverBatch
    ) -> tuple[Tensor, Tensor, Metrics]:
        """(Z [M, T], Z_k [M, T], metrics), 0 outside the mask. Sums over the batch: 1 for kappa, tail."""
        if self.z == "exact":
            z_MT = self._exact(scores)
            return z_MT, z_MT, {}
        z_k_MT = self._topk(scores)
        if self.z_correction == "tail":
            z_MT, eta = self._tail(accept_MT, z_k_MT, scores, sum_over_batch)
            return z_MT, z_k_MT, {"jackpot/eta": by_tokens(eta, scores.batch.mask_MT)}
        if self.z_correction == "none":
            return z_k_MT, z_k_MT, {}
        drawn = self.draws if self.kappa_from is None else self.kappa_from == "bernoulli"
        used_MT, mask_MT = drawn_MT.to(accept_MT) if drawn else accept_MT, scores.batch.mask_MT
        if self.kappa_over == "minibatch":
            kappa_ = kappa(used_MT, z_k_MT, mask_MT, sum_over_batch)
        else:
            kappa_ = _kappa_of_microbatches(used_MT, z_k_MT, mask_MT)
        z_MT = (kappa_ * z_k_MT).to(z_k_MT)
        if self.z_clamp == "limit":
            z_MT = z_MT.clamp(max=overlap_limit(self.lam))
        return z_MT, z_k_MT, {"jackpot/kappa": by_tokens(kappa_, mask_MT)}

    def _topk(self, scores: Scores) -> Tensor:
        outside_MTK = ~scores.batch.mask_MT[..., None]
        if self.candidates == "intersection":
            outside_MTK = outside_MTK | ~scores.candidate_shared_MTK
        both = (scores.candidate_target_logp_MTK, scores.candidate_server_logp_MTK)
        target_MTK, server_MTK = (logp_MTK.masked_fill(outside_MTK, -math.inf) for logp_MTK in both)
        return overlap_mass(target_MTK, server_MTK, self.lam)

    def _tail(
        self, accept_MT: Tensor, z_k_MT: Tensor, scores: Scores, sum_over_batch: SumOverBatch
    ) -> tuple[Tensor, Tensor]:
        mask_MT, sampled_MT1 = scores.batch.mask_MT, scores.batch.labels_MT[..., None]
        server_MTK = scores.candidate_server_logp_MTK.masked_fill(~mask_MT[..., None], -math.inf)
        if self.candidates == "intersection":
            server_MTK = server_MTK.masked_fill(~scores.candidate_shared_MTK, -math.inf)
        target_MTK = scores.candidate_target_logp_MTK.masked_fill(~mask_MT[..., None], -math.inf)
        inside_MT = ((scores.candidate_ids_MTK == sampled_MT1) & (server_MTK > -math.inf)).any(-1)
        return tail_correction(
            accept_MT, inside_MT, target_MTK, server_MTK, z_k_MT, self.lam, mask_MT, sum_over_batch
        )

    def _exact(self, scores: Scores) -> Tensor:
        if scores.exact_overlap_MT is None:
            raise RuntimeError("z = 'exact' was not scored: the scorer must be told to compute it.")
        return torch.where(scores.batch.mask_MT, scores.exact_overlap_MT, 0.0)


@dataclass(frozen=True, kw_only=True)
class Jackpot(Normaliser):
    """OBRS acceptance and reweighting (P Alg. 1, Eq. 5); the defaults are the paper's form."""

    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "paper": {},
        "reference": dict(candidates="intersection", kappa_over="microbatch", clip_order="before_z"),
        "recommended": dict(mask="expected", z_correction="tail", denominator="all"),
    }

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
        accept_MT, drawn_MT = self.accepted(logp, scores)
        z_MT, z_k_MT, z_metrics = self.overlap(accept_MT, drawn_MT, scores, sum_over_batch)
        capped_MT = jackpot_weight(logp.target, logp.server, z_MT, self.lam, self.cap, self.clip_order)
        rho_MT = capped_MT
        if self.policy_cap is not None:
            rho_MT = capped_MT * drift_weight(logp.policy, logp.target, self.policy_cap)
        used_MT = drawn_MT.to(accept_MT) if self.draws else accept_MT
        keep_MT = used_MT > 0
        return corrected(
            scores,
            keep=keep_MT,
            weight=used_MT * rho_MT,
            counted=used_MT if self.denominator == "accepted" else scores.batch.mask_MT,
            accept=accept_MT,
            metrics={
                **overlap_metrics(self.lam, accept_MT, drawn_MT, z_MT, z_k_MT, scores, sum_over_batch),
                **z_metrics,
                **self._cap_fractions(logp, z_MT, capped_MT, keep_MT),
            },
        )

    def _cap_fractions(self, logp: SampledLogp, z_MT: Tensor, capped_MT: Tensor, keep_MT: Tensor) -> Metrics:
        """Shares of the kept tokens whose weight was lowered by c1, to `capped_MT`, and by c2."""
        uncapped_MT = jackpot_weight(logp.target, logp.server, z_MT, self.lam, math.inf, self.clip_order)
        over_cap_MT = uncapped_MT > capped_MT
        policy_cap = math.inf if self.policy_cap is None else self.policy_cap
        over_policy_cap_MT = log_ratio(logp.policy, logp.target).exp() > policy_cap
        shares = {"jackpot/cap_fraction": over_cap_MT, "jackpot/policy_cap_fraction": over_policy_cap_MT}
        return means_over(shares, keep_MT)


@dataclass(frozen=True, kw_only=True)
class ZTruncatedIS(Normaliser):
    """z_tis: min(Z r, cap) without any mask: what Jackpot is in expectation (docs/corrections.md)."""

    @torch.no_grad()
    def __call__(self, scores: Scores, sum_over_batch: SumOverBatch) -> Correction:
        """r = p_target / q. Sums over the batch: as Jackpot. Raises ValueError as Jackpot."""
        logp = sampled_logp(scores)
        accept_MT, drawn_MT = self.accepted(logp, scores)
        z_MT, z_k_MT, z_metrics = self.overlap(accept_MT, drawn_MT, scores, sum_over_batch)
        weight_MT = z_MT * log_ratio(logp.target, logp.server).exp()
        return corrected(
            scores,
            keep=logp.valid,
            weight=weight_MT.clamp(max=self.cap),
            counted=scores.batch.mask_MT,
            accept=accept_MT,
            metrics={
                **overlap_metrics(self.lam, accept_MT, drawn_MT, z_MT, z_k_MT, scores, sum_over_batch),
                **z_metrics,
                "jackpot/cap_fraction": mean_over(weight_MT > self.cap, logp.valid),
            },
        )


def overlap_metrics(
    lam: float,
    accept_MT: Tensor,
    drawn_MT: Tensor,
    z_MT: Tensor,
    z_k_MT: Tensor,
    scores: Scores,
    sum_over_batch: SumOverBatch,
) -> Metrics:
    """Acceptance, Z and its quantiles, KL after rejection. Sums over the batch once."""
    mask_MT = scores.batch.mask_MT
    candidates = (scores.candidate_target_logp_MTK, scores.candidate_server_logp_MTK)
    levels = {"jackpot/z_p01": 0.01, "jackpot/z_p05": 0.05, "jackpot/z_p50": 0.5}
    quantiles = global_quantiles(z_MT, mask_MT, list(levels.values()), sum_over_batch)
    one = torch.ones([], dtype=torch.float64, device=z_MT.device)
    means = {
        "jackpot/acceptance": drawn_MT,
        "jackpot/acceptance_expected": accept_MT,
        "jackpot/z": z_MT,
        "jackpot/z_topk": z_k_MT,
        "jackpot/z_zero_fraction": z_MT == 0,
        "jackpot/kl_after": candidate_kl_after(*candidates, lam),
    }
    return {
        **means_over(means, mask_MT),
        "jackpot/lam": (one * lam, one),
        **{name: by_tokens(value, mask_MT) for name, value in zip(levels, quantiles, strict=True)},
    }


def _kappa_of_microbatches(used_MT: Tensor, z_k_MT: Tensor, mask_MT: Tensor) -> Tensor:
    """kappa of every micro-batch, float64 [M, 1] (R)."""
    accepted_M1, overlap_M1 = (
        torch.where(mask_MT, value.double(), 0.0).sum(-1, keepdim=True) for value in (used_MT, z_k_MT)
    )
    return torch.where(overlap_M1 > 0, accepted_M1 / overlap_M1, 1.0)
