"""Sources of rollouts without servers, each with a thread of its own as the real one has."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_jackpot.records import Prompt, Rollout
from megatron_jackpot.rollout.collect import GroupSampler, Interrupted, Keep, Losses, Sums
from megatron_jackpot.rollout.finished_groups import PER_TOKEN, Groups, load_groups
from megatron_jackpot.rollout.loop_thread import LoopThread
from megatron_jackpot.servers.protocol import Completion, Sampling
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
        self.made: Groups = {}
        self.slow: set[tuple[int, int]] = set()
        """(epoch, prompt id) of groups that do not end by themselves."""
        self.calls = 0
        self.attempts: list[str] = []
        """Of the weights it was told to use, each once, in their order."""

    async def collect(
        self,
        epoch: int,
        prompts: Sequence[Prompt],
        *,
        samples: int | None = None,
        stop: Callable[[], str | None] = lambda: None,
        keep: Keep = lambda group: None,
        losses: Losses | None = None,
    ) -> tuple[list[list[Rollout]], Sums]:
        version, made = self.version, []
        self.calls += 1
        for prompt in prompts:
            if (epoch, prompt.id) in self.slow:
                continue
            made.append(self.make(epoch, prompt, version))
            self.asked.append((epoch, prompt.id))
            self.made[epoch, prompt.id] = made[-1]
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

    async def hold(self) -> None: ...

    async def quiet(self) -> None: ...

    async def use(self, version: int, attempt: str) -> None:
        self.version = version
        if attempt not in self.attempts:
            self.attempts.append(attempt)

    async def abort(self) -> None: ...

    def text(self, tokens: Sequence[int]) -> str:
        return str(list(tokens))

    def close(self) -> None:
        self.thread.close()


class HeavyTail(ScriptedSource):
    """A step's groups side by side, each as long, in tokens and seconds, as a Pareto draw of its prompt."""

    LONGEST = 16
    """Tokens, where a response is cut."""

    def __init__(self, unit_s: float) -> None:
        """`unit_s` are the seconds of the shortest; the longest of 8 draws is about 5 times it on average."""
        super().__init__()
        self.unit_s = unit_s

    def draw(self, epoch: int, prompt: Prompt) -> float:
        return random.Random(f"{epoch}/{prompt.id}").paretovariate(2.0)

    async def collect(self, epoch: int, prompts: Sequence[Prompt], **options: Any) -> tuple[list, Sums]:
        collect = super().collect

        async def one(prompt: Prompt) -> list[list[Rollout]]:
            await asyncio.sleep(self.unit_s * self.draw(epoch, prompt))
            made, _ = await collect(epoch, [prompt], **options)
            return made

        return [group for made in await asyncio.gather(*map(one, prompts)) for group in made], {}

    def make(self, epoch: int, prompt: Prompt, version: int) -> list[Rollout]:
        length = min(self.LONGEST, round(3 * self.draw(epoch, prompt)))
        return [
            replace(r, **{name: _resized(getattr(r, name), length) for name in PER_TOKEN})
            for r in super().make(epoch, prompt, version)
        ]


class RecordedSource(ScriptedSource):
    """Plays what was sampled in a run, each token with its version of then: what servers answer, and how old
    it is when it is trained on, does not depend on when they are asked."""

    def __init__(self, recorded: Path, prompts: Sequence[Prompt]) -> None:
        super().__init__()
        self.recorded = load_groups(recorded, {prompt.id: prompt for prompt in prompts})

    def make(self, epoch: int, prompt: Prompt, version: int) -> list[Rollout]:
        return self.recorded[epoch, prompt.id]


class JudgedSource(ScriptedSource):
    """Rounds as the real source makes them; a prompt's verdicts are a text of 0 and 1, by its id.

    Tokens are (sample + 1, 2) under weights of version 0, so that a rollout shows which one it is.
    """

    def __init__(self, verdicts: Callable[[int], str], samples: int) -> None:
        super().__init__(samples=samples)
        self.verdicts = verdicts
        self.rounds: list[tuple[int, int]] = []
        """(prompt id, rollouts) of every request."""
        self.allowed = 0.0
        """Share of a step's groups that may fail."""
        self.delay_s = 0.0
        """Before each request is answered."""
        self.after: dict[int, int] = {}
        """Epoch -> another one, of which a request must have been answered before any of its own."""
        self.errors: dict[int, Exception] = {}
        """By epoch: what its next request ends with, once."""
        self.limit: int | None = None
        """Requests that are answered; the others do not end by themselves."""

    async def collect(self, epoch: int, prompts: Sequence[Prompt], **options: Any) -> tuple[list, Sums]:
        begun = options.get("begun", {})
        sampler = GroupSampler(
            client=Requests(self, epoch, {prompt.id: len(begun.get(prompt.id, [])) for prompt in prompts}),
            sampling=Sampling(temperature=1.0, max_new_tokens=4, top_k_logp=1),
            samples_per_prompt=self.samples,
            reward=self.reward,
            num_ids=1000,
            max_failed_groups=self.allowed,
        )
        return await sampler.collect(epoch, prompts, **options)

    async def reward(self, tokens: Sequence[int], prompt: Prompt) -> tuple[float, bool]:
        correct = self.verdicts(prompt.id)[tokens[0] - 1] == "1"
        return float(correct), correct


class Requests:
    """The servers of one `collect`: prompts end with their id, of which so many rollouts were had before."""

    def __init__(self, source: JudgedSource, epoch: int, sampled: dict[int, int]) -> None:
        self.source, self.epoch, self.sampled = source, epoch, sampled

    async def generate_group(
        self, prompt_tokens: Sequence[int], n: int, sampling: Sampling, **_: object
    ) -> list[Completion]:
        number, source = prompt_tokens[-1], self.source
        await asyncio.sleep(source.delay_s)
        while source.after.get(self.epoch) not in {None, *(epoch for epoch, _ in source.asked)}:
            await asyncio.sleep(0.005)
        if self.epoch in source.errors:
            raise source.errors.pop(self.epoch)
        while source.limit is not None and len(source.rounds) >= source.limit:
            await asyncio.sleep(0.005)
        source.rounds.append((number, n))
        source.asked.append((self.epoch, number))
        first = self.sampled[number]
        self.sampled[number] += n
        return [_numbered(sample) for sample in range(first, first + n)]


def _resized(rows: np.ndarray, length: int) -> np.ndarray:
    return np.resize(rows, (length, *rows.shape[1:]))


def _numbered(sample: int) -> Completion:
    return Completion(
        tokens=np.array([sample + 1, 2], np.int32),
        server_logp=np.array([-1.0, -0.5], np.float32),
        topk_ids=np.array([[3], [2]], np.int32),
        topk_logp=np.array([[-0.7], [-0.5]], np.float32),
        valid=np.ones(2, np.bool_),
        weight_version=np.zeros(2, np.int32),
        finish="stop",
        num_dropped_topk=0,
    )
