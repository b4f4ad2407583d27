"""dynamic_sampling on leaders that are processes of their own, on a TCP store: the same decisions as a single
leader's, in whatever order rounds end, through faults, stops and rollbacks."""

import threading
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_jackpot.algorithm.allocators import DynamicSampling
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.servers.protocol import ServerError
from tests.parallel.spawn import run_ranks
from tests.rollout.leaders import Run, every_third, leaders, summary, together

ALLOCATOR = DynamicSampling(over_sample=2)
STEPS = 4
STOPS = {2: (0, 1, 2, 3), 4: (0, 1)}
"""By dp: replies that the last leader gets before it is stopped. At dp 2: none, one of two of round 0, both
(round 1 is decided and not sent), one of two of round 1; at dp 4 it has one prompt of each round."""

Decided = list[tuple[list, list[int]]]
"""Of each step, a leader's groups and the ids of prompts that it fetched."""


def steps(run: Run, number: int = STEPS) -> Decided:
    return [(summary(taken), taken.fetched) for taken in (run.step() for _ in range(number))]


def made(mesh: Mesh, ahead: int = 0) -> Run:
    return Run(ALLOCATOR, every_third, ahead, mesh)


def _undisturbed(mesh: Mesh, folder: Path) -> Any:
    return [_closed(made(mesh, ahead), steps) for ahead in (0, 2)]


def _overtaken(mesh: Mesh, folder: Path) -> Any:
    """On leader 0 round 1 of step 1 ends after that of step 2, on the others before: the decisions, and the
    epochs that were asked for, in order."""
    run = made(mesh, ahead=1)
    run.source.after = {-2: -3} if mesh.dp_rank == 0 else {-3: -2}
    return _closed(run, lambda run: [steps(run, 2), [epoch for epoch, _ in run.source.asked]])


def _lost(mesh: Mesh, folder: Path) -> Any:
    """On the last leader a request of round 1 fails, of step 2 and of step 3: the next push asks again, as it
    would for any batch in flight, or `take` does. Decisions, and the attempt of what is in flight at last."""
    run, last = made(mesh, ahead=1), mesh.dp_rank == mesh.dp - 1
    if last:
        run.source.errors |= {-3: ServerError("gone"), -4: ServerError("gone")}
    decided = steps(run, 1)
    while last and not (run.pipeline.batches[0].work or futures.Future()).done():
        time.sleep(0.01)
    run.pipeline.pushed(0, "test")
    return _closed(run, lambda run: [decided + steps(run, STEPS - 1), run.pipeline.batches[-1].attempt])


def _stale(mesh: Mesh, folder: Path) -> Any:
    """When step 1 is taken, all that the last leader has of it is too old, once: the decisions, how many of
    its requests were made, and the attempt of what is in flight at last."""
    run, oldest = made(mesh, ahead=1), iter([1])
    if mesh.dp_rank == mesh.dp - 1:
        run.pipeline.known_since = lambda: next(oldest, 0)
    decided = steps(run, 1)
    asked = [epoch for epoch, _ in run.source.asked].count(-2)
    return _closed(
        run, lambda run: [decided + steps(run, STEPS - 1), asked, run.pipeline.batches[-1].attempt]
    )


def _failed(mesh: Mesh, folder: Path) -> Any:
    """One leader's error in round 1 is everyone's, at once."""
    run, began = made(mesh), time.monotonic()
    if mesh.dp_rank == mesh.dp - 1:
        run.source.errors[-2] = ValueError("the prompt is wrong")
    with pytest.raises((ValueError, OSError)) as caught:
        run.step()
    run.source.close()
    return f"{type(caught.value).__name__}: {caught.value}", time.monotonic() - began


def _late(mesh: Mesh, folder: Path) -> Any:
    """The last leader's first round does not end before leader 0 has said that it waits no longer."""
    run, store = made(mesh), mesh.own_store()
    if mesh.dp_rank == 0:
        run.pipeline.limit_s = 0.3
    if mesh.dp_rank == mesh.dp - 1:
        run.source.limit = 0

        def release() -> None:
            while not store.check(["jackpot/exchange/0/1/ended"]):
                time.sleep(0.01)
            run.source.limit = None

        threading.Thread(target=release, daemon=True).start()
    with pytest.raises(OSError) as caught:
        run.step()
    run.source.close()
    return f"{type(caught.value).__name__}: {caught.value}"


def _stopped(mesh: Mesh, folder: Path) -> Any:
    """The last leader alone is stopped, at each of STOPS: this leader's requests until then."""
    asked = []
    for limit in STOPS[mesh.dp]:
        run = made(mesh)
        run.stopped_after(limit if mesh.dp_rank == mesh.dp - 1 else None)
        at = folder / f"{limit}"
        at.mkdir(exist_ok=True)
        run.save(at)
        run.source.close()
        asked.append(len(run.source.rounds))
    return asked


def _rolled_back(mesh: Mesh, folder: Path) -> Any:
    """Back to the start while leaders wait for round 1 of step 2, other groups having been live before: the
    decisions after it."""
    run = made(mesh, ahead=1)
    before, run.source.verdicts = run.loader.state_dict(), lambda number: every_third(number + 1)
    if mesh.dp_rank == 0:
        run.source.after = {-3: -99}
    run.step()
    run.source.after.clear()
    run.pipeline.drop()
    run.source.verdicts = every_third
    run.loader.load_state_dict(before)
    run.steps = 0
    return _closed(run, steps)


def _closed(run: Run, what: Callable[[Run], Any]) -> Any:
    try:
        return what(run)
    finally:
        run.source.close()


