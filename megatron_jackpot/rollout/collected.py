"""What a step's rollout came to: a leader's groups, and the account of every prompt."""

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.records import Rollout
from megatron_jackpot.rollout.collect import Sums


@dataclass(frozen=True, kw_only=True)
class Collected:
    """One leader's groups of a step, in the loader's order, and what it took to get them."""

    groups: list[list[Rollout]]
    """Those that are trained on."""
    sampled: list[list[Rollout]]
    """All that were sampled."""
    sums: Sums
    """Of all requests, repeated ones included; and how long trainer and servers had nothing to do."""
    seconds: float
    """Spent asking the servers."""
    epoch: int
    trained: list[int]
    """Ids of the loader's prompts that came back with a group."""
    lost: list[int]
    """Ids of those that did not."""
    fetched: list[int] = field(default_factory=list)
    """Ids of prompts that were asked for in the place of others, beside the loader's."""


def account(mesh: Mesh, collected: Collected) -> dict[str, Any]:
    """What became of a step's prompts over all leaders, which alone call it: epoch, trained, lost, and
    fetched where any were."""
    mine = (collected.trained, collected.lost, collected.fetched)
    parts: list[Any] = [mine]
    if mesh.dp > 1:
        parts *= mesh.dp
        dist.all_gather_object(parts, mine, group=mesh.dp_group)
    trained, lost, fetched = (sorted(number for part in parts for number in part[i]) for i in range(3))
    beside = {"fetched": fetched} if fetched else {}
    return {"epoch": collected.epoch, "trained": trained, "lost": lost, **beside}
