"""Rollouts ahead of training, on two leaders without models: order, ages, faults and rollbacks."""

import asyncio
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.models.mesh import destroy_mesh, init_mesh
from megatron_jackpot.rewards.failures import RewardsFailing
from megatron_jackpot.rollout.outcome import StopRun
from megatron_jackpot.rollout.pipeline import Pipeline
from tests.parallel.layouts import NUM_PROMPTS, Layout, make_config
from tests.parallel.spawn import run_ranks
from tests.rollout.sources import ScriptedSource
from tests.tiny import rollout


class Late(ScriptedSource):
    """The first call ends last."""

    async def collect(self, epoch, prompts, **options):
        if not self.calls:
            self.calls += 1
            await asyncio.sleep(0.3)
        return await super().collect(epoch, prompts, **options)


class Broken(ScriptedSource):
    """Fails on one leader."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.error = error

    async def collect(self, epoch, prompts, **options):
        if self.error is not None:
            raise self.error
        return await super().collect(epoch, prompts, **options)


class Busy(ScriptedSource):
    """Its servers have requests for `seconds` after a hold, or their client is gone."""

    def __init__(self, seconds: float, error: Exception | None = None) -> None:
        super().__init__()
        self.seconds, self.error = seconds, error
        self.done: list[str] = []

    async def hold(self) -> None:
        self.done.append("held")

    async def quiet(self) -> None:
        if self.error is not None:
            raise self.error
        await asyncio.sleep(self.seconds)
        self.done.append("quiet")


class Made:
    """A leader's pipeline over `source`, its loader and its finished groups."""

    def __init__(self, mesh, config, source, stop=lambda: None, limit_s=20.0, **options) -> None:
        rollouts = config.rollout.model_copy(update={"max_staleness": 2})
        self.finished, self.source = {}, source
        self.pipeline = Pipeline(mesh, rollouts, source, stop, self.finished, limit_s=limit_s, **options)
        prompts = [rollout(p, 0).prompt for p in range(NUM_PROMPTS * 4)]
        self.loader = PromptLoader(prompts, NUM_PROMPTS, mesh.dp_rank, mesh.dp, 5)

    def start(self, *steps: int) -> None:
        for step in steps:
            self.pipeline.start(step, self.loader)

    def take(self, step: int, recover=lambda: None):
        return self.pipeline.take(step, self.loader, recover)

    def close(self) -> None:
        self.source.close()


def _order(mesh, config) -> list[list[int]]:
    """Prompts trained in each step where the first one's rollouts end last, and the loader's own order."""
    made = Made(mesh, config, Late())
    made.start(1, 2, 3)
    trained = [made.take(step).trained for step in (1, 2, 3)]
    fresh = Made(mesh, config, made.source).loader
    wanted = [[prompt.id for prompt in fresh.next()[1]] for _ in range(3)]
    made.close()
    return [trained, wanted, made.loader.state_dict()["position"], len(made.finished)]


def _failures(mesh, config) -> list[str]:
    """What each error of leader 1 is on this rank."""
    seen = []
    for error in (RewardsFailing("too many"), ValueError("the prompt is wrong")):
        made = Made(mesh, config, Broken(error if mesh.dp_rank == 1 else None))
        made.start(1, 2)
        with pytest.raises((RewardsFailing, ValueError, OSError)) as caught:
            made.take(1)
        seen.append(f"{type(caught.value).__name__}: {caught.value}")
        made.close()
    return seen


def _ages(mesh, config) -> list:
    """Groups of leader 1 were sampled with weights that step 4 must not train on: its sums, versions."""
    made = Made(mesh, config, ScriptedSource())
    made.start(1, 2, 3)
    for step in (1, 2, 3):
        made.take(step)
    made.pipeline.pushed(3 if mesh.dp_rank == 0 else 0, "test")
    made.start(4)
    while len(made.finished) < NUM_PROMPTS // 2:
        time.sleep(0.01)
    made.pipeline.pushed(3, "test")
    taken = made.take(4)
    made.close()
    versions = {int(v) for group in taken.groups for r in group for v in r.weight_version}
    return [versions, taken.sums["rollout/stale_groups"], taken.sums["rollout/stale_tokens"][0] > 0]


def _unknown(mesh, config) -> list:
    """Of weights before version 3 the law is not known any more, as after a resume: what step 4 gets."""
    made = Made(mesh, config, ScriptedSource())
    made.start(1, 2, 3)
    for step in (1, 2, 3):
        made.take(step)
    made.pipeline.pushed(2, "test")
    made.start(4)
    while len(made.finished) < NUM_PROMPTS // 2:
        time.sleep(0.01)
    made.pipeline.pushed(3, "test")
    made.pipeline.known_since = lambda: 3
    taken = made.take(4)
    made.close()
    versions = {int(v) for group in taken.groups for r in group for v in r.weight_version}
    return [versions, taken.sums["rollout/stale_groups"]]


