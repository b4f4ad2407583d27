"""Where a DP leader gets rollouts: `collect` in a thread of its own, over the servers' client and the reward
pool, which are processes."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from megatron_jackpot.records import Prompt, Rollout
from megatron_jackpot.rewards.failures import Counts, failure_sums
from megatron_jackpot.rewards.pool import START_TIMEOUT_S, RewardPool, Verdict
from megatron_jackpot.rollout.collect import (
    NOTHING_BEGUN,
    POLL_S,
    GroupSampler,
    Interrupted,
    Keep,
    Losses,
    More,
    Sums,
    Unfinished,
)
from megatron_jackpot.rollout.loop_thread import LoopThread
from megatron_jackpot.run.interrupt import Stop, never
from megatron_jackpot.servers.admin import ServerAdmin
from megatron_jackpot.servers.client_process import ClientProcess
from megatron_jackpot.servers.protocol import Sampling, ServerError

T = TypeVar("T")

log = logging.getLogger(__name__)

OPEN_LIMIT_S = 60.0
"""For what starts or ends a client, or ends workers."""
ABORT_LIMIT_S, MEMORY_LIMIT_S = 10.0, 60.0
"""For servers to abort, and to say what they hold."""
TOLD_EVERY_S = 15.0
"""How often an evaluation that takes longer than that says how far it is."""


class ServerSource:
    """Rollouts and answers from SGLang servers, scored by a reward pool.

    Coroutines are for `thread`; the other methods wait there for what they ask, with a limit of time.
    """

    def __init__(
        self,
        client: Callable[[], ClientProcess],
        pool: Callable[[], RewardPool],
        *,
        urls: Sequence[str],
        sampling: Sampling,
        samples_per_prompt: int,
        num_ids: int,
        max_failed_groups: float,
        decode: Callable[[Sequence[int]], str],
        limit_s: float,
    ) -> None:
        """`client` and `pool` are made in the thread, which outlives them; `urls` are the servers';
        `limit_s`, which is run.phase_timeout_s, is for the answers to a set, for their verdicts, and for a
        file's labels."""
        self.urls, self.sampling, self.decode, self.limit_s = urls, sampling, decode, limit_s
        self.thread = LoopThread()
        try:
            self.pool = self.thread.call(pool, 2 * START_TIMEOUT_S, "the reward workers to start")
            self.client = self.thread.call(client, OPEN_LIMIT_S, "the servers' client")
            self.thread.wait(self.client.__aenter__(), OPEN_LIMIT_S, "the servers' client to start")
        except BaseException as error:
            try:
                self.thread.close()
            except TimeoutError as late:
                error.add_note(f"While cleaning up: {late}")
            raise
        self.sampler = GroupSampler(
            client=self.client,
            sampling=sampling,
            samples_per_prompt=samples_per_prompt,
            reward=partial(self.reward, self.pool.counters),
            num_ids=num_ids,
            max_failed_groups=max_failed_groups,
        )

    async def collect(
        self,
        epoch: int,
        prompts: Sequence[Prompt],
        *,
        samples: int | None = None,
        stop: Stop = never,
        keep: Keep = lambda group: None,
        more: More | None = None,
        begun: Mapping[int, list[Rollout]] = NOTHING_BEGUN,
        losses: Losses | None = None,
        aside: bool = False,
    ) -> tuple[list[list[Rollout]], Sums]:
        """Groups in the order of `prompts` (failed ones left out, up to the allowed share, see
        GroupSampler) and the metrics of requests and rewards; `samples` of each in place of the usual number,
        or what `more` asks for. `aside` they do not queue behind the requests of other steps.

        Raises Interrupted or ServersLost, with the groups that were finished, when the rollout ended early,
        and RewardsFailing.
        """
        counts = self.pool.failures.begin()
        samples = self.sampler.samples_per_prompt if samples is None else samples
        reward = partial(self.reward, counts)
        sampler = replace(self.sampler, samples_per_prompt=samples, reward=reward, aside=aside)
        try:
            groups, sums = await sampler.collect(epoch, prompts, stop, keep, more, begun, losses)
        except Unfinished as unfinished:
            unfinished.metrics.update(failure_sums(counts))
            raise
        return groups, sums | failure_sums(counts)

    async def reward(self, counts: Counts, tokens: Sequence[int], prompt: Prompt) -> Verdict:
        return await self.pool(self.decode(tokens), prompt.label, counts, self._seen(tokens, prompt))

    def _seen(self, tokens: Sequence[int], prompt: Prompt) -> dict[str, object]:
        """What the reward asks for beside text and label."""
        offered: dict[str, Callable[[], object]] = {
            "prompt": lambda: self.decode(prompt.tokens),
            "num_tokens": lambda: len(tokens),
            "finish_reason": lambda: (
                "stop" if set(tokens[-1:]) & set(self.sampling.stop_token_ids) else "length"
            ),
        }
        return {name: offered[name]() for name in self.pool.asks}

    async def hold(self) -> None:
        """Begin no request until `use`; those that servers have go on."""
        await self.client.hold()

    async def quiet(self) -> None:
        """Until servers have no request any more."""
        await self.client.quiet()

    async def use(self, version: int, attempt: str) -> None:
        """Servers hold these weights of this attempt now: requests begin again."""
        await self.client.use(version, attempt)

    async def abort(self) -> None:
        """Servers drop what they were asked for: nobody waits for it any more."""
        with suppress(ServerError):
            # One that does not answer samples nothing that anyone could read.
            await ServerAdmin(self.urls, timeout_s=ABORT_LIMIT_S).abort_all()

    def check_labels(self, prompts: Sequence[Prompt], path: Path) -> None:
        """Raises ValueError naming the lines of `path` whose label no response could match."""
        self._wait(self.pool.check_labels(prompts, path), f"the labels of {path}")

    def verdicts(
        self, answers: Sequence[Sequence[int]], prompts: Sequence[Prompt], stop: Stop = never
    ) -> tuple[list[bool], float]:
        """Which answers are correct, and the number of rewards that failed, whose answers are not. Raises
        RewardsFailing, and Interrupted."""
        judged = self._judged(answers, prompts, stop)
        return [one is not None and one[1] for one in judged], judged.count(None)

    def rewards(self, answers: Sequence[Sequence[int]], prompts: Sequence[Prompt]) -> list[float | None]:
        """The reward of each answer, None where it failed. Raises RewardsFailing."""
        return [None if one is None else one[0] for one in self._judged(answers, prompts, never)]

    def _judged(
        self, answers: Sequence[Sequence[int]], prompts: Sequence[Prompt], stop: Stop
    ) -> list[Verdict | None]:
        counts = self.pool.failures.begin()

        async def judge(answer: Sequence[int], prompt: Prompt) -> Verdict | None:
            return await self.pool.judge(
                self.decode(answer), prompt.label, counts, self._seen(answer, prompt)
            )

        work = [judge(a, p) for a, p in zip(answers, prompts, strict=True)]
        return self._wait(_all_of(work, stop), f"verdicts on {len(prompts)} answers")

    def _wait(self, work: Coroutine[object, None, T], what: str) -> T:
        """As the thread does, for as long as a phase may take."""
        return self.thread.wait(work, self.limit_s, f"{what} (run.phase_timeout_s)")

    def server_gib(self) -> float | None:
        """Memory of the fullest server; None where one does not say."""
        try:
            asked = ServerAdmin(self.urls, timeout_s=MEMORY_LIMIT_S).memory_gib()
            return max(self._wait(asked, "the servers' memory"))
        except ServerError:
            return None

    def text(self, tokens: Sequence[int]) -> str:
        """As a reward reads it."""
        return self.decode(tokens)

    def answers(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        *,
        samples: int,
        temperature: float,
        stop: Stop = never,
    ) -> list[list[list[int]]]:
        """Of the servers' model, `samples` to each prompt; at temperature 0 the most probable one. Raises
        Interrupted."""

        ends, done, told_at = self.sampling.stop_token_ids, 0, time.monotonic()

        async def answered(prompt: Prompt) -> list[np.ndarray]:
            nonlocal done, told_at
            group = await self.client.answers(
                prompt.tokens, max_new_tokens, ends, n=samples, temperature=temperature
            )
            done += 1
            if time.monotonic() - told_at > TOLD_EVERY_S and done < len(prompts):
                told_at = time.monotonic()
                log.info(f"{done} of {len(prompts)} problems answered")
            return group

        work = _all_of([answered(prompt) for prompt in prompts], stop)
        asked = self._wait(work, f"answers to {len(prompts)} prompts")
        return [[answer.tolist() for answer in group] for group in asked]

    def close(self) -> None:
        """End requests, the client, the workers and, last, the thread."""
        try:
            # First, so that a reward that is cancelled starts no new worker.
            self.thread.call(self.pool.close, OPEN_LIMIT_S, "the reward workers to end")
            self.thread.cancel()
            left = self.client.__aexit__(None, None, None)
            self.thread.wait(left, OPEN_LIMIT_S, "the servers' client to end")
        finally:
            self.thread.close()


async def _all_of(work: Sequence[Coroutine[object, None, T]], stop: Stop) -> list[T]:
    """What each gives, in their order. Raises Interrupted, and the first error; the others end then."""
    tasks = [asyncio.ensure_future(one) for one in work]
    whole = asyncio.gather(*tasks)
    try:
        while not (await asyncio.wait([whole], timeout=POLL_S))[0]:
            if (reason := stop()) is not None:
                raise Interrupted(reason, [], {})
        return whole.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(whole, *tasks, return_exceptions=True)
