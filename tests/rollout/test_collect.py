"""collect: whole groups in order, failures counted up to the limit."""

import asyncio
import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_jackpot.records import Prompt
from megatron_jackpot.rollout import collect
from megatron_jackpot.rollout.collect import (
    GroupSampler,
    Interrupted,
    Losses,
    Reward,
    ServersLost,
    group_metrics,
)
from megatron_jackpot.servers.protocol import Completion, Sampling, ServerError, StaleWeights
from tests.tiny import rollout

SAMPLING = Sampling(temperature=1.0, max_new_tokens=4, top_k_logp=2)
NUM_IDS = 61
PROMPTS = [Prompt(id=10 + i, tokens=(1, i), label=None) for i in range(10)]


def completion(token: int, finish: str = "stop") -> Completion:
    return Completion(
        tokens=np.array([token, 2], np.int32),
        server_logp=np.array([-1.0, 0.0], np.float32),
        topk_ids=np.array([[token, 3], [2, -1]], np.int32),
        topk_logp=np.array([[-1, -2], [-0.5, -np.inf]], np.float32),
        valid=np.array([True, False]),
        weight_version=np.array([4, 4], np.int32),
        finish=finish,
        num_dropped_topk=1,
    )


class ScriptedEngine:
    """Completions whose first token is 5 * sample; scripted failures by the prompt's second token."""

    def __init__(self, **failures: dict[int, Any]) -> None:
        self.raises = failures.get("raises", {})
        self.aborts = failures.get("aborts", {})

    async def generate_group(
        self,
        prompt_tokens: Sequence[int],
        n: int,
        sampling: Sampling,
        *,
        retried: Callable[[], None],
        aside: bool,
    ) -> list[Completion]:
        which = prompt_tokens[1]
        await asyncio.sleep(0.001 * (10 - which))
        retried()
        if which in self.raises:
            raise self.raises[which]
        self.aborts[which] = self.aborts.get(which, 0) - 1
        finish = "abort" if self.aborts[which] >= 0 else "stop"
        return [completion(5 * i, finish) for i in range(n)]


async def reward(tokens: Sequence[int], prompt: Prompt) -> tuple[float, bool]:
    return float(tokens[0]), tokens[0] == 10


def sampler(engine: Any, reward: Reward = reward, *, n: int = 3, allowed: float = 0.0) -> GroupSampler:
    return GroupSampler(
        client=engine,
        sampling=SAMPLING,
        samples_per_prompt=n,
        reward=reward,
        num_ids=NUM_IDS,
        max_failed_groups=allowed,
    )


def run(engine: Any, *, allowed: float = 0.0, stop: Callable[[], str | None] = lambda: None) -> Any:
    return asyncio.run(sampler(engine, allowed=allowed).collect(1, PROMPTS, stop))


