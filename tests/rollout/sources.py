"""Sources of rollouts without servers, each with a thread of its own as the real one has."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from megatron_jackpot.records import Prompt, Rollout
from megatron_jackpot.rollout.collect import Interrupted, Keep, Sums
from megatron_jackpot.rollout.loop_thread import LoopThread
from tests.tiny import groups


class ScriptedSource:
    """Groups that are a function of epoch, prompt and, with `versioned`, the weights they are sampled with.

    Steps of `slow` finish no more than one group before they are interrupted.
    """

    def __init__(self, *, versioned: bool = False, samples: int = 4) -> None:
        self.thread = LoopThread()
        self.versioned, self.samples, self.version = versioned, samples, 0
        self.asked: list[tuple[int, int]] = []
        """(epoch, prompt id) of every group that was made."""
        self.slow: set[tuple[int, int]] = set()
        """(epoch, prompt id) of groups that do not end by themselves."""
        self.calls = 0

    async def collect(
        self,
        epoch: int,
        prompts: Sequence[Prompt],
        *,
        samples: int | None = None,
        stop: Callable[[], str | None] = lambda: None,
        keep: Keep = lambda group: None,
    ) -> tuple[list[list[Rollout]], Sums]:
        version, made = self.version, []
        self.calls += 1
        for prompt in prompts:
            if (epoch, prompt.id) in self.slow:
                continue
            made.append(self.make(epoch, prompt, version))
            self.asked.append((epoch, prompt.id))
            keep(made[-1])
        while len(made) < len(prompts):
            await asyncio.sleep(0.005)
            if (reason := stop()) is not None:
                raise Interrupted(reason, made, {})
        return made, {}

    def make(self, epoch: int, prompt: Prompt, version: int) -> list[Rollout]:
        seed = prompt.id + 1000 * version if self.versioned else prompt.id
        (group,) = groups(range(seed, seed + 1), self.samples)
        stamped = np.int32(version)
        return [
            replace(r, prompt=prompt, epoch=epoch, weight_version=np.full_like(r.weight_version, stamped))
            for r in group
        ]

    async def hold(self, *, until_quiet: bool) -> None: ...

    async def use(self, version: int) -> None:
        self.version = version

    async def abort(self) -> None: ...

    def text(self, tokens: Sequence[int]) -> str:
        return str(list(tokens))

    def close(self) -> None:
        self.thread.close()
