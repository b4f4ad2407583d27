"""Ranks killed in each phase of a step, and numbers that are none: the run ends as if nothing had been, to
the last bit."""

import asyncio
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_jackpot.config import load_config
from megatron_jackpot.monitor.metrics import read_metrics
from megatron_jackpot.plan import microbatch
from megatron_jackpot.records import Prompt, Rollout
from megatron_jackpot.rollout.collected import Collected
from megatron_jackpot.rollout.finished_groups import Groups, load_groups, save_groups
from megatron_jackpot.run.provenance import checkpoints
from megatron_jackpot.train import assembly
from megatron_jackpot.train.curator import Trained
from megatron_jackpot.train.evaluation import Evaluated, Evaluator
from megatron_jackpot.train.probe import Prober
from megatron_jackpot.train.run import run as run_training
from megatron_jackpot.train.trainer import Trainer
from tests.faults.harness import PHASES, check_account, kill_in_phase, make_models
from tests.parallel.spawn import run_ranks, start_ranks
from tests.rollout.sources import ScriptedSource

SOME = ("score of step", "update_policy of step", "save of step", "publish step-")
"""One of each kind: nothing has changed yet, weights half new, a checkpoint half collected, half written."""
STEPS = {phases: 2 * len(phases) + 4 for phases in (SOME, PHASES)}
"""Of a run that is killed in those phases: each time it has saved a step, and met the phase in one after
it."""
RANKS = 2
LIMIT_S = 60
PACKED, AUTO = 256, ("packing.tokens=auto",)
"""Tokens per micro-batch of harness.make_models, and what else may say them."""
NOISY = {
    *("rollout/tokens_per_s", "sync/seconds", "idle/trainer", "idle/servers"),
    # Which is of a run that goes on alone.
    "rollout/begun_anew",
}
AHEAD = [0, pytest.param(2, marks=pytest.mark.full)]


class Scripted(ScriptedSource):
    """Rollouts that are a function of the prompt and the epoch, and where a run was `recorded` as old as they
    were there, whenever they are asked for."""

    def __init__(self, recorded: Groups) -> None:
        super().__init__(samples=3)
        self.recorded = recorded

    def make(self, epoch: int, prompt: Prompt, version: int) -> list[Rollout]:
        return self.recorded.get((epoch, prompt.id)) or super().make(epoch, prompt, version)

    async def collect(self, epoch: int, prompts: Sequence[Prompt], **options) -> tuple[list, dict]:
        await asyncio.sleep(0.01)
        return await super().collect(epoch, prompts, **options)


def _train(
    rank: int,
    world: int,
    yaml_file: str,
    run: str,
    steps: int,
    bad: tuple[int, ...] = (),
    more: tuple[str, ...] = (),
) -> tuple[int, list[str]]:
    """A whole run, but without servers, as old as that in the folder `whole` if it is there: how many steps
    it trained, those with a number in `bad` on useless batches; and its attempts."""
    # As on another card: from the first checkpoint on `auto` would take other micro-batches.
    microbatch.CPU_TOKENS = 1024 if checkpoints(Path(run)) else PACKED
    record, steps_trained = Path(run).parent / "whole" / f"recorded-{rank}.npz", 0
    source = Scripted({})
    assembly.make_source = lambda *_: source
    assembly.make_sync = lambda *_: None
    Prober.__call__ = lambda _: {}
    Evaluator.__call__ = lambda _: Evaluated({}, [])
    curate, collect = Trainer.curate, Trainer.collect

    def played(trainer: Trainer) -> Collected | None:
        if record.exists() and not source.recorded:
            assert trainer.state.loader is not None
            source.recorded |= load_groups(record, {p.id: p for p in trainer.state.loader.prompts})
        return collect(trainer)

    def spoiled(trainer: Trainer, collected: Collected | None) -> Trained | None:
        nonlocal steps_trained
        steps_trained += 1
        made = curate(trainer, collected)
        if made is None or steps_trained not in bad:
            return made
        # As from broken numerics further on: rewards and advantages that are none are refused.
        spoilt = [[dataclasses.replace(r, advantage=math.nan) for r in group] for group in made.groups]
        return dataclasses.replace(made, groups=spoilt)

    Trainer.curate, Trainer.collect = spoiled, played
    overrides = [
        f"run.folder={run}",
        f"run.steps={steps}",
        "run.keep=100",
        "run.save_hf_at_end=false",
        "servers.urls=['http://127.0.0.1:1']",
    ]
    guard = ["guard.rollback=true", "guard.max_skipped=1"]
    assert run_training(load_config(Path(yaml_file), [*overrides, "rollout.top_k_logp=8", *guard, *more]))
    if not record.exists():
        save_groups(record, source.made)
    return steps_trained, source.attempts


