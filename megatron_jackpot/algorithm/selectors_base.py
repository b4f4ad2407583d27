"""What every selector shares: which finished rollouts of a prompt train, and with what weight.

Shapes: N rollouts of one group, S of them that are selected. Decisions are a group's own and pure, so that
every layout and a resumed run make the same ones.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

TIE = 1e-6
"""Numbers nearer than this are equal: the mean of equal rewards may be off by rounding."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """One prompt's finished rollouts, in the order of their samples: all of them, the actor's."""

    reward_N: Tensor
    """float64, what the advantages are made of."""
    correct_N: Tensor
    """bool."""
    advantage_N: Tensor
    """float32, of the whole group, before any statistic of the batch."""
    num_tokens_N: Tensor
    """int64, lengths of the responses."""
    draw_N: Tensor
    """float64 in [0, 1), of (seed, step, rollout) and of nothing else: no keep mask sees these draws."""

    def __len__(self) -> int:
        return len(self.reward_N)

    @property
    def dead(self) -> bool:
        """Whether all rewards are equal, so that every advantage is 0."""
        return len(self) < 2 or bool(self.reward_N.max() - self.reward_N.min() <= TIE)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What trains of a group."""

    index_S: Tensor
    """int64, ascending."""
    weight_S: Tensor
    """float64 > 0: multiplies each one's part of both losses, after every cap."""
    advantage_S: Tensor | None = None
    """float32, final; None takes those of `algorithm.advantage`."""


@dataclass(frozen=True, kw_only=True)
class Selector:
    """Base of every selector. Fields are the keys under `algorithm.selector` in YAML."""

    selects: ClassVar[bool] = True
    """Whether it may leave anything out: what it did is measured then."""

    stats: Literal["full", "selected"] = "selected"
    """Where the advantages' mean and deviation are taken: of all rollouts, or of those that train."""
    denominator: Literal["full", "selected"] = "selected"
    """Whether N counts the tokens of rollouts that are left out."""

    def __call__(self, group: Group) -> Selection:
        """What trains of one group; nothing is a Selection of no rollout."""
        raise NotImplementedError


def whole(group: Group) -> Selection:
    """All of it, with weight 1."""
    return chosen(torch.arange(len(group)))


def nothing() -> Selection:
    return chosen(torch.arange(0))


def chosen(index_S: Tensor) -> Selection:
    """These rollouts, in any order, with weight 1."""
    index_S = index_S.sort().values
    return Selection(index_S=index_S, weight_S=torch.ones(len(index_S), dtype=torch.float64))


def drawn(among_C: Tensor, draw_N: Tensor, number: int) -> Tensor:
    """`number` of the indices `among_C`, those with the smallest draws: uniform without replacement."""
    return among_C[draw_N[among_C].argsort(stable=True)[:number]]
