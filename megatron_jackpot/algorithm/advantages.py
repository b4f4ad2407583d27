"""Advantages from the rewards of one group: all completions of one prompt, before any token is rejected.

Shapes: N completions, of one group in a call and of this rank's batch in `over_batch` and `per_token`; R
tokens of one response. Computed in fp64, returned in fp32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_jackpot.algorithm.registry import Registry
from megatron_jackpot.algorithm.tokens import SumOverBatch
from megatron_jackpot.records import Rollout


class Advantage:
    """A formula over one group, and for some a second step over the whole batch."""

    def __call__(self, reward_N: Tensor | Sequence[float]) -> Tensor:
        """Advantages [N], fp32; 0 for equal rewards or a single one. ValueError if one is not finite, a
        reward or what comes of it."""
        reward_N = _rewards(reward_N)
        if _all_equal(reward_N):
            return torch.zeros_like(reward_N, dtype=torch.float32)
        return _finite(self.of_group(reward_N).float(), reward_N)

    def of_group(self, reward_N: Tensor) -> Tensor:
        """Advantages [N] of finite fp64 rewards that are not all equal."""
        raise NotImplementedError

    def over_batch(self, advantage_N: Tensor, reward_N: Tensor, sum_over_batch: SumOverBatch) -> Tensor:
        """Advantages [N] of all completions of this rank once every group is known; here unchanged.
        `reward_N` are their fp64 rewards."""
        return advantage_N

    def per_token(self, advantage_N: Tensor, rollouts: Sequence[Rollout]) -> Sequence[Tensor] | None:
        """fp32 [R] for each of this rank's rollouts, whose advantages are [N]; None: every token of a
        response has its response's."""
        return None


@dataclass(frozen=True, kw_only=True)
class Scaled(Advantage):
    """The reward minus a baseline of its group, over a standard deviation (with N - 1) or none."""

    std: Literal["group", "batch", "none"] = "group"
    """Whose rewards' standard deviation divides: the group's, all of the batch's (arXiv 2508.08221), none."""
    eps: float = 1e-6
    """Added to the standard deviation."""

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def of_group(self, reward_N: Tensor) -> Tensor:
        centred_N = self.centred(reward_N)
        return centred_N / (reward_N.std() + self.eps) if self.std == "group" else centred_N

    def centred(self, reward_N: Tensor) -> Tensor:
        """The rewards [N] of one group minus their baseline."""
        return reward_N - reward_N.mean()

    def over_batch(self, advantage_N: Tensor, reward_N: Tensor, sum_over_batch: SumOverBatch) -> Tensor:
        """Divided by the batch's standard deviation where `std` asks for it: then calls `sum_over_batch`
        once, with [3] float64."""
        if self.std != "batch":
            return advantage_N
        variance, count = _variance(reward_N, sum_over_batch)
        unbiased = variance * count / (count - 1).clamp(min=1.0)
        return (advantage_N.double() / (unbiased.sqrt() + self.eps)).float()


@dataclass(frozen=True, kw_only=True)
class GRPO(Scaled):
    """(r - mean r) / (std r + eps) (arXiv 2402.03300); 0 if all are equal."""


@dataclass(frozen=True, kw_only=True)
class DrGRPO(Advantage):
    """r - mean r, no standard deviation (arXiv 2503.20783).

    The paper also divides every response's sum of losses by one fixed length instead of its own: the
    aggregation "constant".
    """

    def of_group(self, reward_N: Tensor) -> Tensor:
        return reward_N - reward_N.mean()


@dataclass(frozen=True, kw_only=True)
class RLOO(Scaled):
    """r_i - mean of the other rewards (arXiv 2402.14740); 0 for equal rewards or a single one."""

    std: Literal["group", "batch", "none"] = "none"
    """Whose rewards' standard deviation divides: none as in the paper, the group's or all of the batch's."""

    def centred(self, reward_N: Tensor) -> Tensor:
        others_N = (reward_N.sum() - reward_N) / (len(reward_N) - 1)
        return reward_N - others_N


@dataclass(frozen=True, kw_only=True)
class ReinforcePP(Advantage):
    """REINFORCE++ with baseline: r - mean r of the group, / (std over the batch + eps) (arXiv 2501.03262).

    The statistics weigh each completion once, whatever its length, and divide by their number. The mean over
    the batch is 0 because every group's is; it enters the variance, and is not subtracted so that 0 stays 0.
    """

    eps: float = 1e-6
    """Added to the standard deviation."""

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def of_group(self, reward_N: Tensor) -> Tensor:
        return reward_N - reward_N.mean()

    def over_batch(self, advantage_N: Tensor, reward_N: Tensor, sum_over_batch: SumOverBatch) -> Tensor:
        """A / (std over the batch + eps), [N] fp32. Calls `sum_over_batch` once, with [3] float64."""
        variance, _ = _variance(advantage_N.double(), sum_over_batch)
        return (advantage_N.double() / (variance.sqrt() + self.eps)).float()


@dataclass(frozen=True, kw_only=True)
class Reward(Advantage):
    """r itself, for objectives that have a baseline of their own; it needs no group."""

    def __call__(self, reward_N: Tensor | Sequence[float]) -> Tensor:
        reward_N = _rewards(reward_N)
        return _finite(reward_N.float(), reward_N)


ADVANTAGES = Registry(
    Advantage,
    {"grpo": GRPO, "dr_grpo": DrGRPO, "rloo": RLOO, "reinforce++": ReinforcePP, "reward": Reward},
)


def _variance(value_N: Tensor, sum_over_batch: SumOverBatch) -> tuple[Tensor, Tensor]:
    """(variance, number) over the whole batch, float64 scalars. Calls `sum_over_batch` once, with [3]."""
    sums = torch.stack([value_N.sum(), value_N.square().sum(), torch.ones_like(value_N).sum()])
    total, squares, count = sum_over_batch(sums).unbind()
    return (squares / count - (total / count).square()).clamp(min=0.0), count


def _check_eps(eps: float) -> None:
    if not 0 < eps < math.inf:
        raise ValueError(f"eps = {eps}: must be a finite number > 0. Use 1e-6.")


def _rewards(reward_N: Tensor | Sequence[float]) -> Tensor:
    reward_N = torch.as_tensor(reward_N, dtype=torch.float64)
    if reward_N.dim() != 1:
        raise ValueError(
            f"rewards have shape {tuple(reward_N.shape)}: must be one number per completion of a group."
        )
    if not torch.isfinite(reward_N).all():
        raise ValueError(f"rewards = {reward_N.tolist()}: must be finite. Check the reward function.")
    return reward_N


def _finite(advantage_N: Tensor, reward_N: Tensor) -> Tensor:
    if not torch.isfinite(advantage_N).all():
        raise ValueError(f"rewards = {reward_N.tolist()}: too large for fp32. Scale the reward function.")
    return advantage_N


def _all_equal(reward_N: Tensor) -> bool:
    """True also for none or one. By comparison, since the mean of equal numbers may be off by rounding."""
    return len(reward_N) < 2 or bool((reward_N == reward_N[0]).all())
