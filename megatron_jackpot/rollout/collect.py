"""Prompts -> rollouts with rewards and advantages: a coroutine per group, failures counted up to a limit."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace

from megatron_jackpot.batch import Prompt, Rollout
from megatron_jackpot.rollout.engine import Completion, Engine, Sampling, ServerError

Reward = Callable[[Sequence[int], Prompt], Awaitable[tuple[float, bool]]]
Advantage = Callable[[list[float]], list[float]]


@dataclass
class Tally:
    """What happened to the groups of one call."""

    num_prompts: int
    groups: dict[int, list[Rollout]] = field(default_factory=dict)
    """Finished groups by their position in the list of prompts."""
    failed: int = 0
    aborted: int = 0
    dropped_topk: int = 0
    last_error: ServerError | None = None


async def collect(
    prompts: Sequence[Prompt],
    epoch: int,
    client: Engine,
    sampling: Sampling,
    n: int,
    reward: Reward,
    advantage: Advantage,
    max_failed_groups: float,
    on_group: Callable[[list[Rollout]], None] | None = None,
) -> tuple[list[Rollout], dict[str, tuple[float, float]]]:
    """Whole groups in the order of `prompts`, and (sum, count) metrics.

    A group whose request failed is left out and counted; more than `max_failed_groups` (a share) of them
    raise RuntimeError with the last cause. A group with an aborted completion is left out and counted apart.
    Errors of the reward, StaleWeights and wrong prompts end the call at once. `on_group` is called with each
    finished group.
    """
    tally = Tally(num_prompts=len(prompts))
    retries_before = getattr(client, "num_retries", 0)

    async def one_group(position: int, prompt: Prompt) -> None:
        try:
            completions = await client.generate_group(prompt.tokens, n, sampling)
        except ServerError as error:
            tally.failed, tally.last_error = tally.failed + 1, error
            _check_failures(tally, max_failed_groups)
            return
        if any(completion.finish == "abort" for completion in completions):
            tally.aborted += 1
            return
        tally.dropped_topk += sum(completion.num_dropped_topk for completion in completions)
        group = await _rewarded(prompt, epoch, completions, reward, advantage)
        tally.groups[position] = group
        if on_group is not None:
            on_group(group)

    await _run_all([one_group(position, prompt) for position, prompt in enumerate(prompts)])
    groups = [tally.groups[position] for position in sorted(tally.groups)]
    retries = getattr(client, "num_retries", 0) - retries_before
    return [rollout for group in groups for rollout in group], _metrics(tally, groups, retries)


async def _run_all(work: list[Coroutine[None, None, None]]) -> None:
    """All coroutines side by side; the first error cancels the others and is raised as it is."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _rewarded(
    prompt: Prompt, epoch: int, completions: list[Completion], reward: Reward, advantage: Advantage
) -> list[Rollout]:
    verdicts = await asyncio.gather(*(reward(completion.tokens, prompt) for completion in completions))
    rollouts = [
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
            reward=float(verdict[0]),
            correct=bool(verdict[1]),
        )
        for sample, (completion, verdict) in enumerate(zip(completions, verdicts, strict=True))
    ]
    advantages = advantage([rollout.reward for rollout in rollouts])
    return [replace(r, advantage=float(a)) for r, a in zip(rollouts, advantages, strict=True)]


def _check_failures(tally: Tally, max_failed_groups: float) -> None:
    if tally.failed > max_failed_groups * tally.num_prompts:
        raise RuntimeError(
            f"{tally.failed} of {tally.num_prompts} groups were lost to failed requests, more than "
            f"rollout.max_failed_groups = {max_failed_groups:g} allows. Last error: {tally.last_error}"
        ) from tally.last_error


def _metrics(tally: Tally, groups: list[list[Rollout]], retries: int) -> dict[str, tuple[float, float]]:
    rollouts = [rollout for group in groups for rollout in group]
    tokens = sum(len(rollout.tokens) for rollout in rollouts)
    count = len(rollouts)
    return {
        "reward/mean": (sum(r.reward for r in rollouts), count),
        "reward/correct": (sum(r.correct for r in rollouts), count),
        "rollout/response_tokens": (tokens, count),
        "rollout/truncated": (sum(r.finish == "length" for r in rollouts), count),
        "rollout/invalid_tokens": (sum(int((~r.valid).sum()) for r in rollouts), tokens),
        "rollout/dropped_topk": (tally.dropped_topk, sum(r.topk_ids.size for r in rollouts)),
        "rollout/equal_rewards": (sum(len({r.reward for r in group}) == 1 for group in groups), len(groups)),
        "rollout/failed_groups": (tally.failed, tally.num_prompts),
        "rollout/aborted_groups": (tally.aborted, tally.num_prompts),
        "rollout/retries": (retries, tally.num_prompts),
    }
