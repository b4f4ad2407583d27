"""Corrections: from samples of the server to (keep, weight, count) for the policy's loss.

policy loss = -sum keep * weight * surrogate / N, N the global sum of count. A method is a frozen dataclass:
its fields are the keys under `algorithm.correction` in YAML. Everything is detached.
Shapes: T tokens of this rank's mini-batch, K candidates.
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
    check_sampled,
    draw_keep,
    drift_weight,
    jackpot_weight,
    kappa,
    log_ratio,
    overlap_limit,
    overlap_mass,
)
from megatron_jackpot.algorithm.registry import check_choice
from megatron_jackpot.algorithm.scores import Correction, Scores, SumOverBatch


@dataclass(frozen=True, kw_only=True)
class NoCorrection:
    """weight = 1 on every token: plain GRPO on another model's samples."""

    @torch.no_grad()
    def __call__(self, scores: Scores, sum_over_batch: SumOverBatch) -> Correction:
        """Raises ValueError for a non-finite server log-prob inside the mask. Sums over the batch: 0."""
        keep_T = sampled_logp(scores).possible_T
        return Correction(keep_T=keep_T, weight_T=keep_T.float(), count=scores.mask_T.double().sum())


@dataclass(frozen=True, kw_only=True)
class TruncatedIS:
    """TIS: weight = min(p_old / q, cap)."""

    cap: float = 2.0
    """C, the largest weight."""

    def __post_init__(self) -> None:
        check_cap("cap", self.cap)

    @torch.no_grad()
    def __call__(self, scores: Scores, sum_over_batch: SumOverBatch) -> Correction:
        """Raises ValueError for a non-finite server log-prob inside the mask. Sums over the batch: 0."""
        logp = sampled_logp(scores)
        rho_T = log_ratio(logp.policy_T, logp.server_T).exp()
        weight_T = torch.where(logp.possible_T, rho_T.clamp(max=self.cap), 0.0)
        metrics = {"tis/cap_fraction": mean_over(rho_T > self.cap, logp.possible_T)}
        count = scores.mask_T.double().sum()
        return Correction(keep_T=logp.possible_T, weight_T=weight_T, count=count, metrics=metrics)


