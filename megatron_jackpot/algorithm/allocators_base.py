"""What every allocator shares: how many rollouts a prompt gets, in rounds, and what is remembered of prompts.

All of it is pure: a decision is a function of finished groups, of the step's prompts and of what was observed
in earlier steps, so that every leader, layout and resumed run comes to the same one.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypedDict

Observed = Sequence[tuple[int, int, int]]
"""(prompt id, correct, rollouts) of the first round of each of a step's groups over all leaders: the loader's
prompts in its order, then those that were fetched in the order in which they were."""


class MemoryState(TypedDict):
    """Memory as JSON."""

    visits: list[list[list[int]]]
    """[[prompt id], [correct, rollouts], ...] of each prompt."""
    rates: list[float]


@dataclass(kw_only=True)
class Memory:
    """What an allocator remembers of finished steps; a checkpoint holds it."""

    visits: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Prompt id -> (correct, rollouts) of its last visits, the newest last."""
    rates: list[float] = field(default_factory=list)
    """Mean pass rate over the prompts of each of the last steps, the newest last."""

    def state_dict(self) -> "MemoryState":
        visits = [[[number], *map(list, seen)] for number, seen in self.visits.items()]
        return {"visits": visits, "rates": self.rates}

    def load_state_dict(self, state: "MemoryState") -> None:
        self.visits = {number: [(c, n) for c, n in seen] for (number,), *seen in state["visits"]}
        self.rates = list(state["rates"])


@dataclass(frozen=True, kw_only=True)
class Allocator:
    """Base of every allocator. Fields are the keys under `rollout.allocator` in YAML."""

    allocates: ClassVar[bool] = True
    """Whether prompts may get other than the same number of rollouts: what it did is measured then."""
    num_visits: ClassVar[int] = 0
    """Of each prompt, how many are remembered; 0 of one that plans without."""

    @property
    def replaces(self) -> bool:
        """Whether it decides over all of a step's groups, which leaders then tell each other: it asks for
        further prompts in the place of some (`fetch`), or leaves groups out (`commit`)."""
        own = type(self)
        return own.fetch is not Allocator.fetch or own.commit is not Allocator.commit

    def bounds(self, samples: int) -> tuple[int, int]:
        """The least and most rollouts that a prompt may get in the plan, where each gets `samples` on
        average."""
        return samples, samples

    def plan(self, ids: Sequence[int], samples: int, memory: Memory) -> list[int]:
        """Rollouts of each of a step's prompts in its first round: they add up to samples x prompts."""
        return [samples] * len(ids)

    def more(self, correct: Sequence[bool]) -> int:
        """Further rollouts of a prompt whose last round is finished, given the verdicts on all of them; 0
        ends it."""
        return 0

    def live(self, rewards: Sequence[float], correct: Sequence[bool]) -> bool:
        """Whether a finished group is wanted, where others may replace it."""
        return True

    def fetch(self, wanted: int, live: int, rounds: int) -> int:
        """Further prompts, of all leaders, after so many rounds with so many live groups of the `wanted`; 0
        ends the step."""
        return 0

    def commit(self, live: Sequence[bool], wanted: int) -> list[int]:
        """Which of a step's groups are trained on, ascending, given which are live, in the order in which
        their prompts were asked for."""
        return list(range(len(live)))

    def observe(self, observed: Observed, memory: Memory) -> None:
        """Remember a step's groups, all of them, before any selection."""
        if not self.num_visits or not observed:
            return
        for number, correct, n in observed:
            if n:
                memory.visits[number] = [*memory.visits.get(number, []), (correct, n)][-self.num_visits :]
        rates = [correct / n for _, correct, n in observed if n]
        memory.rates = [*memory.rates, sum(rates) / max(len(rates), 1)][-self.num_visits :]


@dataclass(frozen=True, kw_only=True)
class Fixed(Allocator):
    """`rollout.samples_per_prompt` rollouts of every prompt."""

    allocates: ClassVar[bool] = False


def greedy(count: int, least: int, most: int, budget: int, gain: Callable[[int, int], float]) -> list[int]:
    """Integers in [least, most] with sum `budget` that maximise a sum of concave functions of each.

    `gain(i, n)` is what number i gains from n to n + 1; it must not grow with n, which makes this optimal.
    Ties go to the first. O(budget log count).
    """
    numbers = [least] * count
    heap = [(-gain(i, least), i) for i in range(count) if least < most]
    heapq.heapify(heap)
    for _ in range(budget - least * count):
        _, i = heap[0]
        numbers[i] += 1
        if numbers[i] < most:
            heapq.heapreplace(heap, (-gain(i, numbers[i]), i))
        else:
            heapq.heappop(heap)
    return numbers
