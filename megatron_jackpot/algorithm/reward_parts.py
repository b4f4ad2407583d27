"""Several rewards of a response: one advantage of their weighted sum, or one of each; and their means.

Shapes: N completions of one group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_jackpot.algorithm.advantages import Advantage
from megatron_jackpot.records import Rollout

PART_METRIC = "reward/part/"
"""Before the names of metrics that one rank may have and another not."""


@dataclass(frozen=True, kw_only=True)
class RewardParts:
    """docs/advantages.md, "Several rewards"; without any it is the method alone."""

    weights: Mapping[str, float] = field(default_factory=dict)
    """Of each reward, by name."""
    singly: bool = False
    """Each reward has an advantage of its own."""

    def advantage(self, method: Advantage, group: Sequence[Rollout], rewards: Sequence[float]) -> Tensor:
        """Advantages [N] of one group; `rewards` are the rollouts' with what was added to them, which singly
        belongs to the row's first reward of any weight."""
        if not (self.singly and group):  # A selector may leave nothing of a group.
            return method(rewards)
        advantage_N = torch.zeros(len(group))
        names = [name for name in group[0].parts if name in self.weights]
        first = next((name for name in names if self.weights[name]), None)
        for name in names:
            own, weight = [rollout.parts[name] for rollout in group], self.weights[name]
            if name == first:
                added = [whole - rollout.reward for whole, rollout in zip(rewards, group, strict=True)]
                own = [value + more / weight for value, more in zip(own, added, strict=True)]
            advantage_N = advantage_N + weight * method(own)
        return advantage_N

    def sums(self, rollouts: Sequence[Rollout]) -> dict[str, tuple[float, float]]:
        """(sum, count) of each reward and of what they measured, over the rollouts that have it."""
        found = {}
        for name in {**self.weights, **{name: 0 for rollout in rollouts for name in rollout.parts}}:
            own = [rollout.parts[name] for rollout in rollouts if name in rollout.parts]
            found[f"{PART_METRIC}{name}"] = (sum(own), len(own))
        return found