def _stop(mesh, config) -> list:
    """A stop while the main thread waits: what is kept, and where the loader stands."""
    began = time.monotonic()
    made = Made(mesh, config, ScriptedSource(), lambda: "test" if time.monotonic() > began + 0.4 else None)
    first = [prompt.id for prompt in Made(mesh, config, made.source).loader.next()[1]]
    made.source.slow = {(0, first[0])}
    made.start(1, 2)
    with pytest.raises(StopRun):
        made.take(1)
    made.pipeline.interrupt("test")
    place = made.loader.state_dict()["position"]
    made.close()
    return [len(made.finished), place]


def _wait(mesh, config) -> list:
    """What a push has waited for: with `retract`, with `wait`, and with `wait` where the run is to stop; what
    it raises where servers are busy for longer than a rollout may take, or where their client is gone."""
    waited, raised = [], []
    for in_flight, stop, seconds in (("retract", None, 60), ("wait", None, 0.4), ("wait", "test", 60)):
        made = Made(mesh, config, Busy(seconds), lambda stop=stop: stop, in_flight=in_flight)
        made.pipeline.hold()
        waited.append([*made.source.done])
        made.close()
    for source in (Busy(60), Busy(0, RuntimeError("gone"))):
        made = Made(mesh, config, source, limit_s=0.2, in_flight="wait")
        with pytest.raises((TimeoutError, RuntimeError)) as caught:
            made.pipeline.hold()
        raised.append(str(caught.value))
        made.close()
    return [waited, raised]


def _rollback(mesh, config) -> list:
    """Back to before step 1 with weights of the same number: whose groups step 1 gets."""
    made = Made(mesh, config, ScriptedSource(versioned=True))
    before = made.loader.state_dict()
    made.start(1, 2, 3)
    made.take(1)
    made.pipeline.drop()
    left = len(made.finished), len(made.pipeline.batches)
    made.loader.load_state_dict(before)
    asked = len(made.source.asked)
    made.pipeline.pushed(0, "test")
    made.start(1)
    trained = made.take(1).trained
    made.close()
    return [left, [i for _, i in made.source.asked[asked:]] == trained, made.loader.state_dict()["position"]]


def _all(rank: int, world: int, folder: str) -> dict[str, object]:
    config = make_config(Layout(dp=2), Path(folder))
    mesh = init_mesh(config.parallel, 5)
    cases = {
        "order": _order,
        "failures": _failures,
        "ages": _ages,
        "unknown": _unknown,
        "stop": _stop,
        "wait": _wait,
        "rollback": _rollback,
    }
    seen = {}
    for name, case in cases.items():
        seen[name] = case(mesh, config)
        dist.barrier()
    destroy_mesh()
    return seen


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict]:
    return run_ranks(_all, 2, 120, str(folder))


def test_a_step_trains_the_loaders_batch_whichever_is_finished_first(seen) -> None:
    for rank in seen:
        trained, wanted, position, left = rank["order"]
        assert trained == wanted and position == 3 * NUM_PROMPTS and left == 0


def test_what_fails_in_one_leaders_thread_is_raised_on_every_rank(seen) -> None:
    other, own = (rank["failures"] for rank in seen)
    assert own == ["RewardsFailing: too many", "ValueError: the prompt is wrong"]
    assert other[0].startswith("RewardsFailing: ")
    assert other[1] == "OSError: rank 1: ValueError: the prompt is wrong"


def test_groups_that_are_too_old_are_sampled_anew_and_counted_with_their_length(seen) -> None:
    half = NUM_PROMPTS // 2
    assert seen[0]["ages"] == [{3}, (0, half), False]
    assert seen[1]["ages"] == [{3}, (half, half), True]


def test_groups_of_weights_that_are_not_known_any_more_are_sampled_anew_where_they_are_scored(seen) -> None:
    for rank in seen:
        assert rank["unknown"] == [{3}, (NUM_PROMPTS // 2, NUM_PROMPTS // 2)]


def test_a_stop_keeps_what_is_finished_of_every_step_and_the_place_of_the_first(seen) -> None:
    for rank in seen:
        assert rank["stop"] == [NUM_PROMPTS - 1, 0]


def test_a_push_waits_for_responses_in_flight_only_where_that_is_asked_for_and_no_longer_than_a_rollout(
    seen,
) -> None:
    for rank in seen:
        waited, (late, gone) = rank["wait"]
        assert waited == [["held"], ["held", "quiet"], ["held"]]
        assert "Waited 0.2 s for the responses in flight" in late and gone == "gone"


def test_after_a_rollback_nothing_of_the_attempt_before_is_trained_on(seen) -> None:
    for rank in seen:
        assert rank["rollback"] == [(0, 0), True, NUM_PROMPTS]
