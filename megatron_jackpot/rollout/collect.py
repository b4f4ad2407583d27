"""Prompts -> rollouts with rewards: a coroutine per group, failures counted up to a limit."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from megatron_jackpot.records import Prompt, Rollout
from megatron_jackpot.rewards.pool import Verdict
from megatron_jackpot.run.interrupt import Stop, never
from megatron_jackpot.servers.protocol import Completion, Engine, Sampling, ServerError, StaleWeights

POLL_S = 0.25
"""How often a rollout looks whether it is to stop."""
MAX_ABORTS = 10
"""How often a group that servers aborted is asked for again before it counts as failed."""

NOTHING_BEGUN: Mapping[int, list[Rollout]] = MappingProxyType({})
"""Rollouts of earlier rounds, by prompt id: none."""

Reward = Callable[[Sequence[int], Prompt], Awaitable[Verdict]]
Keep = Callable[[list[Rollout]], None]
"""Told of each group when a round of it is finished."""
More = Callable[[Prompt, list[Rollout]], int]
"""Further rollouts of a prompt that has these; 0 where its group is whole."""


class Unfinished(Exception):
    """A rollout that ended before all its groups were there; `groups` are those that were, whole."""

    def __init__(self, why: str, groups: list[list[Rollout]], metrics: "Sums"):
        super().__init__(why)
        self.groups, self.metrics = groups, metrics


class Interrupted(Unfinished):
    """It was asked to stop."""


class ServersLost(Unfinished):
    """More groups were lost to failed requests, or to servers with old weights, than a step may lose."""


@dataclass
class Losses:
    """A step's groups, and those of them that requests failed for: what may be lost is a share of them, in
    however many calls they are asked for."""

    groups: int
    failed: int = 0


@dataclass
class Tally:
    """What happened to the groups of one call."""

    num_prompts: int
    groups: dict[int, list[Rollout]] = field(default_factory=dict)
    """Finished groups by their position in the list of prompts."""
    failed: int = 0
    aborted: int = 0
    retries: int = 0
    dropped_topk: int = 0
    topk: int = 0
    tokens: int = 0
    unknown_tokens: int = 0

    def note_retry(self) -> None:
        self.retries += 1


Sums = dict[str, tuple[float, float]]
"""Name -> (sum, count) of one leader's requests."""


@dataclass(frozen=True, kw_only=True)
class GroupSampler:
    """How groups are made: who samples, with what settings, and who judges."""

    client: Engine
    sampling: Sampling
    samples_per_prompt: int
    reward: Reward
    num_ids: int
    """Ids 0 .. num_ids - 1 have a row in the embedding of both models."""
    max_failed_groups: float
    """Share of a step's groups that may be lost to failed requests."""
    aside: bool = False
    """Requests do not queue behind those of other steps."""

    async def collect(
        self,
        epoch: int,
        prompts: Sequence[Prompt],
        stop: Stop = never,
        keep: Keep = lambda group: None,
        more: More | None = None,
        begun: Mapping[int, list[Rollout]] = NOTHING_BEGUN,
        losses: Losses | None = None,
    ) -> tuple[list[list[Rollout]], Sums]:
        """Whole groups in the order of `prompts`, and (sum, count) metrics of the requests.

        A group whose request failed is left out and counted; more than `max_failed_groups` (a share) of them,
        or a reply of old weights, raise ServersLost with the last cause. A group with an aborted completion
        is asked for again and counted apart. `stop`, asked all the time, gives a reason to raise Interrupted.
        Requests in flight then are aborted. Errors of the reward and wrong prompts end the call at once.
        `keep` is told of a group as soon as it is there, whatever becomes of the call.

        `losses` are those of the step so far, and are added to: of three groups that are left to ask for one
        may fail where the whole step may lose one. Without them the call is a step of its own.

        `more` asks for rounds of rollouts, `samples_per_prompt` in one round without it; `begun` has those of
        earlier calls, by prompt id. A group that a later round failed for keeps what it has.
        """
        more = more or self._usual
        tally, lost = Tally(num_prompts=len(prompts)), losses or Losses(len(prompts))

        async def one_group(position: int, prompt: Prompt) -> None:
            group = begun.get(prompt.id, [])
            while (number := more(prompt, group)) > 0:
                try:
                    made = await self._one_round(prompt, epoch, number, len(group), tally)
                except ServerError as error:
                    tally.failed, lost.failed = tally.failed + 1, lost.failed + 1
                    _check_failures(lost, self.max_failed_groups, error)
                    return
                group = tally.groups[position] = [*group, *made]
                keep(group)

        def so_far() -> tuple[list[list[Rollout]], Sums]:
            return [tally.groups[position] for position in sorted(tally.groups)], _metrics(tally)

        try:
            reason = await _run_all([one_group(i, prompt) for i, prompt in enumerate(prompts)], stop)
        except (StaleWeights, _TooManyFailures) as error:
            raise ServersLost(str(error), *so_far()) from error
        if reason is not None:
            raise Interrupted(reason, *so_far())
        return so_far()

    def _usual(self, prompt: Prompt, group: list[Rollout]) -> int:
        return self.samples_per_prompt - len(group)

    async def _one_round(
        self, prompt: Prompt, epoch: int, number: int, first: int, tally: Tally
    ) -> list[Rollout]:
        """`number` rollouts of a prompt, numbered from `first` on. Raises ServerError and StaleWeights."""
        completions = await self._unbroken(prompt, number, tally)
        tally.dropped_topk += sum(completion.num_dropped_topk for completion in completions)
        tally.topk += sum(completion.topk_ids.size for completion in completions)
        tally.tokens += sum(len(completion.tokens) for completion in completions)
        known = [_known(completion, self.num_ids) for completion in completions]
        tally.unknown_tokens += sum(int((~here).sum()) for here in known)
        return await self._rewarded(prompt, epoch, completions, known, first=first)

    async def _unbroken(self, prompt: Prompt, number: int, tally: Tally) -> list[Completion]:
        """A group of which nothing was aborted. Raises ServerError and StaleWeights."""
        for _ in range(MAX_ABORTS):
            completions = await self.client.generate_group(
                prompt.tokens, number, self.sampling, retried=tally.note_retry, aside=self.aside
            )
            if all(completion.finish != "abort" for completion in completions):
                return completions
            tally.aborted += 1
            await asyncio.sleep(POLL_S)
        raise ServerError(f"a group of prompt {prompt.id} was aborted {MAX_ABORTS} times")

    async def _rewarded(
        self,
        prompt: Prompt,
        epoch: int,
        completions: list[Completion],
        known: list[np.ndarray],
        *,
        first: int,
    ) -> list[Rollout]:
        judged = (self.reward(completion.tokens.tolist(), prompt) for completion in completions)
        verdicts = await asyncio.gather(*judged)
        made = rollouts_of(prompt, epoch, completions, verdicts, first=first)
        return [replace(one, valid=one.valid & ids) for one, ids in zip(made, known, strict=True)]


