"""Objectives that fit the policy to p* ~ p_ref exp(r / b), the optimum under a KL to the frozen reference,
and do so whatever law the responses were sampled from.

Shapes: M micro-batches of T tokens; S responses of this rank's mini-batch and one that is nobody's, N
responses of the whole mini-batch and that one, G prompts of them, P prompts of a table. y is a whole
response, r its reward, q the server's law.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megatron_jackpot.algorithm.diagnostics import mean_over
from megatron_jackpot.algorithm.objectives_base import (
    Objective,
    check_that,
    constants,
    knobs_of,
    unprepared,
)
from megatron_jackpot.algorithm.obrs import log_ratio
from megatron_jackpot.algorithm.tokens import NumberAlike, SumOverBatch, sampled_logp, segment_reduce
from megatron_jackpot.records import Metrics, ObjectiveInputs, Scores

BISECTIONS = 50
"""Halvings of kappa's interval."""


@dataclass(frozen=True, kw_only=True)
class Regression(Objective):
    """Only with correction "none": none is needed, or it is part of the method."""

    @property
    def corrects(self) -> bool:
        return True

    @property
    def needs_reference(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class DMPO(Regression):
    """n (w - scale b) log p over a group of n: w = softmax of kappa (log p_ref(y) / q(y) + r / alpha) makes
    samples of q those of p*, the baseline b takes the mean off (arXiv 2510.08233, read autoregressively).

    r is the advantage: a number that a group has in common changes neither w nor b.
    """

    alpha: float = 0.04
    """Temperature of p* ~ p_ref exp(r / alpha)."""
    baseline: Literal["negative", "mean", "model"] = "negative"
    """b: softmax of kappa (log p_ref / q - r / alpha), 1 / n, or softmax of log p / q."""
    scale: float = 1.0
    """Of the baseline."""
    kappa: float = 1.0
    """Power of the weights: 1 is importance sampling towards p*."""
    least_ess: float | None = 0.7
    """kappa of a group is lowered until the effective sample size of w, over n, is at least this; null keeps
    kappa."""

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("kappa", self.kappa)):
            check_that(0 < value < math.inf, name, value, "be finite and > 0", "Use 0.04 and 1.0.")
        check_that(0 <= self.scale < math.inf, "scale", self.scale, "be finite and >= 0", "Use 1.0.")
        if self.least_ess is not None:
            ok = 0 < self.least_ess < 1
            check_that(ok, "least_ess", self.least_ess, "lie in (0, 1)", "Use 0.7, or null.")

    @torch.no_grad()
    def prepare(
        self, scores: Scores, sum_over_batch: SumOverBatch, number_alike: NumberAlike
    ) -> "PreparedDMPO":
        """The same method with n (w - scale b) of every response: a prompt's may lie on several ranks.

        Asks `number_alike` twice and sums over the batch once, [N, 5].
        """
        ids_S3, found_S4 = _responses(scores)
        index_S, num = number_alike(ids_S3)
        prompt_S, num_prompts = number_alike(ids_S3[:, :2])
        table_N5 = torch.zeros(num, 5, dtype=torch.float64, device=ids_S3.device)
        mine_S5 = torch.cat([found_S4, prompt_S[:, None]], -1) * found_S4[:, :1]
        counted_N, reference_N, model_N, reward_N, prompt_N = sum_over_batch(
            table_N5.index_add(0, index_S, mine_S5)
        ).unbind(-1)
        there_N = counted_N > 0
        group = Groups(prompt_N.long(), num_prompts, there_N)
        # From a group's largest on, so that equal rewards are 0 and not its mean's rounding.
        reward_N = (reward_N - group.largest(reward_N)) / self.alpha
        kappa_N = self._kappa(reference_N + reward_N, group)
        weight_N = group.softmax(kappa_N * (reference_N + reward_N))
        if self.baseline == "mean":
            base_N = 1 / group.size()
        else:
            logit_N = model_N if self.baseline == "model" else kappa_N * (reference_N - reward_N)
            base_N = group.softmax(logit_N)
        coefficient_N = torch.where(there_N, group.size() * (weight_N - self.scale * base_N), 0.0)
        share_N = 1 / (group.size() * group.sum(weight_N.square()))
        return PreparedDMPO(
            **knobs_of(self, DMPO),
            coefficient_S=coefficient_N[index_S],
            mean_kappa=float(kappa_N[there_N].mean()) if there_N.any() else self.kappa,
            mean_ess=float(share_N[there_N].mean()) if there_N.any() else 1.0,
        )

    def _kappa(self, logit_N: Tensor, group: "Groups") -> Tensor:
        """The largest kappa of each response's group, up to the set one, with which w is even enough."""
        low_N, high_N = torch.zeros_like(logit_N), torch.full_like(logit_N, self.kappa)
        least = self.least_ess
        if least is None:
            return high_N

        def even(kappa_N: Tensor) -> Tensor:
            squares_N = group.sum(group.softmax(kappa_N * logit_N).square())
            return squares_N * group.size() * least <= 1

        kept_N = even(high_N)
        for _ in range(BISECTIONS):
            middle_N = (low_N + high_N) / 2
            fits_N = even(middle_N)
            low_N, high_N = torch.where(fits_N, middle_N, low_N), torch.where(fits_N, high_N, middle_N)
        return torch.where(kept_N, self.kappa, low_N)

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        raise unprepared("dmpo")


