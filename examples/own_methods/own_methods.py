"""One method of one's own for every seam, named in run.yaml by its path; the package is not touched.

Fields are keys in YAML, checks stand in __post_init__, the formula is the rest. Shapes: M micro-batches of T
tokens, N completions of a group; rho = p_old / q at the sampled token.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_jackpot.algorithm.advantages import Advantage
from megatron_jackpot.algorithm.correction_base import CorrectionMethod, corrected
from megatron_jackpot.algorithm.distill import Distillation
from megatron_jackpot.algorithm.objectives_base import Objective
from megatron_jackpot.algorithm.obrs import check_cap, log_ratio
from megatron_jackpot.algorithm.selectors_base import Group, Selection, Selector, chosen
from megatron_jackpot.algorithm.tokens import SumOverBatch, sampled_logp
from megatron_jackpot.records import Correction, DistillInputs, ObjectiveInputs, Rollout, Scores


@dataclass(frozen=True, kw_only=True)
class LikelyOnly(CorrectionMethod):
    """min(rho, cap) where the policy itself would have said the token with `floor` or more, else removed."""

    floor: float = 0.001
    """Least p_old of a token that is kept."""
    cap: float = 2.0
    """The largest weight."""

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor = {self.floor}: must lie in [0, 1). Use 0.001.")
        check_cap("cap", self.cap)

    @torch.no_grad()
    def __call__(self, scores: Scores, sum_over_batch: SumOverBatch) -> Correction:
        logp = sampled_logp(scores)
        keep_MT = logp.valid & (logp.policy.exp() >= self.floor)
        weight_MT = log_ratio(logp.policy, logp.server).exp().clamp(max=self.cap)
        return corrected(
            scores,
            keep=keep_MT,
            weight=weight_MT.float(),
            counted=scores.batch.mask_MT,
            accept=keep_MT,
            metrics={},
        )


@dataclass(frozen=True, kw_only=True)
class GentleReinforce(Objective):
    """A log p, where A < 0 a share of it: a wrong answer teaches less than a right one."""

    negative: float = 0.5
    """Share of a negative advantage that counts."""

    def __post_init__(self) -> None:
        if not 0 <= self.negative <= 1:
            raise ValueError(f"negative = {self.negative}: must lie in [0, 1]. Use 0.5.")

    def surrogate(self, t: ObjectiveInputs) -> Tensor:
        share_T = torch.where(t.advantage_T < 0, self.negative, 1.0)
        return share_T * t.advantage_T * t.logp_T


@dataclass(frozen=True, kw_only=True)
class MedianBaseline(Advantage):
    """r - median r of the group: one lucky completion does not make all others bad. A token n before the last
    has discount^n of it."""

    discount: float = 1.0
    """1: every token of a response has the same advantage."""

    def __post_init__(self) -> None:
        if not 0 < self.discount <= 1:
            raise ValueError(f"discount = {self.discount}: must lie in (0, 1]. Use 1.0.")

    def of_group(self, reward_N: Tensor) -> Tensor:
        return reward_N - reward_N.median()

    def per_token(self, advantage_N: Tensor, rollouts: Sequence[Rollout]) -> list[Tensor]:
        left = [torch.arange(len(r.tokens) - 1, -1, -1, device=advantage_N.device) for r in rollouts]
        return [one * self.discount**before_R for one, before_R in zip(advantage_N, left, strict=True)]


@dataclass(frozen=True, kw_only=True)
class NoRepeats(Selector):
    """At most `most` rollouts of a group with the same reward and length: mostly the same answer again."""

    most: int = 4
    """Of equal ones, how many train: the first."""

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"most = {self.most}: must be >= 1. Use 4.")

    def __call__(self, group: Group) -> Selection:
        seen: Counter[tuple[float, int]] = Counter()
        index = []
        for i, kind in enumerate(zip(group.reward_N.tolist(), group.num_tokens_N.tolist(), strict=True)):
            seen[kind] += 1
            if seen[kind] <= self.most:
                index.append(i)
        return chosen(torch.tensor(index))


@dataclass(frozen=True, kw_only=True)
class SquaredGap(Distillation):
    """(log p_policy - log p_actor)^2 / 2 at the sampled token, at most `limit`: k2 of Schulman 2020."""

    limit: float = 10.0
    """Largest loss of one token, without gradient where it is reached."""

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"limit = {self.limit}: must be > 0. Use 10.")

    def __call__(self, t: DistillInputs) -> Tensor:
        gap_T = log_ratio(t.policy_logp_T.detach(), t.actor_logp_T)
        return (gap_T.square() / 2).clamp(max=self.limit)


class NumberFirst:
    """1 for the right answer, 0.1 for another number, 0 for anything else. A function would do as well."""

    def __call__(self, response_text: str, label: Any) -> float:
        answer = response_text.strip()
        if answer == label["answer"].strip():
            return 1.0
        return 0.1 if answer.lstrip("-").replace(".", "", 1).isdigit() else 0.0