def numbers(run: Path) -> list[dict]:
    return [
        {k: v for k, v in row.items() if k not in NOISY and not k.startswith(("time/", "memory/"))}
        for row in read_metrics(run)
    ]


def weights(run: Path, step: int) -> dict[str, list]:
    """Size and hash of the files that hold weights and optimizer state after a step."""
    manifest = json.loads((run / f"checkpoints/step-{step:06d}/manifest.json").read_text())
    return {name: entry for name, entry in manifest["files"].items() if name.endswith(".distcp")}


def another_checkpoint(run: Path) -> None:
    """Wait until the run has saved once more than now."""
    before, deadline = checkpoints(run), time.monotonic() + LIMIT_S
    while len(checkpoints(run)) <= len(before):
        assert time.monotonic() < deadline, f"no checkpoint in {LIMIT_S} s"
        time.sleep(0.01)


@pytest.fixture(scope="module", params=AHEAD, ids=lambda ahead: f"{ahead} ahead")
def yaml_file(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return make_models(tmp_path_factory.mktemp("phases"), ahead=request.param)


@pytest.fixture(scope="module")
def whole(yaml_file: Path, request: pytest.FixtureRequest) -> Path:
    """The folder of a run to which nothing happened, as long as the longest that is compared with it."""
    run, steps = yaml_file.parent / "whole", STEPS[PHASES if request.config.getoption("--full") else SOME]
    run_ranks(_train, RANKS, 120, str(yaml_file), str(run), steps)
    assert check_account(run) == steps
    return run


@pytest.mark.parametrize("phases", [SOME, pytest.param(PHASES, marks=pytest.mark.full)], ids=["some", "all"])
def test_killed_in_phases_the_run_ends_as_if_it_had_not_been_with_the_micro_batches_it_chose_at_first(
    yaml_file: Path, whole: Path, phases: tuple[str, ...]
) -> None:
    """The one to which nothing happened was told their size."""
    hit, lines = yaml_file.parent / f"hit {len(phases)}", []
    steps = STEPS[phases]
    given = (str(yaml_file), str(hit), steps, (), AUTO)
    for number, phase in enumerate(phases):
        victim = number % RANKS if phase != "publish step-" else 0
        with tempfile.TemporaryDirectory() as folder:
            context = start_ranks(_train, RANKS, LIMIT_S, folder, *given)
            try:
                another_checkpoint(hit)
                lines.append(kill_in_phase(hit / "doing" / f"rank-{victim}", phase, LIMIT_S))
            finally:
                for process in context.processes:
                    process.kill()
                    process.join()
    assert all(phase in line for phase, line in zip(phases, lines, strict=True)), lines
    print(*lines, sep="\n")
    run_ranks(_train, RANKS, 120, *given)
    assert check_account(hit) == steps
    prompts = (whole / "prompts.jsonl").read_text().splitlines()[:steps]
    assert (hit / "prompts.jsonl").read_text().splitlines() == prompts
    assert numbers(hit) == numbers(whole)[: steps + 1]
    assert weights(hit, steps) == weights(whole, steps)


def test_a_run_goes_back_from_gradients_that_are_none_to_a_checkpoint_that_leads_on(
    yaml_file: Path, whole: Path
) -> None:
    steps = 5
    prompts = (whole / "prompts.jsonl").read_text().splitlines()[:steps]
    # Step 3 is skipped, 4 is too much: back to 2. Twice: 3 and 4 once more, back to 1, of which nothing bad
    # is known.
    for name, bad, more in (("once", (3, 4), 2), ("twice", (3, 4, 5, 6), 5)):
        run = yaml_file.parent / name
        (trained, attempts), other = run_ranks(_train, RANKS, 120, str(yaml_file), str(run), steps, bad)
        assert other == (trained, attempts) and trained == steps + more and check_account(run) == steps
        # Versions come again, what servers call them does not.
        assert len(set(attempts)) == len(bad) // 2 + 1
        assert numbers(run) == numbers(whole)[: steps + 1]
        assert weights(run, steps) == weights(whole, steps)
        assert (run / "prompts.jsonl").read_text().splitlines() == prompts
