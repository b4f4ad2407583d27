"""How many rollouts each prompt of a step gets: an allocator's plans, and what it has seen in earlier steps.

A plan is made where its step begins, in the main thread of every leader, from what was observed until then:
steps 0 .. t - 1 - ahead, also after a resume, which finds the plans of the steps in flight.
"""

from collections.abc import Sequence
from typing import TypedDict

from megatron_jackpot.algorithm.allocators_base import Allocator, Memory, MemoryState, Observed
from megatron_jackpot.records import Rollout


class AllocationState(TypedDict):
    """An allocation as JSON, after the last step that was taken."""

    memory: MemoryState
    plans: list[tuple[int, list[tuple[int, int]]]]
    """(step, (prompt id, rollouts) of each)."""


class Allocation:
    """The allocator of a run with its memory; equal on every leader."""

    def __init__(self, allocator: Allocator, samples: int) -> None:
        """`samples`: rollouts of a prompt, on average over a step."""
        self.allocator, self.samples = allocator, samples
        self.memory = Memory()
        self.plans: dict[int, dict[int, int]] = {}
        """Step -> prompt id -> rollouts of the first round, of the steps in flight, where it hangs on the
        memory."""

    def plan(self, step: int, ids: Sequence[int]) -> dict[int, int]:
        """Prompt id -> rollouts of its first round, of all leaders' prompts of a step."""
        if list(self.plans.get(step, ())) == list(ids):
            return self.plans[step]
        plan = dict(zip(ids, self.allocator.plan(ids, self.samples, self.memory), strict=True))
        if self.allocator.num_visits:
            self.plans[step] = plan
        return plan

    def more(self, planned: int, group: Sequence[Rollout]) -> int:
        """Further rollouts of a prompt that has these; 0 where its group is whole."""
        if len(group) < planned:
            return planned - len(group)
        return self.allocator.more([rollout.correct for rollout in group])

    def rounds(self, planned: int, group: Sequence[Rollout]) -> int:
        """In how many rounds a group became what it is."""
        begun, number = 0, 0
        while begun < len(group):
            begun += max(1, self.more(planned, group[:begun]))
            number += 1
        return number

    def live(self, group: Sequence[Rollout]) -> bool:
        return bool(self.allocator.live([r.reward for r in group], [r.correct for r in group]))

    def observe(self, step: int, observed: Observed) -> None:
        """A step was taken, with these groups; its plan is done with."""
        self.plans.pop(step, None)
        self.allocator.observe(observed, self.memory)

    def state_dict(self) -> AllocationState:
        plans = [(step, [*plan.items()]) for step, plan in self.plans.items()]
        return {"memory": self.memory.state_dict(), "plans": plans}

    def load_state_dict(self, state: AllocationState) -> None:
        self.memory.load_state_dict(state["memory"])
        self.plans = {step: dict(plan) for step, plan in state["plans"]}
