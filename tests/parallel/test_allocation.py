"""Plans and rounds of leaders that are processes of their own, what they observe gathered by the collective
that training uses: the same as a single leader's, also after a resume on other leaders."""

import json
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_jackpot.algorithm.allocators import VIP, CoBA, DynamicSampling, Rescue
from megatron_jackpot.algorithm.allocators_base import Allocator
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.rollout.collected import account
from tests.parallel.spawn import run_ranks
from tests.parallel.test_exchange import tcp_mesh
from tests.rollout.leaders import PER_STEP, Leader, Run, by_turns, leaders, summary

STEPS, BEFORE = 13, 11
"""Of a run, of which ten are an epoch; and those before it is stopped."""
SAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class Everything(DynamicSampling):
    """Rounds, further prompts and a memory in one: the half that was right least at its last visit has more
    in the first round."""

    num_visits = 4

    def plan(self, ids, samples, memory) -> list[int]:
        right = [memory.visits.get(number, [(0, 0)])[-1][0] for number in ids]
        order = sorted(range(len(ids)), key=lambda i: (right[i], i))
        more = 2 if memory.visits else 0
        return [samples + (more if order.index(i) < len(ids) / 2 else -more) for i in range(len(ids))]

    def more(self, correct) -> int:
        return Rescue(extra=2, most=12).more(correct)


ALLOCATORS: dict[str, Allocator] = {
    "vip": VIP(least=2),
    "coba": CoBA(),
    "aero": Rescue(extra=2, most=16),
    "everything": Everything(over_sample=1.5, max_rounds=3),
}


def steps(run: Run, number: int) -> list[Any]:
    """Of each step, of all leaders: what was done with each prompt, and of this one the groups."""
    mesh, made = run.pipeline.mesh, []
    for _ in range(number):
        taken = run.step()
        made.append((account(mesh, taken)["allocated"], summary(taken)))
    return made


def started(mesh: Mesh | Leader, allocator: Allocator) -> Run:
    """One leader's rollouts end last: what the others know by then must not show."""
    run = Run(allocator, by_turns, ahead=1, mesh=mesh, samples=SAMPLES)
    run.source.delay_s = 0.01 * (mesh.dp_rank == 0)
    return run


def stopped(run: Run, *, last: bool) -> None:
    """After BEFORE steps; the last leader has half of its replies of the next, or none where it asks for one
    prompt, others have all."""
    steps(run, BEFORE - 1)
    assert not futures.wait([batch.work for batch in run.pipeline.batches if batch.work], 20).not_done
    limit = len(run.source.rounds) + PER_STEP // run.pipeline.mesh.dp // 2 if last else None
    run.source.limit = limit
    steps(run, 1)
    run.stopped_after(limit)


def resumed(
    mesh: Mesh | Leader, allocator: Allocator, folder: Path, store: dist.Store | None = None
) -> list[Any]:
    """The rest of a run that was stopped."""
    run = started(mesh, allocator)
    run.load(folder, json.loads((folder / "state.json").read_text()))
    made = steps(run, STEPS - BEFORE)
    ended(run, store)
    return made


def _leader(rank: int, world: int, folder: str) -> dict[str, Any]:
    """By allocator: a whole run, what it remembers, and what resumed ones of these and other leaders did."""
    (mesh, store), seen = tcp_mesh(rank, world), {}
    for name, allocator in ALLOCATORS.items():
        run = started(mesh, allocator)
        made, memory = steps(run, STEPS), run.allocation.state_dict()
        ended(run, store)
        run, own = started(mesh, allocator), Path(folder, f"{name} {world}")
        stopped(run, last=rank == world - 1)
        own.mkdir(exist_ok=True)
        run.save(own)
        if rank == 0:
            (own / "state.json").write_text(json.dumps(run.state_dict()))
        ended(run, store)
        again = {dp: resumed(mesh, allocator, Path(folder, f"{name} {dp}"), store) for dp in {2, world}}
        seen[name] = (made, memory, again)
    return seen


