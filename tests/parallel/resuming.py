"""Runs of a few steps on rollouts without servers, that save, stop and go on; and how they compare."""

import time
from concurrent import futures
from pathlib import Path

import pytest
import torch

from megatron_jackpot.config import Config
from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.models.mesh import destroy_mesh
from megatron_jackpot.rollout.finished_groups import save_groups
from megatron_jackpot.rollout.outcome import StopRun
from megatron_jackpot.rollout.pipeline import Pipeline
from megatron_jackpot.sync.stream import export
from megatron_jackpot.train import checkpoint
from megatron_jackpot.train.state import TrainState
from tests.parallel.layouts import NUM_PROMPTS, Layout, load_trainer, make_config
from tests.parallel.spawn import run_ranks
from tests.rollout.sources import RecordedSource, ScriptedSource
from tests.tiny import rollout

NOISY = {"rollout/tokens_per_s", "sync/seconds", "idle/trainer", "idle/servers"}
BEGUN_ANEW = "rollout/begun_anew"
"""A resumed run alone has it."""
STEERED = Layout(correction=(("name", "jackpot"), ("target_acceptance", 0.8)))


def _train(
    rank: int, world: int, folder: str, run: str, layout: Layout, steps: int, options: dict
) -> tuple | None:
    """Steps on deterministic rollouts; (per-step numbers and account, weights, correction, troubles, prompts
    asked, settings of the policy's optimizer) on rank 0."""
    config = _config(folder, run, layout, options)
    saving = config.run
    trainer = load_trainer(config, options.get("total", 10))
    mesh, state, stop_at = trainer.mesh, trainer.state, options.get("stop_at")
    slow_after = options.get("slow_after", stop_at)
    prompts = [rollout(p, 0).prompt for p in range(NUM_PROMPTS * options.get("per_epoch", 2))]
    state.loader = PromptLoader(prompts, NUM_PROMPTS, mesh.dp_rank, mesh.dp, 5)
    source = ScriptedSource(versioned=options.get("versioned", False))
    if played := options.get("recorded"):
        source = RecordedSource(_record_of(played, mesh.dp_rank), prompts)
    trainer.source = trainer.pipeline.source = source
    trainer.pipeline.stop = lambda: "test" if state.num_steps == stop_at else None
    troubles = checkpoint.resume(state, Path(run)) if options.get("resume") else []
    if slow_after is not None:
        # Of each step after that one, this leader finishes one group and no more.
        order = PromptLoader(prompts, NUM_PROMPTS, mesh.dp_rank, mesh.dp, 5)
        given = [order.next() for _ in range(saving.steps)]
        source.slow = {(epoch, p.id) for epoch, mine in given[slow_after:] for p in mine[1:]}
    saver = checkpoint.Saver(state, saving, trainer.watchdog)
    trainer.push()
    if options.get("late"):
        _write_late(saver, state)
    numbers = []
    try:
        while state.num_steps < steps:
            result = trainer.step()
            metrics = {
                k: v for k, v in result.metrics.items() if k not in NOISY and not k.startswith("time/")
            }
            numbers.append({**metrics, "account": result.account})
            saver.poll()
            if state.num_steps in options.get("save_at", range(steps + 1)) and options.get("save"):
                if slow_after is None:
                    wait_until_finished(trainer.pipeline)
                saver.save(background=options["save"] == "background")
    except StopRun:
        trainer.pipeline.interrupt("test")
        saver.save(background=False)
    saver.wait()
    trainer.pipeline.interrupt("the end")
    if record := options.get("record"):
        save_groups(_record_of(record, mesh.dp_rank), source.made)
    weights = {name: export(model) for name, model in state.models.items()}
    destroy_mesh()
    settings = {**state.policy.optimizer.param_groups[0], "clip": state.policy.optimizer.config.clip_grad}
    settings.pop("params")
    made = (numbers, weights, trainer.methods.correction, troubles, source.asked, settings)
    return made if rank == 0 else None


def _config(folder: str, run: str, layout: Layout, options: dict) -> Config:
    config = make_config(layout, Path(folder))
    knobs = config.policy.optimizer.model_copy(update=options.get("optimizer", {}))
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"optimizer": knobs})})
    if refresh := options.get("refresh"):
        held = config.policy.reference.model_copy(update={"hf": None, **refresh})
        config = config.model_copy(update={"policy": config.policy.model_copy(update={"reference": held})})
    if ahead := options.get("ahead"):
        rollouts = config.rollout.model_copy(update={"ahead": ahead, "max_staleness": ahead})
        config = config.model_copy(update={"rollout": rollouts})
    saving = {"folder": Path(run), "keep": 2, "keep_every": options.get("keep_every")}
    saving["steps"] = options.get("run_steps", config.run.steps)
    return config.model_copy(update={"run": config.run.model_copy(update=saving)})


def _record_of(folder: str, leader: int) -> Path:
    return Path(folder) / f"recorded-{leader}.npz"


def wait_until_finished(pipeline: Pipeline) -> None:
    """What is in flight at a save is then all in the checkpoint."""
    under_way = [batch.work for batch in pipeline.batches]
    assert not futures.wait(under_way, 60).not_done


def _write_late(saver: checkpoint.Saver, state: TrainState) -> None:
    """Each save's thread does nothing before training has finished two more steps."""
    write = saver.write

    def late(writing) -> None:
        while state.num_steps < writing.state["num_steps"] + 2:
            time.sleep(0.01)
        write(writing)

    saver.write = late


def train(folder: Path, run: Path, layout: Layout, steps: int, **options):
    return run_ranks(_train, layout.world, 200, str(folder), str(run), layout, steps, options)[0]


def same(got: tuple, want: tuple, exact: bool, steps: int) -> None:
    (numbers, weights, correction, *_), (all_numbers, all_weights, all_correction, *_) = got, want
    assert len(numbers) == steps
    for mine, theirs in zip(numbers, all_numbers[-steps:], strict=True):
        if exact:
            assert {name: value for name, value in mine.items() if name != BEGUN_ANEW} == theirs
        else:
            for name in (
                "loss/policy",
                "loss/actor",
                "grad_norm/policy",
                "jackpot/acceptance",
                "jackpot/lam",
            ):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
    assert correction.lam == pytest.approx(all_correction.lam, rel=0 if exact else 1e-4)
    assert correction.lam != 1.0
    for model, tensors in all_weights.items():
        for name, tensor in tensors.items():
            if exact:
                assert torch.equal(weights[model][name], tensor), (model, name)
            else:
                assert ((weights[model][name] - tensor).abs() > 1e-5).float().mean() < 0.05, (model, name)
