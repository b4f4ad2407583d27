"""A rank killed in the middle of a round, when a save in the background has just been published: the run ends
with the decisions of one to which nothing happened. Whole runs of the trainer, on 1, 2 and 4 leaders."""

import asyncio
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_jackpot.algorithm.allocators import CoBA, Rescue
from megatron_jackpot.config import load_config
from megatron_jackpot.records import Prompt, Rollout
from megatron_jackpot.rollout.collect import NOTHING_BEGUN, Keep, More
from megatron_jackpot.train import assembly
from megatron_jackpot.train.evaluation import Evaluated, Evaluator
from megatron_jackpot.train.probe import Prober
from megatron_jackpot.train.run import run as run_training
from tests.faults.harness import PER_STEP, make_models
from tests.parallel.spawn import run_ranks, start_ranks
from tests.rollout.leaders import by_turns
from tests.rollout.sources import ScriptedSource
from tests.tiny import groups

STEPS = 5
"""Of a whole run, two to an epoch."""
SAMPLES = 8
LIMIT_S = 90
Requests = list[tuple[int, int, int, int]]
"""(epoch, prompt id, first sample, samples) of each."""


@dataclass(frozen=True, kw_only=True)
class ValuedRescue(CoBA):
    """Plans from what was seen, and rounds."""

    def more(self, correct: Sequence[bool]) -> int:
        return Rescue(extra=2, most=12).more(correct)


ALLOCATORS = {
    "both": "{name: 'tests.faults.test_allocation:ValuedRescue', least: 2, most: 16}",
    "vip": "{name: vip, least: 2, most: 16}",
    "coba": "{name: coba, least: 2, most: 16}",
    "aero": "{name: aero, extra: 2, most: 12}",
    "dynamic_sampling": "{name: dynamic_sampling, over_sample: 1.5, max_rounds: 3}",
}


class Rounds(ScriptedSource):
    """Rollouts that are a function of prompt and sample, in rounds. A request for what `held` names, (epoch,
    prompt id) -> first sample, never ends: its process does, when `published` is there."""

    def __init__(self, held: Mapping[tuple[int, int], int], published: Path) -> None:
        super().__init__(samples=SAMPLES)
        self.held, self.published = held, published
        self.requests: Requests = []

    async def collect(
        self,
        epoch: int,
        prompts: Sequence[Prompt],
        *,
        keep: Keep = lambda group: None,
        more: More | None = None,
        begun: Mapping[int, list[Rollout]] = NOTHING_BEGUN,
        **_: Any,
    ) -> tuple[list, dict]:
        wanted = more or (lambda prompt, group: self.samples - len(group))
        for prompt in sorted(prompts, key=lambda prompt: (epoch, prompt.id) in self.held):
            group = begun.get(prompt.id, [])
            while number := wanted(prompt, group):
                if self.held.get((epoch, prompt.id)) == len(group):
                    await self.die()
                self.requests.append((epoch, prompt.id, len(group), number))
                group = [*group, *self.judged(epoch, prompt, len(group), number)]
                keep(group)
        return [], {}

    def judged(self, epoch: int, prompt: Prompt, first: int, number: int) -> list[Rollout]:
        (made,) = groups(range(prompt.id, prompt.id + 1), first + number)
        right = [verdict == "1" for verdict in by_turns(prompt.id)]
        stamped = np.int32(self.version)
        return [
            replace(
                one,
                prompt=prompt,
                epoch=epoch,
                correct=right[one.sample],
                reward=float(right[one.sample]),
                weight_version=np.full_like(one.weight_version, stamped),
            )
            for one in made[first:]
        ]

    async def die(self) -> None:
        while not self.published.exists():
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