def ended(run: Run, store: dist.Store | None = None) -> None:
    """On every leader; a run that ends leaves words in its `store`, and there is another one after it."""
    run.pipeline.interrupt("the end")
    run.source.close()
    if store is None:
        return
    dist.barrier()
    for key in store.list_keys() if dist.get_rank() == 0 else ():
        if "exchange" in key:
            store.delete_key(key)
    dist.barrier()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, list[dict]], Path]:
    """By dp, what each leader saw, and where they saved."""
    folder = tmp_path_factory.mktemp("stops")
    return {dp: run_ranks(_leader, dp, 120, str(folder)) for dp in (2, 4)}, folder


@pytest.fixture(scope="module", params=ALLOCATORS)
def single(request: pytest.FixtureRequest) -> tuple[str, list[Any], Any]:
    """(allocator, a whole run of one leader, what it remembers)."""
    run = started(leaders(1)[0], ALLOCATORS[request.param])
    made = steps(run, STEPS)
    ended(run)
    return request.param, made, run.allocation.state_dict()


def joined(parts: list[list[Any]]) -> list[Any]:
    """Of each step, what every leader was told alike, and all groups."""
    for step in zip(*parts, strict=True):
        assert all(told == step[0][0] for told, _ in step)
    return [(step[0][0], sorted(g for _, part in step for g in part)) for step in zip(*parts, strict=True)]


def test_every_leader_of_any_layout_comes_to_the_plans_and_groups_of_a_single_one(ranks, single) -> None:
    name, made, memory = single
    planned = [row["planned"] for row, _ in made]
    if name != "aero":
        assert any(len({*row}) > 1 for row in planned)
    if name in ("vip", "coba"):
        # From the second epoch on, and from what was seen in the first.
        assert all({*row} == {SAMPLES} for row in planned[:10])
        assert all(sum(row) == SAMPLES * len(row) and len({*row}) > 1 for row in planned[10:])
    else:
        assert any(max(row["rounds"]) > 1 for row, _ in made)
    assert name != "everything" or any(max(row["round"]) > 0 for row, _ in made)
    for seen in ranks[0].values():
        assert joined([rank[name][0] for rank in seen]) == joined([made])
        assert all(rank[name][1] == memory for rank in seen)


@pytest.mark.parametrize("single", ["everything"], indirect=True)
def test_what_is_observed_are_the_first_rounds_of_all_prompts_fetched_ones_too(single) -> None:
    _, made, memory = single
    rounds = {number: planned for row, _ in made for number, planned in columns(row, "prompt", "planned")}
    fetched = {number for row, _ in made for number, round in columns(row, "prompt", "round") if round}
    assert any(n > planned for row, _ in made for n, planned in columns(row, "rollouts", "planned"))
    last = {number: tuple(seen[-1]) for (number,), *seen in memory["memory"]["visits"]}
    assert last == {number: (by_turns(number)[:n].count("1"), n) for number, n in rounds.items()}
    assert fetched and fetched < last.keys()


def columns(row: dict[str, list], *names: str) -> Iterator[tuple]:
    return zip(*(row[name] for name in names), strict=True)


def test_a_run_that_is_stopped_goes_on_with_the_same_decisions_on_as_many_leaders_or_others(
    ranks, single
) -> None:
    """Stopped on 2 leaders it goes on on 2 and on 4, on 4 on 4 and on one."""
    (seen, folder), (name, made, _) = ranks, single
    for dp, leaders_of in seen.items():
        for saved in {2, dp}:
            again = joined([rank[name][2][saved] for rank in leaders_of])
            assert again == joined([made])[BEFORE:], (dp, saved)
    alone = resumed(leaders(1)[0], ALLOCATORS[name], folder / f"{name} 4")
    assert joined([alone]) == joined([made])[BEFORE:]