@dataclass(frozen=True, kw_only=True)
class Jackpot:
    """OBRS acceptance and reweighting (P Alg. 1, Eq. 5); the defaults are the paper's form."""

    seed: int = 0
    """Key of the accept draws, together with step, rollout id and position."""
    lam: float = 1.0
    """Accept with min(1, p_target / (lam q)): larger rejects more and lands closer to the target."""
    cap: float = 3.0
    """c1, the cap on p_target / q'."""
    policy_cap: float | None = 1.28
    """c2, the cap on p_old / p_target; null drops that factor."""
    mask: Literal["bernoulli", "expected"] = "bernoulli"
    """bernoulli draws which tokens stay (paper); expected weights every token by its accept probability."""
    z: Literal["topk", "exact"] = "topk"
    """Normaliser from the candidates (paper) or from the whole vocabulary."""
    z_correction: Literal["none", "kappa"] = "kappa"
    """kappa scales Z_k so that its mean is the acceptance of the global mini-batch (P 4.4.2)."""
    kappa_from: Literal["bernoulli", "expected"] | None = None
    """Acceptance behind kappa: drawn (paper) or expected (half the noise); null follows `mask`."""
    clip_order: Literal["after_z", "before_z"] = "after_z"
    """c1 applied to Z max(lam, r) (paper) or to r / lam before Z (R)."""
    denominator: Literal["accepted", "all"] = "accepted"
    """N counts accepted tokens (paper) or all (rejection then does not raise the step size)."""

    def __post_init__(self) -> None:
        check_lam(self.lam)
        check_cap("cap", self.cap)
        if self.policy_cap is not None:
            check_cap("policy_cap", self.policy_cap)
        check_choice("mask", self.mask, ("bernoulli", "expected"))
        check_choice("z", self.z, ("topk", "exact"))
        check_choice("z_correction", self.z_correction, ("none", "kappa"))
        check_choice("kappa_from", self.kappa_from, (None, "bernoulli", "expected"))
        check_choice("clip_order", self.clip_order, ("after_z", "before_z"))
        check_choice("denominator", self.denominator, ("accepted", "all"))
        if self.z == "exact":
            raise ValueError("z = 'exact': the scoring pass does not compute it yet. Use z='topk'.")

    @torch.no_grad()
    def __call__(self, scores: Scores, sum_over_batch: SumOverBatch) -> Correction:
        """keep * min(Z max(lam, r), c1) * min(p_old / p_target, c2), r = p_target / q.

        Sums over the batch: 1 for kappa where it is used, 1 for the quantiles of Z.
        Raises ValueError for a non-finite server log-prob inside the mask or a NaN.
        """
        logp = sampled_logp(scores)
        accept_T = torch.where(logp.possible_T, accept_prob(logp.target_T, logp.server_T, self.lam), 0.0)
        drawn_T = draw_keep(accept_T, self.seed, scores.step, scores.rollout_id_T3, scores.position_T)
        chance_T = {"bernoulli": drawn_T.to(accept_T), "expected": accept_T}
        z_k_T = self._candidate_overlap(scores)
        z_T, kappa_ = z_k_T, torch.ones([], dtype=torch.float64, device=z_k_T.device)
        if self.z_correction == "kappa":
            kappa_ = kappa(chance_T[self.kappa_from or self.mask], z_k_T, scores.mask_T, sum_over_batch)
            z_T = (kappa_ * z_k_T).to(z_k_T).clamp(max=overlap_limit(self.lam))

        rho_T = jackpot_weight(logp.target_T, logp.server_T, z_T, self.lam, self.cap, self.clip_order)
        if self.policy_cap is not None:
            rho_T = rho_T * drift_weight(logp.policy_T, logp.target_T, self.policy_cap)
        used_T = chance_T[self.mask]
        keep_T = used_T > 0
        counted_T = used_T if self.denominator == "accepted" else scores.mask_T
        return Correction(
            keep_T=keep_T,
            weight_T=torch.where(keep_T, used_T * rho_T, 0.0),
            count=counted_T.double().sum(),
            metrics={
                "jackpot/acceptance": mean_over(drawn_T, scores.mask_T),
                "jackpot/acceptance_expected": mean_over(accept_T, scores.mask_T),
                "jackpot/kappa": (kappa_, torch.ones_like(kappa_)),
                "jackpot/z": mean_over(z_T, scores.mask_T),
                "jackpot/z_topk": mean_over(z_k_T, scores.mask_T),
                "jackpot/z_zero_fraction": mean_over(z_T == 0, scores.mask_T),
                **self._quantiles(z_T, scores, sum_over_batch),
                **self._cap_fractions(logp, z_T, keep_T),
                "jackpot/kl_after": mean_over(self._kl_after(scores), scores.mask_T),
            },
        )

    def _candidate_overlap(self, scores: Scores) -> Tensor:
        """Z_k of every token, 0 outside the mask."""
        outside_T1 = ~scores.mask_T[:, None]
        target_TK = scores.candidate_target_logp_TK.masked_fill(outside_T1, -math.inf)
        server_TK = scores.candidate_server_logp_TK.masked_fill(outside_T1, -math.inf)
        return overlap_mass(target_TK, server_TK, self.lam)

    def _kl_after(self, scores: Scores) -> Tensor:
        return candidate_kl_after(scores.candidate_target_logp_TK, scores.candidate_server_logp_TK, self.lam)

    def _quantiles(self, z_T: Tensor, scores: Scores, sum_over_batch: SumOverBatch) -> Metrics:
        levels = {"jackpot/z_p01": 0.01, "jackpot/z_p05": 0.05, "jackpot/z_p50": 0.5}
        values = global_quantiles(z_T, scores.mask_T, list(levels.values()), sum_over_batch)
        return {name: (value, torch.ones_like(value)) for name, value in zip(levels, values, strict=True)}

    def _cap_fractions(self, logp: "SampledLogp", z_T: Tensor, keep_T: Tensor) -> Metrics:
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


CORRECTIONS = {"none": NoCorrection, "tis": TruncatedIS, "jackpot": Jackpot}


@dataclass(frozen=True, kw_only=True)
class SampledLogp:
    """Checked log-probs of the sampled tokens, 0 outside the mask."""

    policy_T: Tensor
    target_T: Tensor
    server_T: Tensor
    possible_T: Tensor
    """The mask without tokens to which policy or target give probability 0: they cannot be trained on."""


def sampled_logp(s: Scores) -> SampledLogp:
    """Raises ValueError for a non-finite server log-prob or a NaN of policy or target inside the mask."""
    three = (s.policy_logp_T, s.target_logp_T, s.server_logp_T)
    policy_T, target_T, server_T = (torch.where(s.mask_T, logp_T, 0.0) for logp_T in three)
    check_sampled(policy_T, server_T)
    check_sampled(target_T, server_T)
    possible_T = s.mask_T & (policy_T > -math.inf) & (target_T > -math.inf)
    return SampledLogp(policy_T=policy_T, target_T=target_T, server_T=server_T, possible_T=possible_T)