def _train(
    rank: int,
    world: int,
    yaml_file: str,
    run: str,
    allocator: str,
    held: dict[tuple[int, int], int],
    saved: int = STEPS,
) -> Requests:
    """A whole run, but without servers: this leader's requests."""
    source = Rounds(held, checkpoint(Path(run), saved))
    assembly.make_source = lambda *_: source
    assembly.make_sync = lambda *_: None
    Prober.__call__ = lambda _: {}
    Evaluator.__call__ = lambda _: Evaluated({}, [])
    overrides = [
        f"run.folder={run}",
        f"run.steps={STEPS}",
        "run.keep=100",
        "run.save_hf_at_end=false",
        f"data.size={2 * PER_STEP}",
        f"rollout.samples_per_prompt={SAMPLES}",
        f"rollout.allocator={ALLOCATORS[allocator]}",
        "rollout.top_k_logp=8",
        "servers.urls=['http://127.0.0.1:1']",
    ]
    assert run_training(load_config(Path(yaml_file), overrides))
    return source.requests


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def killed(yaml_file: Path, run: Path, *how: Any) -> None:
    """Run on two ranks until one of them has killed itself, and kill the other."""
    with tempfile.TemporaryDirectory() as folder:
        context = start_ranks(_train, 2, LIMIT_S, folder, str(yaml_file), str(run), *how)
        try:
            deadline = time.monotonic() + LIMIT_S
            while all(process.is_alive() for process in context.processes):
                assert time.monotonic() < deadline, f"no rank was killed in {LIMIT_S} s"
                time.sleep(0.02)
            ended = [process.exitcode for process in context.processes]
            assert -signal.SIGKILL in ended, [path.read_text() for path in Path(folder).glob("error*")]
        finally:
            for process in context.processes:
                process.kill()
                process.join()


def account(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "prompts.jsonl").read_text().splitlines()]


def later(row: dict) -> dict[tuple[int, int], int]:
    """Of a step: first samples of second rounds, and of prompts that were fetched."""
    told = row["allocated"]
    by_prompt = list(zip(*(told[name] for name in ("prompt", "round", "planned", "rounds")), strict=True))
    second = {(row["epoch"], number): n for number, _, n, rounds in by_prompt if rounds > 1}
    return second | {(-1 - row["step"], number): 0 for number, round, *_ in by_prompt if round > 0}


def saved_rollouts(folder: Path) -> list[tuple[int, int, int]]:
    """(epoch, prompt id, sample) of all that a checkpoint holds of later steps."""
    found = []
    for path in folder.glob("rollouts-*.npz"):
        with np.load(path) as file:
            rows = zip(*(file[name].tolist() for name in ("epoch", "prompt_id", "sample")), strict=True)
            found += rows
    return found


@pytest.fixture(scope="module")
def yaml_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("allocation"), ahead=1)


@pytest.mark.full
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_killed_in_a_round_after_a_save_in_the_background_the_run_makes_the_same_decisions(
    yaml_file: Path, tmp_path: Path, allocator: str
) -> None:
    whole = {dp: tmp_path / f"whole {dp}" for dp in (1, 2)}
    for dp, run in whole.items():
        run_ranks(_train, dp, LIMIT_S, str(yaml_file), str(run), allocator, {})
    rows = account(whole[2])
    # On one leader as on two: which prompts, how many rollouts of each in which rounds, what was trained on.
    assert account(whole[1]) == rows and len(rows) == STEPS
    sizes = [{*row["allocated"]["rollouts"]} for row in rows]
    assert any(len(own) > 1 for own in sizes) or allocator == "dynamic_sampling"
    # After `saved` steps, in the rollouts of the next one: in a later round of it, where there is one.
    saved, hit = max((2, 3), key=lambda step: len(later(rows[step]))), tmp_path / "hit"
    held = later(rows[saved]) or {(rows[saved]["epoch"], rows[saved]["trained"][-1]): 0}
    assert later(rows[saved]) or allocator in ("vip", "coba")
    killed(yaml_file, hit, allocator, held, saved)
    assert max((hit / "checkpoints").glob("step-*")) == checkpoint(hit, saved)
    kept = saved_rollouts(checkpoint(hit, saved))
    for (epoch, number), first in held.items():
        # Of the other leader's there may be more.
        own = sorted(sample for at, prompt, sample in kept if (at, prompt) == (epoch, number))
        assert own[:first] == list(range(first))
    assert any(sum((at, p) == key for at, p, _ in kept) == first for key, first in held.items()) and kept
    for dp in (1, 2, 4):
        again = tmp_path / f"again {dp}"
        shutil.copytree(hit, again, symlinks=True)
        # What the rank had and no checkpoint has is sampled anew, by newer weights: numbers may differ.
        asked = run_ranks(_train, dp, LIMIT_S, str(yaml_file), str(again), allocator, {})
        assert account(again) == rows
        # What the checkpoint has is not asked for once more.
        made = [(epoch, p, first + i) for own in asked for epoch, p, first, n in own for i in range(n)]
        assert not {*made} & {*kept}
