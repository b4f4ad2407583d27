"""From finished groups to what trains: rewards, which rollouts, their advantages and weights; once a step, in
the main thread of every DP leader.

Shapes: N rollouts of one group, S of them that are selected.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_jackpot.algorithm.advantages import Advantage
from megatron_jackpot.algorithm.lengths import SoftOverlong
from megatron_jackpot.algorithm.obrs import counter_uniform
from megatron_jackpot.algorithm.selectors_base import Group, Selection, Selector
from megatron_jackpot.algorithm.tokens import SumOverBatch
from megatron_jackpot.records import Rollout

NO_POSITION = -1
"""A token has a position from 0 on: draws at this one are the selector's, and no keep mask sees them."""

Sums = Mapping[str, tuple[float, float]]
"""Name -> (sum, count) on this leader."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What one leader's groups bring to the loss, both lists prompt by prompt in the loader's order."""

    groups: list[list[Rollout]]
    """Rollouts that train, with advantage and weight; [] where none of a prompt does."""
    pruned: list[list[Rollout]]
    """Those that do not, but that N counts."""
    sums: Sums = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Curator:
    """Advantages are computed once, after selection, from the actor's own samples of a whole group."""

    advantage: Advantage
    selector: Selector
    seed: int
    prompt_weight: Literal["sample", "equal"] = "sample"
    overlong: SoftOverlong | None = None
    mask_truncated: bool = False

    def __call__(
        self,
        groups: Sequence[Sequence[Rollout]],
        step: int,
        sum_over_batch: SumOverBatch,
        device: torch.device,
    ) -> Trained:
        """Of one DP leader's whole groups; every leader calls it, as some formulas look at the whole batch.

        `step` is the key of the draws. Sums over the batch: what the advantage asks for, and one where
        prompts weigh the same.
        """
        seen = [self._seen(group, step) for group in groups]
        selections = [self.selector(one) for one in seen]
        values = iter(self._advantages(groups, seen, selections, sum_over_batch, device))
        factors = self._prompt_factors(groups, selections, sum_over_batch, device)
        trained, pruned = [], []
        for group, selection, factor in zip(groups, selections, factors, strict=True):
            of_index = dict(zip(self._pool(group, selection), values, strict=False))
            index, weights = selection.index_S.tolist(), (selection.weight_S * factor).tolist()
            trained.append(
                [
                    replace(self._masked(group[i]), advantage=of_index[i], loss_weight=weight)
                    for i, weight in zip(index, weights, strict=True)
                ]
            )
            counts = self.selector.denominator == "full"
            left = set(range(len(group))).difference(index) if counts else ()
            pruned.append([self._masked(group[i]) for i in sorted(left)])
        return Trained(groups=trained, pruned=pruned, sums=self._sums(groups, trained))

    def punished(self, rollout: Rollout) -> float:
        """What is added to its reward."""
        return 0.0 if self.overlong is None else self.overlong(len(rollout.tokens))

    def _seen(self, group: Sequence[Rollout], step: int) -> Group:
        reward_N = torch.tensor([r.reward + self.punished(r) for r in group], dtype=torch.float64)
        ids_N3 = torch.tensor([r.key for r in group], dtype=torch.int64).view(-1, 3)
        nowhere_N = torch.full((len(group),), NO_POSITION)
        return Group(
            reward_N=reward_N,
            correct_N=torch.tensor([r.correct for r in group], dtype=torch.bool),
            advantage_N=self._of_group(group, reward_N),
            num_tokens_N=torch.tensor([len(r.tokens) for r in group]),
            draw_N=counter_uniform(self.seed, step, ids_N3, nowhere_N).double(),
        )

    def _of_group(self, rollouts: Sequence[Rollout], reward_N: Tensor) -> Tensor:
        """Advantages [N] of rollouts of one prompt with these rewards, before any statistic of the batch."""
        return self.advantage(reward_N)

    def _pool(self, group: Sequence[Rollout], selection: Selection) -> list[int]:
        """The rollouts over which advantages are taken."""
        return list(range(len(group))) if self.selector.stats == "full" else selection.index_S.tolist()

    def _advantages(
        self,
        groups: Sequence[Sequence[Rollout]],
        seen: Sequence[Group],
        selections: Sequence[Selection],
        sum_over_batch: SumOverBatch,
        device: torch.device,
    ) -> list[float] | list[np.ndarray]:
        """Of each pool's rollouts, pool after pool."""
        pools = [self._pool(*both) for both in zip(groups, selections, strict=True)]
        members = [[group[i] for i in pool] for group, pool in zip(groups, pools, strict=True)]
        rewards = [one.reward_N[pool] for one, pool in zip(seen, pools, strict=True)]
        if self.selector.stats == "full":
            of_pools = [one.advantage_N for one in seen]
        else:
            of_pools = [self._of_group(*both) for both in zip(members, rewards, strict=True)]
        reward_N = torch.cat([torch.empty(0, dtype=torch.float64), *rewards]).to(device)
        advantage_N = torch.cat([torch.empty(0), *of_pools]).to(device)
        advantage_N = self.advantage.over_batch(advantage_N, reward_N, sum_over_batch)
        final = advantage_N.clone()
        parts = final.split([len(pool) for pool in pools])
        for own_N, pool, selection in zip(parts, pools, selections, strict=True):
            if selection.advantage_S is not None:
                places = [pool.index(i) for i in selection.index_S.tolist()]
                own_N[places] = selection.advantage_S.to(device)
        tokens = self.advantage.per_token(final, list(_flat(members)))
        return final.tolist() if tokens is None else [one.cpu().numpy() for one in tokens]

    def _prompt_factors(
        self,
        groups: Sequence[Sequence[Rollout]],
        selections: Sequence[Selection],
        sum_over_batch: SumOverBatch,
        device: torch.device,
    ) -> list[float]:
        """mean(n) / n of each prompt, n being its rollouts that N counts; 1 where samples weigh the same."""
        if self.prompt_weight == "sample":
            return [1.0] * len(groups)
        full = self.selector.denominator == "full"
        numbers = [len(g) if full else len(s.index_S) for g, s in zip(groups, selections, strict=True)]
        mine = torch.tensor([sum(numbers), sum(n > 0 for n in numbers)], dtype=torch.float64, device=device)
        total, prompts = sum_over_batch(mine).tolist()
        return [total / prompts / n if n else 1.0 for n in numbers]

    def _masked(self, rollout: Rollout) -> Rollout:
        masked = self.mask_truncated and rollout.finish == "length"
        return replace(rollout, valid=np.zeros_like(rollout.valid)) if masked else rollout

    def _sums(self, groups: Sequence[Sequence[Rollout]], trained: Sequence[Sequence[Rollout]]) -> Sums:
        sums: dict[str, tuple[float, float]] = {}
        if self.overlong is not None:
            punished = [self.punished(rollout) for group in groups for rollout in group]
            sums["reward/overlong"] = (sum(punished), len(punished))
        if not self.selector.selects:
            return sums
        drawn, kept = list(_flat(groups)), list(_flat(trained))
        weights = [rollout.loss_weight for rollout in kept]
        dead = sum(not any(np.any(r.advantage) for r in group) for group in trained)
        return sums | {
            "select/rollouts": (len(kept), len(drawn)),
            "select/tokens": (_tokens(kept), _tokens(drawn)),
            "select/dead_groups": (dead, len(groups)),
            "select/weight": (sum(weights), len(kept)),
            "select/weight_square": (sum(weight**2 for weight in weights), len(kept)),
        }


def _flat(groups: Sequence[Sequence[Rollout]]) -> Iterator[Rollout]:
    return (rollout for group in groups for rollout in group)


def _tokens(rollouts: Sequence[Rollout]) -> int:
    return sum(len(rollout.tokens) for rollout in rollouts)
