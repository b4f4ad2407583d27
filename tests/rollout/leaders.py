"""A leader's pipeline on scripted verdicts, of leaders that are threads of one process or real ranks."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_jackpot.algorithm.allocators_base import Allocator
from megatron_jackpot.config import Rollouts
from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.records import Prompt
from megatron_jackpot.rollout.allocation import Allocation
from megatron_jackpot.rollout.collected import Collected
from megatron_jackpot.rollout.finished_groups import Groups, load_groups, save_groups
from megatron_jackpot.rollout.outcome import StopRun
from megatron_jackpot.rollout.pipeline import Pipeline
from tests.rollout.sources import JudgedSource

PROMPTS = [Prompt(id=i, tokens=(1, 10, i), label=None) for i in range(40)]
PER_STEP, SAMPLES = 4, 4


class Leader:
    """A mesh of leaders that are threads of one process, as one of them sees it."""

    def __init__(
        self, dp: int, dp_rank: int, barrier: threading.Barrier, values: list, store: dist.Store
    ) -> None:
        self.dp, self.dp_rank, self.dp_group = dp, dp_rank, self
        self.barrier, self.values, self.store = barrier, values, store

    def gather(self, value: Any) -> list:
        self.values[self.dp_rank] = value
        self.barrier.wait(60)
        seen = [*self.values]
        self.barrier.wait(60)
        return seen

    def own_store(self) -> dist.Store:
        return self.store.clone()

    def wait_for_leaders(self, what: str, timeout_s: float) -> None:
        self.gather(None)

    def largest(self, value: int) -> int:
        return max(self.gather(value))


def leaders(dp: int) -> list[Leader]:
    shared = threading.Barrier(dp), [None] * dp, dist.HashStore()
    return [Leader(dp, rank, *shared) for rank in range(dp)]


def together(calls: list[Callable[[], Any]]) -> list:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [work.result() for work in [pool.submit(call) for call in calls]]


class Run:
    """A leader's pipeline on scripted verdicts, as the trainer moves it."""

    def __init__(
        self,
        allocator: Allocator,
        verdicts: Callable[[int], str],
        ahead: int = 0,
        mesh: Leader | Mesh | None = None,
        samples: int = SAMPLES,
    ) -> None:
        mesh = mesh or leaders(1)[0]
        self.allocation = Allocation(allocator, samples)
        self.source, self.finished, self.why = JudgedSource(verdicts, samples), Groups(), ""
        self.loader = PromptLoader(PROMPTS, PER_STEP, mesh.dp_rank, mesh.dp, 5)
        self.ahead, self.steps = ahead, 0
        self.pipeline = Pipeline(
            mesh,
            Rollouts(samples_per_prompt=samples, max_staleness=99),
            self.source,
            lambda: self.why or None,
            self.finished,
            limit_s=20,
            allocation=self.allocation,
        )

    def step(self) -> Collected:
        number = self.steps + 1
        for later in range(number, number + self.ahead + 1):
            self.pipeline.start(later, self.loader)
        taken = self.pipeline.take(number, self.loader, recover=lambda: self.pipeline.pushed(0, "test"))
        assert taken is not None
        self.steps = number
        return taken

    def stopped_after(self, requests: int | None) -> None:
        """The next step is interrupted when so many requests have been answered; None: by another leader."""
        if requests is not None:
            self.source.limit, self.why = requests, "test"
        with pytest.raises(StopRun):
            self.step()
        self.pipeline.interrupt("test")

    def resumed(self, folder: Path, mesh: Leader | Mesh | None = None) -> "Run":
        """A leader of another process, from what the leaders' checkpoint holds."""
        samples = self.allocation.samples
        again = Run(self.allocation.allocator, self.source.verdicts, self.ahead, mesh, samples)
        again.load(folder, json.loads(json.dumps(self.state_dict())))
        return again

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint's state.json has of it."""
        allocation, loader = self.allocation.state_dict(), self.loader.state_dict()
        return {"steps": self.steps, "loader": loader, "allocation": allocation}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.loader.load_state_dict(state["loader"])
        self.allocation.load_state_dict(state["allocation"])
        for path in folder.glob("*.npz"):
            self.finished |= load_groups(path, {prompt.id: prompt for prompt in PROMPTS})

    def save(self, folder: Path) -> None:
        save_groups(folder / f"rollouts-{self.pipeline.mesh.dp_rank}.npz", self.finished)


def first_right(number: int) -> str:
    """Prompt i is right for the first time at its (i mod 13)-th rollout."""
    return "".join("1" if sample == number % 13 else "0" for sample in range(99))


def summary(taken: Collected) -> list[list[tuple[tuple[int, int, int], int, bool]]]:
    return [[(r.key, int(r.tokens[0]), r.correct) for r in group] for group in taken.groups]


def by_turns(number: int) -> str:
    """Pass rates from 0 to nearly 1, and other verdicts on each prompt."""
    return "".join("1" if (number * 7 + sample * 5) % 11 < number % 9 else "0" for sample in range(200))


def every_third(number: int) -> str:
    """Two prompts of three are all wrong."""
    return "0100" if number % 3 == 0 else "0000"