class OneAnswer:
    """Every completion is these tokens."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens

    async def generate_group(
        self, prompt: Sequence[int], n: int, sampling: Sampling, **_: object
    ) -> list[Completion]:
        num = len(self.tokens)
        made = Completion(
            tokens=np.array(self.tokens, np.int32),
            server_logp=np.full(num, -1.0, np.float32),
            topk_ids=np.full((num, 2), 3, np.int32),
            topk_logp=np.full((num, 2), -1.0, np.float32),
            valid=np.ones(num, bool),
            weight_version=np.full(num, 4, np.int32),
            finish="stop",
        )
        return [made] * n


@pytest.mark.parametrize(
    ("tokens", "valid"),
    [
        ([5, NUM_IDS - 1, 2], [True, True, True]),
        ([5, NUM_IDS, 2], [True, False, False]),
        ([NUM_IDS + 2, 5, 2], [False, False, False]),
        ([5, 6, NUM_IDS], [True, True, False]),
    ],
)
def test_from_an_id_on_that_one_model_has_no_row_for_tokens_are_masked_and_counted(tokens, valid):
    groups, metrics = run(OneAnswer(*tokens))
    assert len(groups) == len(PROMPTS)
    assert all(rollout.valid.tolist() == valid for group in groups for rollout in group)
    num = len(PROMPTS) * 3
    assert metrics["rollout/unknown_tokens"] == (num * valid.count(False), num * len(valid))
    assert group_metrics(groups)["rollout/invalid_tokens"] == (num * valid.count(False), num * len(valid))


def test_of_failures_at_the_same_moment_one_is_raised_and_none_is_written_to_the_console(caplog):
    class Down:
        async def generate_group(self, *_: object, **__: object) -> list[Completion]:
            raise StaleWeights("old")

    with pytest.raises(ServersLost, match="old"):
        run(Down())
    gc.collect()
    assert not caplog.records


def test_what_stands_before_a_change_of_weights_in_a_response_counts_as_read_a_second_time():
    whole = rollout(7, 0)
    prompt = len(whole.prompt.tokens)
    made = [
        replace(whole, tokens=whole.tokens[:1].repeat(4), weight_version=np.array(versions, np.int32))
        for versions in ([4, 4, 4, 4], [4, 4, 5, 7], [3, 4, 4, 4])
    ]
    assert group_metrics([made])["rollout/prefilled_again"] == (3 * prompt + 2 + 3 + 1, 12)


def test_rollouts_come_in_prompt_order_with_reward_and_verdict():
    groups, metrics = run(ScriptedEngine())
    rollouts = [rollout for group in groups for rollout in group]
    metrics |= group_metrics(groups)
    assert [rollout.key for rollout in rollouts] == [
        (1, 10 + i, sample) for i in range(10) for sample in range(3)
    ]
    assert [r.reward for r in rollouts[:3]] == [0.0, 5.0, 10.0]
    assert {r.advantage for r in rollouts} == {0.0}  # made after collection
    assert [r.correct for r in rollouts[:3]] == [False, False, True]
    assert metrics["reward/correct"] == (10, 30)
    assert metrics["rollout/invalid_tokens"] == (30, 60)
    assert metrics["rollout/dropped_topk"] == (30, 120)
    assert metrics["rollout/retries"] == (10, 10)


def test_failed_groups_are_counted_and_left_out_up_to_the_allowed_share():
    engine = ScriptedEngine(
        raises={3: ServerError("http://a: HTTP 500"), 5: ServerError("http://b: HTTP 500")}
    )
    groups, metrics = run(engine, allowed=0.2)
    assert [group[0].prompt.id for group in groups] == [i for i in range(10, 20) if i not in (13, 15)]
    assert metrics["rollout/failed_groups"] == (2, 10)
    # Which of the two is told depends on which came last, and that on the machine.
    with pytest.raises(
        ServersLost, match="2 of 10 groups were lost.*max_failed_groups = 0.1.*http://[ab]: HTTP 500"
    ):
        run(engine, allowed=0.1)


def test_of_the_groups_that_are_left_as_many_may_fail_as_of_their_whole_step():
    engine, step = ScriptedEngine(raises={i: ServerError("HTTP 500") for i in (3, 4, 5)}), Losses(groups=20)

    def ask(first: int, last: int) -> list:
        collect = sampler(engine, allowed=0.1).collect(1, PROMPTS[first:last], losses=step)
        return [group[0].prompt.id for group in asyncio.run(collect)[0]]

    assert ask(2, 5) == [12] and step.failed == 2
    with pytest.raises(ServersLost, match="3 of 20 groups were lost to failed requests"):
        ask(5, 7)


def test_a_group_with_an_aborted_completion_is_asked_for_again_and_counted(monkeypatch):
    monkeypatch.setattr(collect, "POLL_S", 0.001)
    groups, metrics = run(ScriptedEngine(aborts={0: 2}))
    assert len(groups) == 10 and metrics["rollout/aborted_groups"] == (2, 10)
    groups, metrics = run(ScriptedEngine(aborts={0: collect.MAX_ABORTS}), allowed=0.1)
    assert len(groups) == 9 and metrics["rollout/failed_groups"] == (1, 10)


def test_groups_that_are_finished_are_told_of_before_the_call_ends():
    kept = []
    with pytest.raises(ServersLost):
        asyncio.run(sampler(StaleInTheEnd(), allowed=1.0).collect(0, PROMPTS, keep=kept.append))
    assert sorted(group[0].prompt.id for group in kept) == list(range(11, 20))


class StaleInTheEnd(ScriptedEngine):
    async def generate_group(self, prompt_tokens, n, sampling, **how):
        if prompt_tokens[1] == 0:
            await asyncio.sleep(1.0)
            raise StaleWeights("old")
        return await super().generate_group(prompt_tokens, n, sampling, **how)


def test_old_weights_end_the_call_with_the_groups_that_were_finished():
    with pytest.raises(ServersLost, match="old") as caught:
        run(StaleInTheEnd(), allowed=1.0)
    assert [group[0].prompt.id for group in caught.value.groups] == list(range(11, 20))
    assert caught.value.metrics["rollout/failed_groups"] == (0, 10)


def test_a_wrong_prompt_ends_the_call_whatever_share_may_fail():
    with pytest.raises(ValueError, match="prompt too long"):
        run(ScriptedEngine(raises={9: ValueError("prompt too long")}), allowed=1.0)


def test_an_interrupted_rollout_gives_what_was_finished_and_aborts_the_rest():
    class Slow(ScriptedEngine):
        cancelled = 0

        async def generate_group(self, prompt_tokens, n, sampling, **how):
            try:
                if prompt_tokens[1] < 3:
                    await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            return await super().generate_group(prompt_tokens, n, sampling, **how)

    def only_slow_ones_are_left() -> str | None:
        return "SIGUSR1" if len(asyncio.all_tasks() - {asyncio.current_task()}) == 3 else None

    engine = Slow()
    with pytest.raises(Interrupted, match="SIGUSR1") as caught:
        run(engine, stop=only_slow_ones_are_left)
    assert [group[0].prompt.id for group in caught.value.groups] == list(range(13, 20))
    assert engine.cancelled == 3


def test_an_error_of_the_reward_is_not_swallowed():
    async def broken(tokens: Sequence[int], prompt: Prompt) -> tuple[float, bool]:
        raise KeyError("answer")

    with pytest.raises(KeyError, match="answer"):
        asyncio.run(sampler(ScriptedEngine(), broken, n=2, allowed=1.0).collect(0, PROMPTS))


def test_groups_whose_rewards_are_equal_are_counted():
    async def same(tokens: Sequence[int], prompt: Prompt) -> tuple[float, bool]:
        return 1.0, True

    groups, _ = asyncio.run(sampler(ScriptedEngine(), same, n=2).collect(0, PROMPTS))
    assert group_metrics(groups)["rollout/equal_rewards"] == (10, 10)