@dataclass(frozen=True, kw_only=True)
class PreparedDMPO(DMPO):
    """DMPO with the weights of one mini-batch."""

    coefficient_S: Tensor = field(compare=False, repr=False)
    """By the number of a response on this rank; the last one is nobody's."""
    mean_kappa: float
    mean_ess: float

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        coefficient_T = self.coefficient_S[t.segment_T].to(t.logp_T.dtype)
        return torch.where(t.valid_T, coefficient_T * t.logp_T, 0.0)

    def metrics(self, t: ObjectiveInputs) -> Metrics:
        numbers = {"dmpo_kappa": self.mean_kappa, "dmpo_ess": self.mean_ess}
        return super().metrics(t) | constants(numbers, t.logp_T)


@dataclass(frozen=True)
class Groups:
    """Which of N responses belong to one prompt; those that are not `there_N` count for nothing."""

    index_N: Tensor
    num: int
    there_N: Tensor

    def sum(self, value_N: Tensor) -> Tensor:
        """Over its group, on each response."""
        sums_G = value_N.new_zeros(self.num).index_add(
            0, self.index_N, torch.where(self.there_N, value_N, 0.0)
        )
        return sums_G[self.index_N]

    def size(self) -> Tensor:
        return self.sum(torch.ones_like(self.there_N, dtype=torch.float64)).clamp(min=1.0)

    def largest(self, value_N: Tensor) -> Tensor:
        """Of its group, on each response; 0 where nobody is there."""
        least_G = value_N.new_full((self.num,), -math.inf)
        seen_N = torch.where(self.there_N, value_N, -math.inf)
        top_N = least_G.scatter_reduce(0, self.index_N, seen_N, "amax")[self.index_N]
        return torch.where(top_N > -math.inf, top_N, 0.0)

    def softmax(self, logit_N: Tensor) -> Tensor:
        powers_N = (logit_N - self.largest(logit_N)).clamp(max=0.0).exp()
        return torch.where(self.there_N, powers_N / self.sum(powers_N).clamp(min=1e-300), 0.0)


