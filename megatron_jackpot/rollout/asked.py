"""What a leader asks for in a step: the loader's prompts, rounds of each, and others in the place of some.

Nothing is remembered of a round: what comes next is a function of the groups that are finished, so that a
step that is asked again, after a fault or from a checkpoint, goes on where it was.

Where an allocator decides over all of a step's groups, leaders tell each other after every round which of
theirs are live, and each comes to the same decision from the same words.
"""

import asyncio
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

from megatron_jackpot.parallel.exchange import Batch, Exchange, LeaderEnded
from megatron_jackpot.records import Prompt, Rollout
from megatron_jackpot.rollout.allocation import Allocation
from megatron_jackpot.rollout.collect import Interrupted, Sums, Unfinished
from megatron_jackpot.rollout.collected import Allocated
from megatron_jackpot.rollout.finished_groups import Groups
from megatron_jackpot.run.interrupt import Stop

Further = Callable[[int, int, int, Collection[int]], list[Prompt]]
"""(step, round, number, ids without) -> so many prompts beside a step's or fewer, alike on all leaders."""


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
    exchange: Exchange | None = None
    """Where there are other leaders to decide with."""
    attempt: int = 0
    """Of asking together: words of an earlier one do not count."""
    fetched: list[Prompt] = field(default_factory=list)
    """This leader's prompts beside the loader's, in the order in which they were asked for."""
    beside: dict[int, int] = field(default_factory=dict)
    """Prompt id -> round, of those of all leaders, in that order."""
    live: dict[int, bool] = field(default_factory=dict)
    """Prompt id -> whether its group is live, of all leaders' finished groups, after the last round."""
    waits_for: str = ""
    """What of another leader is not there yet."""
    work: "futures.Future[Unfinished | None] | None" = None
    sums: Sums = field(default_factory=dict)

    @property
    def batch(self) -> Batch:
        """By what leaders know it."""
        return self.attempt, self.step

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

    async def ask_for(self, number: int, finished: Groups, stop: Stop) -> tuple[int, list[Prompt]] | None:
        """(epoch, this leader's prompts) of a round, of which another leader may have all; None where the one
        before was the last. That one must be in `finished`.

        Raises Interrupted where `stop` says so while other leaders are waited for, Unfinished when one of
        them has ended, and what an allocator's `fetch` raises.
        """
        if number == 0:
            self.fetched, self.beside, self.waits_for = [], {}, ""
            return self.epoch, self.prompts
        allocator = self.allocation.allocator
        if not allocator.replaces:
            return None
        self.live = await self._all_live(number - 1, finished, stop)
        wanted = allocator.fetch(len(self.plan), sum(self.live.values()), number)
        without = {*self.plan, *self.beside}
        if not wanted:
            return None
        # Beside the loop, which other steps' requests wait for: it looks at every prompt there is.
        new = await asyncio.to_thread(self.further, self.step, number, wanted, without)
        if not new:
            return None
        leader, dp = (0, 1) if self.exchange is None else (self.exchange.dp_rank, self.exchange.dp)
        self.beside = self.beside | dict.fromkeys((prompt.id for prompt in new), number)
        self.fetched = [*self.fetched, *new[leader::dp]]
        return self.further_epoch, new[leader::dp]

    async def _all_live(self, number: int, finished: Groups, stop: Stop) -> dict[int, bool]:
        """`live` after a round, from every leader's word on its own groups."""
        own = [(prompt.id, finished.get(self.key(prompt))) for prompt in (*self.prompts, *self.fetched)]
        mine = [(name, self.allocation.live(group)) for name, group in own if group is not None]
        if self.exchange is None:
            return dict(mine)

        def waits(leader: int) -> None:
            self.waits_for = f"what DP leader {leader} says of round {number}"
            if (reason := stop()) is not None:
                raise Interrupted(reason, [], {})

        try:
            words = await self.exchange.words(self.batch, number, json.dumps(mine), waits)
        except LeaderEnded as error:
            raise Unfinished(str(error), [], {}) from error
        self.waits_for = ""
        return {name: live for word in words for name, live in json.loads(word)}

    def committed(self) -> Collection[int]:
        """Ids of the groups of all leaders that are trained on, of an allocator that decides over them."""
        order = [number for number in (*self.plan, *self.beside) if number in self.live]
        kept = self.allocation.allocator.commit([self.live[number] for number in order], len(self.plan))
        return {order[i] for i in kept}

    def observed(self, found: Mapping[int, Sequence[Rollout]]) -> list[tuple[int, int, int]]:
        """(prompt id, correct, rollouts) of the first round of each of this leader's groups: with rounds that
        end at a success, c / n of a whole group is above the pass rate."""
        rows = []
        for number, group in found.items():
            first = group[: self.plan.get(number, self.allocation.samples)]
            rows.append((number, sum(rollout.correct for rollout in first), len(first)))
        return rows

    def allocated(self, found: Mapping[int, Sequence[Rollout]], trained: Collection[int]) -> list[Allocated]:
        """Of each of this leader's prompts with its group; nothing where every prompt gets the same."""
        if not self.allocation.allocator.allocates:
            return []
        rows = []
        for number, group in found.items():
            planned = self.plan.get(number, self.allocation.samples)
            row = Allocated(
                round=self.beside.get(number, 0),
                prompt=number,
                planned=planned,
                rollouts=len(group),
                rounds=self.allocation.rounds(planned, group),
                correct=sum(rollout.correct for rollout in group),
                live=len({rollout.reward for rollout in group}) > 1,
                trained=number in trained,
            )
            rows.append(row)
        return rows

    def measured(self, sampled: Sequence[Sequence[Rollout]], trained: Sequence[Sequence[Rollout]]) -> Sums:
        """What the allocator did; nothing where every prompt gets the same."""
        if not self.allocation.allocator.allocates:
            return {}
        planned = [self.plan.get(group[0].prompt.id, self.allocation.samples) for group in sampled]
        both = list(zip(sampled, planned, strict=True))
        failed = [group for group, n in both if not any(r.correct for r in group[:n])]
        prompts = len(self.prompts)
        rounds = [self.beside.get(g[0].prompt.id, 0) + self.allocation.rounds(n, g) for g, n in both]
        surplus = sum(map(self.allocation.live, sampled)) - sum(map(self.allocation.live, trained))
        return {
            "allocate/rollouts": (sum(map(len, sampled)), len(sampled)),
            "allocate/rounds": (sum(rounds), len(sampled)),
            "allocate/further": (sum(len(group) > n for group, n in both), len(sampled)),
            "allocate/rescued": (sum(any(r.correct for r in group) for group in failed), len(failed)),
            "allocate/fetched": (len(self.fetched), prompts),
            "allocate/surplus": (surplus, prompts),
        }
