"""Rounds of rollouts, prompts in the place of others, and plans from what was seen: in one process, on
scripted verdicts, through faults and resumes."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_jackpot.algorithm.allocators import CoBA, DynamicSampling, Rescue
from megatron_jackpot.algorithm.allocators_base import Fixed
from megatron_jackpot.rollout.collected import Collected, account
from megatron_jackpot.servers.protocol import ServerError
from tests.rollout.leaders import (
    PER_STEP,
    PROMPTS,
    SAMPLES,
    Run,
    by_turns,
    every_third,
    first_right,
    leaders,
    summary,
    together,
)


@pytest.fixture
def runs():
    made: list[Run] = []

    def make(*args, **options) -> Run:
        made.append(Run(*args, **options))
        return made[-1]

    yield make
    for run in made:
        run.source.close()


def test_a_rescued_prompt_gets_pairs_until_the_first_success_and_its_samples_are_numbered_on(runs) -> None:
    run = runs(Rescue(extra=2, most=10), first_right)
    taken = run.step()
    for group in taken.groups:
        first = group[0].prompt.id % 13
        want = SAMPLES if first < SAMPLES else min(10, SAMPLES + 2 * (1 + (first - SAMPLES) // 2))
        assert [r.sample for r in group] == list(range(want)) == [r.tokens[0] - 1 for r in group]
        asked = [n for number, n in run.source.rounds if number == group[0].prompt.id]
        assert asked == [SAMPLES, *[2] * ((want - SAMPLES) // 2)]
    sizes = [len(group) for group in taken.groups]
    failed = [g for g in taken.groups if not any(r.correct for r in g[:SAMPLES])]
    assert len(set(sizes)) > 1 and taken.sums["allocate/rollouts"] == (sum(sizes), PER_STEP)
    rescued = sum(any(r.correct for r in group) for group in failed)
    assert taken.sums["allocate/rescued"] == (rescued, len(failed)) and rescued
    assert taken.sums["allocate/further"] == (len(failed), PER_STEP)
    told = account(run.pipeline.mesh, taken)["allocated"]
    # Each further round asks for two.
    assert taken.sums["allocate/rounds"] == (sum(1 + (n - SAMPLES) // 2 for n in sizes), PER_STEP)
    wanted = {group[0].prompt.id: group for group in taken.groups}
    for row in zip(*told.values(), strict=True):
        group = wanted.pop(dict(zip(told, row, strict=True))["prompt"])
        rounds, correct = 1 + (len(group) - SAMPLES) // 2, sum(r.correct for r in group)
        assert row == (0, group[0].prompt.id, SAMPLES, len(group), rounds, correct, correct > 0, True)
    assert not wanted


@pytest.mark.parametrize("requests", range(1, 9))
def test_a_rescue_that_was_stopped_anywhere_goes_on_with_the_same_decisions(
    runs, tmp_path: Path, requests: int
) -> None:
    whole = runs(Rescue(extra=2, most=10), first_right)
    want, total = summary(whole.step()), len(whole.source.rounds)
    assert total > 8
    run = runs(Rescue(extra=2, most=10), first_right)
    run.stopped_after(requests)
    run.save(tmp_path)
    again = run.resumed(tmp_path)
    try:
        assert summary(again.step()) == want
        # Nothing that was finished is asked for once more: not a group, and not a round of one.
        assert len(run.source.rounds) + len(again.source.rounds) == total
    finally:
        again.source.close()


def test_dynamic_sampling_replaces_equal_groups_and_the_loader_s_place_does_not_move(runs) -> None:
    run, plain = runs(DynamicSampling(over_sample=2), every_third), runs(Fixed(), every_third)
    for _ in range(4):
        taken, without = run.step(), plain.step()
        assert taken.trained == without.trained and taken.lost == []
        assert len(taken.groups) == PER_STEP
        assert all(group[0].prompt.id % 3 == 0 for group in taken.groups)
        asked = [*taken.trained, *taken.fetched]
        assert len(set(asked)) == len(asked) == len(taken.sampled)
        # The first live ones in the order in which they were asked for, whichever finished first.
        assert [g[0].prompt.id for g in taken.groups] == [i for i in asked if i % 3 == 0][:PER_STEP]
        surplus = sum(i % 3 == 0 for i in asked) - PER_STEP
        assert taken.sums["allocate/surplus"] == (surplus, PER_STEP)
        assert taken.sums["allocate/fetched"] == (len(taken.fetched), PER_STEP)
        assert taken.sums["allocate/rounds"] == (sum(rounds_of(asked)), len(asked))
        told = account(run.pipeline.mesh, taken)
        assert told["fetched"] == sorted(taken.fetched)
        assert not {"fetched", "allocated"} & account(run.pipeline.mesh, without).keys()
        by_prompt = zip(*(told["allocated"][name] for name in ("prompt", "round", "trained")), strict=True)
        trained = {group[0].prompt.id for group in taken.groups}
        assert {number: (round > 0, used) for number, round, used in by_prompt} == {
            number: (number in taken.fetched, number in trained) for number in asked
        }
    assert run.loader.state_dict() == plain.loader.state_dict() and not run.finished


def test_of_a_small_further_round_a_request_may_fail_where_the_whole_step_may_lose_a_group(runs) -> None:
    run = runs(DynamicSampling(over_sample=1.0), every_third)
    run.source.allowed, run.source.errors[-2] = 0.25, ServerError("gone")
    taken = run.step()
    lost = {*taken.fetched} - {group[0].prompt.id for group in taken.sampled}
    second = [number for number, round in taken_rounds(taken) if round == 1]
    # One of two or three is more than a quarter of the round, and less than one of the step's groups.
    assert len(lost) == 1 and lost < {*second} and len(second) < PER_STEP
    assert taken.sums["rollout/failed_groups"] == (1, PER_STEP + len(taken.fetched))
    assert len(taken.groups) == PER_STEP and all(group[0].prompt.id % 3 == 0 for group in taken.groups)


def taken_rounds(taken: Collected) -> list[tuple[int, int]]:
    """(prompt id, round in which it was asked for first) of each."""
    return [(row.prompt, row.round) for row in taken.allocated]


def rounds_of(asked: list[int]) -> list[int]:
    """Of each prompt the step's round in which it was asked for, from 1, with over_sample 2."""
    rounds = [1] * PER_STEP
    while (live := sum(i % 3 == 0 for i in asked[: len(rounds)])) < PER_STEP:
        rounds += [rounds[-1] + 1] * min(PER_STEP, 2 * (PER_STEP - live))
    return rounds