CASES = {
    "undisturbed": _undisturbed,
    "overtaken": _overtaken,
    "lost": _lost,
    "stale": _stale,
    "failed": _failed,
    "late": _late,
    "stopped": _stopped,
    "rolled back": _rolled_back,
}


def _all(rank: int, world: int, folder: str) -> dict[str, Any]:
    (mesh, store), seen = tcp_mesh(rank, world), {}
    for name, case in CASES.items():
        seen[name] = case(mesh, Path(folder))
        dist.barrier()
        seen[f"left by {name}"] = left = [key for key in store.list_keys() if "exchange" in key]
        dist.barrier()
        for key in left if rank == 0 else ():
            store.delete_key(key)  # A run that ends leaves words, and each case is one.
        dist.barrier()
    return seen


def tcp_mesh(rank: int, world: int) -> tuple[Mesh, dist.Store]:
    """Leaders only, over a store of the kind that torchrun makes; in place of the ranks' group."""
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = [host and host.port]
    dist.broadcast_object_list(port, src=0)
    dist.destroy_process_group()
    store = host or dist.TCPStore("127.0.0.1", int(port[0] or 0), is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    alone = [dist.new_group([i]) for i in range(world)][rank]
    return Mesh(alone, alone, dist.group.WORLD, alone, torch.device("cpu")), store


@pytest.fixture(scope="module", params=[2, 4], ids=["dp 2", "dp 4"])
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict], Path]:
    """What each leader saw, and where they saved."""
    folder = tmp_path_factory.mktemp("stops")
    return run_ranks(_all, request.param, 120, str(folder)), folder


@pytest.fixture(scope="module")
def single() -> tuple[list, list]:
    """Each step's groups and fetched prompts, of one leader."""
    return joined([_closed(made(leaders(1)[0]), steps)])


def joined(parts: list[Decided]) -> tuple[list, list[list[int]]]:
    """Each step's groups and fetched prompts of all leaders, sorted."""
    together = [*zip(*parts, strict=True)]
    groups = [sorted(group for part, _ in step for group in part) for step in together]
    return groups, [sorted(number for _, part in step for number in part) for step in together]


def test_leaders_decide_as_a_single_one_and_delete_what_they_told_each_other(ranks, single) -> None:
    seen, _ = ranks
    assert all(single[1])
    for ahead in (0, 1):
        assert joined([rank["undisturbed"][ahead] for rank in seen]) == single
    # Words of the steps in flight at the end, and no others.
    left = {int(key.split("/")[-3]) for key in seen[0]["left by undisturbed"]}
    assert left <= {STEPS + 1, STEPS + 2}


def test_a_round_of_a_later_step_may_end_first_on_one_leader(ranks, single) -> None:
    seen, _ = ranks
    first, *others = ([epoch for epoch in rank["overtaken"][1] if epoch < 0] for rank in seen)
    assert first.index(-3) < first.index(-2)
    usual = [epochs.index(-2) < epochs.index(-3) for epochs in others if -3 in epochs]
    assert usual and all(usual)
    groups, fetched = joined([rank["overtaken"][0] for rank in seen])
    assert (groups, fetched) == (single[0][:2], single[1][:2])


def test_what_one_leader_lost_is_asked_again_with_the_same_decisions(ranks, single) -> None:
    seen, _ = ranks
    assert joined([rank["lost"][0] for rank in seen]) == single
    assert [rank["lost"][1] for rank in seen] == [1] * len(seen)


def test_where_one_leaders_groups_are_too_old_all_decide_anew(ranks, single) -> None:
    seen, _ = ranks
    assert joined([rank["stale"][0] for rank in seen]) == single
    fetched = [len(rank["undisturbed"][0][0][1]) for rank in seen]
    *others, last = [rank["stale"][1] for rank in seen]
    assert others == fetched[:-1] and last == 2 * fetched[-1] > 0
    assert [rank["stale"][2] for rank in seen] == [1] * len(seen)


def test_a_leader_that_fails_ends_the_wait_of_the_others(ranks) -> None:
    seen, _ = ranks
    *others, (own, took) = [rank["failed"] for rank in seen]
    assert own == "ValueError: the prompt is wrong" and took < 10
    assert all(told == f"OSError: rank {len(others)}: {own}" and took < 10 for told, took in others)


def test_a_wait_for_a_leader_has_a_limit_and_says_for_what_it_waited(ranks) -> None:
    seen, _ = ranks
    own, *others = [rank["late"] for rank in seen]
    what = f"last for what DP leader {len(others)} says of round 0."
    assert own == f"TimeoutError: Waited 0.3 s for the rollouts of step 1 (run.phase_timeout_s), {what}"
    assert others == [f"OSError: rank 0: {own}"] * len(others)


def test_after_a_rollback_the_words_of_the_attempt_before_do_not_count(ranks, single) -> None:
    assert joined([rank["rolled back"] for rank in ranks[0]]) == single


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_a_stop_of_one_leader_ends_all_and_other_leaders_go_on_with_the_same_decisions(
    ranks, single, dp: int
) -> None:
    """Nothing that was finished is asked for once more."""
    seen, folder = ranks
    whole = made(leaders(1)[0])
    _closed(whole, lambda run: steps(run, 1))
    for place, limit in enumerate(STOPS[len(seen)]):
        before = sum(rank["stopped"][place] for rank in seen)
        assert seen[-1]["stopped"][place] == limit
        again = [made(mesh).resumed(folder / f"{limit}", mesh) for mesh in leaders(dp)]
        try:
            found = together([lambda run=run: steps(run, 1) for run in again])
        finally:
            for run in again:
                run.source.close()
        assert joined(found) == (single[0][:1], single[1][:1])
        assert before + sum(len(run.source.rounds) for run in again) == len(whole.source.rounds)