def _responses(scores: Scores) -> tuple[Tensor, Tensor]:
    """(rollout ids [S, 3], [S, 4]: whether it has a token that counts, log p_ref / q, log p / q and the
    advantage of each response) of this rank; the last one is nobody's, so that every rank has one."""
    logp, batch = sampled_logp(scores), scores.batch
    assert scores.reference_logp_MT is not None, "who needs a reference is refused without one"
    reference_MT = torch.where(batch.mask_MT, scores.reference_logp_MT, 0.0)
    mask_M = batch.mask_MT.flatten()
    num = int(batch.segment_MT.max()) + 2
    place_N = batch.segment_MT.flatten()[mask_M]
    columns = [
        log_ratio(reference_MT, logp.server).double(),
        log_ratio(logp.target, logp.server).double(),
        torch.ones_like(reference_MT, dtype=torch.float64),
        batch.advantage_MT.double(),
    ]
    found = torch.stack([column.flatten()[mask_M] for column in columns], -1)
    reference_S, model_S, tokens_S, advantage_S = (
        found.new_zeros(num, 4).index_add(0, place_N, found).unbind(-1)
    )
    known_S = (tokens_S > 0).double()
    ids_S3 = batch.rollout_id_MT3.new_full((num, 3), -1)
    ids_S3[place_N] = batch.rollout_id_MT3.flatten(0, 1)[mask_M]
    mean_S = advantage_S / tokens_S.clamp(min=1.0)
    return ids_S3, torch.stack([known_S, reference_S, model_S, mean_S], -1)


@dataclass(frozen=True, kw_only=True)
class AStarPO(Regression):
    """-(beta log p(y) / p_ref(y) + V* - r)^2 for each response, r being the advantage and V* of a table that
    `megatron-jackpot values` makes (arXiv 2505.20686): 0 at p* under every law that samples y."""

    values: str = "values.json"
    """The table: V* of each prompt, of responses of the reference."""
    beta: float = 1e-3
    """Weight of the KL to the reference whose optimum is p*."""

    def __post_init__(self) -> None:
        check_that(0 < self.beta < math.inf, "beta", self.beta, "be finite and > 0", "Use 1e-3.")

    def with_values(self, values: Mapping[int, float], device: torch.device) -> "KnownAStarPO":
        """The same method with V* by prompt id."""
        ids = sorted(values)
        return KnownAStarPO(
            **knobs_of(self, AStarPO),
            ids_P=torch.tensor(ids, dtype=torch.int64, device=device),
            value_P=torch.tensor([values[number] for number in ids], dtype=torch.float64, device=device),
        )

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        raise RuntimeError("Objective 'a_star_po' needs its table. Call with_values and use what it returns.")


@dataclass(frozen=True, kw_only=True)
class KnownAStarPO(AStarPO):
    """A*-PO with its table of P prompts."""

    ids_P: Tensor = field(compare=False, repr=False)
    """Ascending."""
    value_P: Tensor = field(compare=False, repr=False)

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        """Each token has its share of the square, and all of them together its gradient."""
        log_ratio_T = log_ratio(t.logp_T, t.reference_logp_T)
        residual_T = self._residual(t)
        share_T = residual_T.square() / segment_reduce(t.valid_T, t.valid_T, t.segment_T).clamp(min=1.0)
        live_T = 2 * self.beta * residual_T.to(t.logp_T.dtype) * (log_ratio_T - log_ratio_T.detach())
        return torch.where(t.valid_T, -(share_T.to(t.logp_T.dtype) + live_T), 0.0)

    def metrics(self, t: ObjectiveInputs) -> Metrics:
        return super().metrics(t) | {"residual_square": mean_over(self._residual(t).square(), t.valid_T)}

    @torch.no_grad()
    def _residual(self, t: ObjectiveInputs) -> Tensor:
        """beta log p(y) / p_ref(y) + V* - r, float64 [T]."""
        log_ratio_T = log_ratio(t.logp_T, t.reference_logp_T)
        whole_T = segment_reduce(log_ratio_T, t.counted_T, t.segment_T)
        place_T = torch.searchsorted(self.ids_P, t.rollout_id_T3[:, 1].contiguous()).clamp(
            max=len(self.ids_P) - 1
        )
        return self.beta * whole_T + self.value_P[place_T] - t.advantage_T.double()
