"""What a leader asks for in a step: the loader's prompts, rounds of each, and others in the place of some.

Nothing is remembered of a round: what comes next is a function of the groups that are finished, so that a
step that is asked again, after a fault or from a checkpoint, goes on where it was.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from megatron_jackpot.records import Prompt, Rollout
from megatron_jackpot.rollout.allocation import Allocation
from megatron_jackpot.rollout.collect import Sums, Unfinished
from megatron_jackpot.rollout.finished_groups import Groups

Further = Callable[[int, int, int, Collection[int]], list[Prompt]]
"""(step, round, number, ids without) -> so many prompts beside a step's, or fewer."""


@dataclass
class Asked:
    """One step's prompts, and what asking for them took so far."""

    step: int
    epoch: int
    prompts: list[Prompt]
    plan: Mapping[int, int]
    """Prompt id -> rollouts of its first round, of all leaders' prompts."""
    allocation: Allocation
    further: Further
    fetched: list[Prompt] = field(default_factory=list)
    """Prompts beside the loader's, in the order in which they were asked for."""
    work: "futures.Future[Unfinished | None] | None" = None
    sums: Sums = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def further_epoch(self) -> int:
        """Epoch of fetched prompts' rollouts: this step's own and none of the loader's, as a prompt may be
        fetched in several steps, and be the loader's of another one in flight."""
        return -1 - self.step

    def add(self, sums: Sums) -> None:
        for key, (total, number) in sums.items():
            before = self.sums.get(key, (0.0, 0.0))
            self.sums[key] = (before[0] + total, before[1] + number)

    def key(self, prompt: Prompt) -> tuple[int, int]:
        """Of its group."""
        return self.epoch if prompt.id in self.plan else self.further_epoch, prompt.id

    def owns(self, key: tuple[int, int]) -> bool:
        """Whether a finished group is one of this leader's in this step."""
        mine = {prompt.id for prompt in self.prompts}
        return key[0] == self.further_epoch or (key[0] == self.epoch and key[1] in mine)

    def more(self, prompt: Prompt, group: Sequence[Rollout]) -> int:
        """Further rollouts of a prompt that has these; 0 where its group is whole."""
        if group and not self.allocation.allocator.allocates:
            return 0
        return self.allocation.more(self.plan.get(prompt.id, self.allocation.samples), group)

    def missing(self, prompts: Sequence[Prompt], finished: Groups) -> list[Prompt]:
        """Those whose group is not there or not whole."""
        return [prompt for prompt in prompts if self.more(prompt, finished.get(self.key(prompt), [])) > 0]

    def options(self, prompts: Sequence[Prompt], finished: Groups) -> dict[str, Any]:
        """What a source must know beside the prompts, where they do not all get the usual number."""
        if not self.allocation.allocator.allocates:
            return {}
        begun = {prompt.id: finished.get(self.key(prompt), []) for prompt in prompts}
        return {"more": self.more, "begun": begun}

    def rounds(self, finished: Groups) -> Iterator[tuple[int, list[Prompt]]]:
        """(epoch, prompts) to ask for; each round is decided when the one before is in `finished`."""
        self.fetched = []
        yield self.epoch, self.prompts
        for number in count(1):
            groups = (finished.get(self.key(prompt)) for prompt in (*self.prompts, *self.fetched))
            live = sum(group is not None and self.allocation.live(group) for group in groups)
            wanted = self.allocation.allocator.fetch(len(self.prompts), live, number)
            without = {prompt.id for prompt in self.fetched} | self.plan.keys()
            new = self.further(self.step, number, wanted, without) if wanted else []
            if not new:
                return
            self.fetched = [*self.fetched, *new]
            yield self.further_epoch, new

    def measured(self, sampled: Sequence[Sequence[Rollout]], trained: Sequence[Sequence[Rollout]]) -> Sums:
        """What the allocator did; nothing where every prompt gets the same."""
        if not self.allocation.allocator.allocates:
            return {}
        planned = [self.plan.get(group[0].prompt.id, self.allocation.samples) for group in sampled]
        both = list(zip(sampled, planned, strict=True))
        failed = [group for group, n in both if not any(r.correct for r in group[:n])]
        prompts = len(self.prompts)
        surplus = sum(map(self.allocation.live, sampled)) - sum(map(self.allocation.live, trained))
        return {
            "allocate/rollouts": (sum(map(len, sampled)), len(sampled)),
            "allocate/further": (sum(len(group) > n for group, n in both), len(sampled)),
            "allocate/rescued": (sum(any(r.correct for r in group) for group in failed), len(failed)),
            "allocate/fetched": (len(self.fetched), prompts),
            "allocate/surplus": (surplus, prompts),
        }
