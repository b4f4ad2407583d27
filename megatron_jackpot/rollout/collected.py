"""What a step's rollout came to: a leader's groups, and the account of every prompt."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.records import Rollout
from megatron_jackpot.rollout.collect import Sums


class Allocated(NamedTuple):
    """What an allocator did with one prompt of a step."""

    round: int
    """In which it was asked for first: 0 of the loader's prompts."""
    prompt: int
    planned: int
    """Rollouts of its first round."""
    rollouts: int
    """That it came to; 0 of a prompt that was lost."""
    rounds: int
    """Of its own rollouts."""
    correct: int
    live: bool
    """Its rewards differ."""
    trained: bool


@dataclass(frozen=True, kw_only=True)
class Collected:
    """One leader's groups of a step, in the loader's order, and what it took to get them."""

    groups: list[list[Rollout]]
    """Those that are trained on."""
    sampled: list[list[Rollout]]
    """All that were sampled."""
    sums: Sums
    """Of all requests, repeated ones included; and how long trainer and servers had nothing to do."""
    epoch: int
    trained: list[int]
    """Ids of the loader's prompts that came back with a group."""
    lost: list[int]
    """Ids of those that did not."""
    fetched: list[int] = field(default_factory=list)
    """Ids of prompts that were asked for in the place of others, beside the loader's."""
    allocated: list[Allocated] = field(default_factory=list)
    """Of each prompt, where not every one gets the same."""


def account(mesh: Mesh, collected: Collected) -> dict[str, Any]:
    """What became of a step's prompts over all leaders, which alone call it: epoch, trained, lost; fetched
    where any were; allocated, a list for each field of `Allocated`, where there is such."""
    mine = (collected.trained, collected.lost, collected.fetched, collected.allocated)
    parts: list[Any] = [mine]
    if mesh.dp > 1:
        parts *= mesh.dp
        dist.all_gather_object(parts, mine, group=mesh.dp_group)
    trained, lost, fetched = (sorted(number for part in parts for number in part[i]) for i in range(3))
    beside: dict[str, Any] = {"fetched": fetched} if fetched else {}
    if rows := sorted(row for part in parts for row in part[3]):
        beside["allocated"] = {
            name: list(column)
            for name, column in zip(Allocated._fields, zip(*rows, strict=True), strict=True)
        }
    return {"epoch": collected.epoch, "trained": trained, "lost": lost, **beside}
