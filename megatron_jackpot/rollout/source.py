"""Where a DP leader gets rollouts: a synchronous face over the asyncio client, the reward pool and
`collect`."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_jackpot.records import Prompt, Rollout
from megatron_jackpot.rewards.pool import RewardPool
from megatron_jackpot.rollout.collect import GroupSampler, Sums, Unfinished
from megatron_jackpot.servers.client import SGLangClient
from megatron_jackpot.servers.protocol import Sampling, ServerError

T = TypeVar("T")


class ServerSource:
    """Rollouts and answers from SGLang servers, scored by a reward pool."""

    def __init__(
        self,
        client: SGLangClient,
        pool: RewardPool,
        *,
        sampling: Sampling,
        samples_per_prompt: int,
        num_ids: int,
        max_failed_groups: float,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self.client = client
        self.pool = pool
        self.sampling = sampling
        self.decode = decode
        self.sampler = GroupSampler(
            client=client,
            sampling=sampling,
            samples_per_prompt=samples_per_prompt,
            reward=self.reward,
            num_ids=num_ids,
            max_failed_groups=max_failed_groups,
        )
        self.loop = asyncio.new_event_loop()
        self._run(client.__aenter__())

    def collect(
        self,
        epoch: int,
        prompts: list[Prompt],
        *,
        samples: int | None = None,
        stop: Callable[[], str | None] = lambda: None,
    ) -> tuple[list[list[Rollout]], Sums]:
        """Groups in the order of `prompts` (failed ones left out, up to the allowed share) and the metrics
        of requests and rewards; `samples` of each in place of the usual number.

        Raises Interrupted or ServersLost, with the groups that were finished, when the rollout ended early,
        and RewardsFailing.
        """
        sampler = self.sampler if samples is None else replace(self.sampler, samples_per_prompt=samples)
        failures = self.pool.failures
        before = failures.begin()
        try:
            groups, sums = self._run(sampler.collect(epoch, prompts, stop))
        except Unfinished as unfinished:
            unfinished.metrics.update(failures.sums(before))
            raise
        return groups, sums | failures.sums(before)

    def check_labels(self, prompts: Sequence[Prompt], path: Path) -> None:
        """Raises ValueError naming the lines of `path` whose label no response could match."""
        self._run(self.pool.check_labels(prompts, path))

    def require_version(self, oldest: int) -> None:
        """Responses with tokens of an older weight version are an error from now on."""
        self.client.min_version = max(oldest, 0)

    async def reward(self, tokens: Sequence[int], prompt: Prompt) -> tuple[float, bool]:
        return await self.pool(self.decode(tokens), prompt.label)

    def verdicts(
        self, answers: Sequence[Sequence[int]], prompts: Sequence[Prompt]
    ) -> tuple[list[bool], float]:
        """Which answers are correct, and the number of rewards that failed. Raises RewardsFailing."""
        before = self.pool.failures.begin()

        async def score() -> list[tuple[float, bool]]:
            return await asyncio.gather(*(self.reward(a, p) for a, p in zip(answers, prompts, strict=True)))

        verdicts = self._run(score())
        failed = sum(total for total, _ in self.pool.failures.sums(before).values())
        return [correct for _, correct in verdicts], failed

    def server_gib(self) -> float | None:
        """Memory of the fullest server; None where one does not say."""
        try:
            return max(self._run(self.client.admin.memory_gib()))
        except ServerError:
            return None

    def text(self, tokens: Sequence[int]) -> str:
        """As a reward reads it."""
        return self.decode(tokens)

    def answers(
        self, prompts: Sequence[Prompt], max_new_tokens: int, *, samples: int, temperature: float
    ) -> list[list[list[int]]]:
        """Of the servers' model, `samples` to each prompt; at temperature 0 the most probable one."""

        async def ask() -> list[list[np.ndarray]]:
            stop = self.sampling.stop_token_ids
            asked = (
                self.client.answers(p.tokens, max_new_tokens, stop, n=samples, temperature=temperature)
                for p in prompts
            )
            return await asyncio.gather(*asked)

        return [[answer.tolist() for answer in group] for group in self._run(ask())]

    def close(self) -> None:
        self._run(self.client.__aexit__(None, None, None))
        self.pool.close()
        self.loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)