def test_fetched_prompts_of_a_step_do_not_meet_the_loader_s_of_a_step_in_flight(runs) -> None:
    """30 prompts wait in three steps ahead, of which step 1 fetches some too: each has a group of its own."""
    alone, ahead = (runs(DynamicSampling(over_sample=2), every_third, ahead=n) for n in (0, 3))
    for _ in range(4):
        assert summary(alone.step()) == summary(ahead.step())
    assert not alone.finished and all(
        any(batch.owns(key) for batch in ahead.pipeline.batches) for key in ahead.finished
    )


@pytest.mark.parametrize("requests", range(1, 8))
def test_dynamic_sampling_that_was_stopped_in_any_round_goes_on_with_the_same_decisions(
    runs, tmp_path: Path, requests: int
) -> None:
    whole = runs(DynamicSampling(over_sample=2), every_third)
    whole.step()
    before, taken = len(whole.source.rounds), whole.step()
    want, fetched, total = summary(taken), taken.fetched, len(whole.source.rounds)
    assert total - before == 8
    run = runs(DynamicSampling(over_sample=2), every_third)
    run.step()
    run.stopped_after(before + requests)
    run.save(tmp_path)
    again = run.resumed(tmp_path)
    try:
        resumed = again.step()
        assert summary(resumed) == want and resumed.fetched == fetched
        assert len(run.source.rounds) + len(again.source.rounds) == total
    finally:
        again.source.close()


def test_where_no_other_prompts_are_left_equal_groups_fill_the_step(
    runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_jackpot.rollout.outcome.raise_on_all_ranks", nullcontext)
    run = runs(DynamicSampling(over_sample=3, max_rounds=99), lambda number: "0000")
    taken = run.step()
    assert [g[0].prompt.id for g in taken.groups] == taken.trained
    assert len(taken.fetched) == len(PROMPTS) - PER_STEP
    failing = runs(DynamicSampling(max_rounds=2, on_exhausted="fail"), lambda number: "0000")
    with pytest.raises(RuntimeError, match="0 of 4 groups differ in correct"):
        failing.step()


@dataclass(frozen=True, kw_only=True)
class Told(CoBA):
    """CoBA that writes into the plan's prompts what it knew: the number of steps that it had seen."""

    num_visits = 50

    def plan(self, ids, samples, memory) -> list[int]:
        PLANNED.append(len(memory.rates))
        return super().plan(ids, samples, memory)


PLANNED: list[int] = []


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_a_plan_sees_exactly_the_steps_before_those_in_flight_also_after_a_resume(
    runs, tmp_path: Path, ahead: int
) -> None:
    PLANNED.clear()
    whole = runs(Told(), by_turns, ahead=ahead)
    sizes = [[len(group) for group in whole.step().groups] for _ in range(14)]
    steps = range(1, 14 + ahead + 1)
    assert PLANNED == [max(0, step - 1 - ahead) for step in steps]
    assert all(sum(own) == PER_STEP * SAMPLES for own in sizes) and any(len(set(own)) > 1 for own in sizes)
    run = runs(Told(), by_turns, ahead=ahead)
    for _ in range(11):
        run.step()
    run.pipeline.interrupt("test")
    PLANNED.clear()
    run.save(tmp_path)
    again = run.resumed(tmp_path)
    try:
        assert [[len(group) for group in again.step().groups] for _ in range(3)] == sizes[11:]
        # Steps in flight have the plans that were made of them.
        assert PLANNED == [step - 1 - ahead for step in range(12 + ahead, 15 + ahead)]
    finally:
        again.source.close()


@pytest.mark.parametrize("dp", [1, 4])
def test_a_stop_within_a_round_on_two_leaders_goes_on_with_the_same_decisions_on_others(
    runs, tmp_path: Path, dp: int
) -> None:
    allocator = Rescue(extra=2, most=10)
    whole = runs(allocator, first_right)
    want, total = sorted(summary(whole.step())), len(whole.source.rounds)
    stopped = [runs(allocator, first_right, mesh=leader) for leader in leaders(2)]
    together([lambda run=run: run.stopped_after(4) for run in stopped])
    for run in stopped:
        run.save(tmp_path)
    again = [stopped[0].resumed(tmp_path, leader) for leader in leaders(dp)]
    try:
        parts = together([run.step for run in again])
        assert sorted(g for part in parts for g in summary(part)) == want
        assert sum(len(run.source.rounds) for run in [*stopped, *again]) == total
    finally:
        for run in again:
            run.source.close()
