"""Advantages from the rewards of one group: all completions of one prompt, before any token is rejected.

Shapes: N completions, of one group in a call and of this rank's batch in `over_batch`. Computed in fp64,
returned in fp32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_jackpot.algorithm.registry import Registry
from megatron_jackpot.algorithm.tokens import SumOverBatch


class Advantage:
    """A formula over one group, and for some a second step over the whole batch."""

    def __call__(self, reward_N: Tensor | Sequence[float]) -> Tensor:
        """Advantages [N], fp32; 0 for equal rewards or a single one. ValueError if one is not finite, a
        reward or what comes of it."""
        reward_N = _rewards(reward_N)
        if _all_equal(reward_N):
            return torch.zeros_like(reward_N, dtype=torch.float32)
        advantage_N = self.of_group(reward_N).float()
        if not torch.isfinite(advantage_N).all():
            raise ValueError(f"rewards = {reward_N.tolist()}: too large for fp32. Scale the reward function.")
        return advantage_N

    def of_group(self, reward_N: Tensor) -> Tensor:
        """Advantages [N] of finite fp64 rewards that are not all equal."""
        raise NotImplementedError

    def over_batch(self, advantage_N: Tensor, sum_over_batch: SumOverBatch) -> Tensor:
        """Advantages [N] of all completions of this rank once every group is known; here unchanged."""
        return advantage_N


@dataclass(frozen=True, kw_only=True)
class GRPO(Advantage):
    """(r - mean r) / (std r + eps) (arXiv 2402.03300), std with N - 1; 0 if all are equal."""

    std: bool = True
    """False leaves out the division by the standard deviation."""
    eps: float = 1e-6
    """Added to the standard deviation."""

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def of_group(self, reward_N: Tensor) -> Tensor:
        centred_N = reward_N - reward_N.mean()
        return centred_N / (reward_N.std() + self.eps) if self.std else centred_N


@dataclass(frozen=True, kw_only=True)
class DrGRPO(Advantage):
    """r - mean r, no standard deviation (arXiv 2503.20783).

    The paper also divides every response's sum of losses by one fixed length instead of its own: the
    aggregation "constant".
    """

    def of_group(self, reward_N: Tensor) -> Tensor:
        return reward_N - reward_N.mean()


@dataclass(frozen=True, kw_only=True)
class RLOO(Advantage):
    """r_i - mean of the other rewards (arXiv 2402.14740); 0 for equal rewards or a single one."""

    def of_group(self, reward_N: Tensor) -> Tensor:
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

    def over_batch(self, advantage_N: Tensor, sum_over_batch: SumOverBatch) -> Tensor:
        """A / (std over the batch + eps), [N] fp32. Calls `sum_over_batch` once, with [3] float64."""
        wide_N = advantage_N.double()
        sums = torch.stack([wide_N.sum(), wide_N.square().sum(), torch.ones_like(wide_N).sum()])
        total, squares, count = sum_over_batch(sums).unbind()
        variance = (squares / count - (total / count).square()).clamp(min=0.0)
        return (wide_N / (variance.sqrt() + self.eps)).float()


ADVANTAGES = Registry(Advantage, {"grpo": GRPO, "dr_grpo": DrGRPO, "rloo": RLOO, "reinforce++": ReinforcePP})


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


def _all_equal(reward_N: Tensor) -> bool:
    """True also for none or one. By comparison, since the mean of equal numbers may be off by rounding."""
    return len(reward_N) < 2 or bool((reward_N == reward_N[0]).all())
