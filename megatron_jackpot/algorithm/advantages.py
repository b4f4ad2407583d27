"""Advantages from the rewards of one group: all completions of one prompt, before any token is rejected.

Shapes: N completions of the group. Computed in fp64, returned in fp32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """(r - mean r) / (std r + eps) (arXiv 2402.03300), std with N - 1; 0 if all are equal."""

    std: bool = True
    """False leaves out the division by the standard deviation."""
    eps: float = 1e-6
    """Added to the standard deviation."""

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise ValueError(f"eps = {self.eps}: must be > 0. Use 1e-6.")

    def __call__(self, reward_N: Tensor | Sequence[float]) -> Tensor:
        """Advantages [N], fp32. Raises ValueError for a reward that is not finite."""
        reward_N = _rewards(reward_N)
        if _all_equal(reward_N):
            return torch.zeros_like(reward_N, dtype=torch.float32)
        centred_N = reward_N - reward_N.mean()
        return (centred_N / (reward_N.std() + self.eps) if self.std else centred_N).float()


@dataclass(frozen=True, kw_only=True)
class RLOO:
    """r_i - mean of the other rewards (arXiv 2402.14740); 0 for equal rewards or a single one."""

    def __call__(self, reward_N: Tensor | Sequence[float]) -> Tensor:
        """Advantages [N], fp32. Raises ValueError for a reward that is not finite."""
        reward_N = _rewards(reward_N)
        if _all_equal(reward_N):
            return torch.zeros_like(reward_N, dtype=torch.float32)
        others_N = (reward_N.sum() - reward_N) / (len(reward_N) - 1)
        return (reward_N - others_N).float()


ADVANTAGES = {"grpo": GRPO, "rloo": RLOO}


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