def _known(completion: Completion, num_ids: int) -> np.ndarray:
    """bool [R]: False from the first id on that one of the models has no row for. That model cannot read what
    follows either: the gradient through a row of padding has no bound."""
    return np.logical_and.accumulate(completion.tokens < num_ids)


async def _run_all(work: list[Coroutine[None, None, None]], stop: Stop) -> str | None:
    """All coroutines side by side; the first error, or a reason to stop, cancels the others."""
    tasks = [asyncio.ensure_future(one) for one in work]
    unfinished = set(tasks)
    try:
        while unfinished:
            done, unfinished = await asyncio.wait(
                unfinished, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()
            if unfinished and (reason := stop()) is not None:
                return reason
    finally:
        for task in unfinished:
            task.cancel()
        # Those too that failed beside the first: asyncio would write each one's traceback.
        await asyncio.gather(*tasks, return_exceptions=True)
    return None


class _TooManyFailures(RuntimeError):
    pass


def _check_failures(lost: Losses, max_failed_groups: float, error: ServerError) -> None:
    if lost.failed > max_failed_groups * lost.groups:
        raise _TooManyFailures(
            f"{lost.failed} of {lost.groups} groups were lost to failed requests, more than "
            f"rollout.max_failed_groups = {max_failed_groups:g} allows. Last error: {error}"
        ) from error


def _metrics(tally: Tally) -> Sums:
    return {
        "rollout/dropped_topk": (tally.dropped_topk, tally.topk),
        "rollout/unknown_tokens": (tally.unknown_tokens, tally.tokens),
        "rollout/failed_groups": (tally.failed, tally.num_prompts),
        "rollout/aborted_groups": (tally.aborted, tally.num_prompts),
        "rollout/retries": (tally.retries, tally.num_prompts),
    }


def rollouts_of(
    prompt: Prompt,
    epoch: int,
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    *,
    first: int = 0,
) -> list[Rollout]:
    """Rollouts of a prompt from what was sampled and the verdict on each, numbered from `first` on."""
    return [
        Rollout(
            prompt=prompt,
            epoch=epoch,
            sample=sample,
            tokens=completion.tokens,
            server_logp=completion.server_logp,
            topk_ids=completion.topk_ids,
            topk_logp=completion.topk_logp,
            valid=completion.valid,
            weight_version=completion.weight_version,
            finish=completion.finish,
            reward=float(reward),
            correct=bool(correct),
            parts=parts[0] if parts else {},
        )
        for sample, (completion, (reward, correct, *parts)) in enumerate(
            zip(completions, verdicts, strict=True), first
        )
    ]


def _prefilled_again(rollout: Rollout) -> int:
    """Tokens that pushes had read a second time: prompt and response before each change of weights."""
    before = np.flatnonzero(np.diff(rollout.weight_version)) + 1
    return int((len(rollout.prompt.tokens) + before).sum())


def group_metrics(groups: Sequence[Sequence[Rollout]]) -> Sums:
    """(sum, count) metrics of finished groups, however they came together."""
    rollouts = [rollout for group in groups for rollout in group]
    tokens = sum(len(rollout.tokens) for rollout in rollouts)
    count = len(rollouts)
    return {
        "reward/mean": (sum(r.reward for r in rollouts), count),
        "reward/correct": (sum(r.correct for r in rollouts), count),
        "rollout/response_tokens": (tokens, count),
        "rollout/truncated": (sum(r.finish == "length" for r in rollouts), count),
        "rollout/invalid_tokens": (sum(int((~r.valid).sum()) for r in rollouts), tokens),
        "rollout/prefilled_again": (sum(map(_prefilled_again, rollouts)), tokens),
        "rollout/equal_rewards": (sum(len({r.reward for r in group}) == 1 for group in groups), len(groups)),
    }
