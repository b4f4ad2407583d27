"""One rank of a run: the loop over steps, and what happens around it: resume, save, roll back, report."""

import contextlib
import gc
import logging

import torch.distributed as dist

from megatron_jackpot.config import Config, ConfigError
from megatron_jackpot.models.deterministic import be_deterministic
from megatron_jackpot.models.mesh import init_mesh
from megatron_jackpot.monitor.console import print_report
from megatron_jackpot.monitor.outputs import Outputs
from megatron_jackpot.monitor.peak_memory import trainer_mib
from megatron_jackpot.monitor.profile import profiled
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.rewards.failures import RewardsFailing
from megatron_jackpot.rollout.outcome import StopRun
from megatron_jackpot.run.interrupt import StopRequest
from megatron_jackpot.run.provenance import CHECKPOINTS, checkpoints
from megatron_jackpot.servers.process import await_servers
from megatron_jackpot.sync.stream import export_hf
from megatron_jackpot.train import checkpoint
from megatron_jackpot.train.assembly import Assembly, assemble
from megatron_jackpot.train.checkpoint import Saver
from megatron_jackpot.train.evaluation import Evaluated
from megatron_jackpot.train.guard import RollBack
from megatron_jackpot.train.kept import check_measured, measured, set_aside
from megatron_jackpot.train.samples import wrong_row
from megatron_jackpot.train.state import TrainState
from megatron_jackpot.train.step_metrics import StepMetrics
from megatron_jackpot.train.trainer import Trainer

log = logging.getLogger(__name__)


def run(config: Config, mesh: Mesh | None = None, stop: StopRequest | None = None) -> bool:
    """One rank of a training run, from the first check to the final table.

    Raises ConfigError before the first step.

    `mesh` is one that is there already, of the same layout. True when all steps are done, False when the run
    saved and ended because `stop` asked for it.
    """
    stop = stop or StopRequest(config.run)
    await_servers(config.servers, stop.reason)
    try:
        if config.precision.deterministic:
            be_deterministic()
        mesh = mesh or init_mesh(config.parallel, config.run.seed)
        # Ranks learn of it at different times, and none may load models for others that have ended.
        if mesh.largest(int(stop.reason() is not None)):
            _ended_as_asked(mesh, stop, "before any model was loaded")
            return False
        assembly = assemble(config, mesh, stop.reason)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(*error.args) from error
    state, watchdog = assembly.trainer.state, assembly.trainer.watchdog
    try:
        resumed = _resume(config, state)
        saver = Saver(state, config.run, watchdog)
        finished = None
        while finished is None:
            finished = _attempt(assembly, saver, resumed)
            resumed = True
    except ConfigError:
        raise
    except RewardsFailing as error:
        # Starting again would not help: the limits, or the machine, are not made for these rewards.
        raise ConfigError(*error.args) from error
    except Exception as error:
        watchdog.dump(f"{type(error).__name__}: {error}")
        raise
    finally:
        # What is frozen is not freed at the interpreter's end, and Triton's bindings then print all of it.
        gc.unfreeze()
        assembly.close()
    if mesh.is_main and finished:
        print_report(config.run.folder)
    if not finished:
        _ended_as_asked(mesh, stop, f"after step {state.num_steps}")
    return finished


def _ended_as_asked(mesh: Mesh, stop: StopRequest, when: str) -> None:
    if mesh.is_main:
        stop.done()
        log.info(f"ended as asked {when}")


def _resume(config: Config, state: TrainState) -> bool:
    """Load the newest checkpoint if the run is to go on from one; whether it did."""
    run, mesh = config.run, state.mesh
    try:
        checkpoint.check_room(state, run)
        if not run.resume or (run.resume == "auto" and not mesh.from_main(checkpoints(run.folder))):
            return False
        troubles = checkpoint.resume(state, run.folder)
    except ValueError as error:
        raise ConfigError(*error.args) from error
    if mesh.is_main:
        finished = len(state.finished_groups)
        more = f", with {finished} groups of the next one" if finished else ""
        for trouble in troubles:
            log.warning(trouble)
        log.info(f"resumed after step {state.num_steps}{more}")
    return True


def _attempt(assembly: Assembly, saver: Saver, resumed: bool) -> bool | None:
    """What `_train` returns; None when the run went back to a checkpoint, to go on from there with another
    attempt."""
    trainer, config = assembly.trainer, assembly.trainer.config
    resume_step = trainer.state.num_steps if resumed else None
    if config.run.resume == "auto" and not resumed:
        resume_step = -1  # What an attempt without a checkpoint left is done again.
    outputs: Outputs | None = None
    if trainer.mesh.is_main:
        outputs = Outputs(config, resume_step=resume_step)
    with outputs or contextlib.nullcontext():
        try:
            return _train(assembly, saver, outputs, resumed)
        except RollBack as error:
            _roll_back(trainer, saver, error)
    return None


def _train(assembly: Assembly, saver: Saver, outputs: Outputs | None, resumed: bool) -> bool:
    """The loop over steps. False when it ended early because it was asked to stop. Raises RollBack."""
    trainer, config, state = assembly.trainer, assembly.trainer.config, assembly.trainer.state
    began = state.num_steps, _sizes(state)
    try:
        _begin(assembly, outputs, resumed)
        while trainer.state.num_steps < config.run.steps:
            trainer.refuse_stop()
            _one_step(assembly, saver, outputs)
    except StopRun:
        trainer.pipeline.interrupt("the run is to save and end")
        # Of another leader there may be groups that this one has none of.
        if not trainer.mesh.largest(int(began != (state.num_steps, _sizes(state)))):
            if trainer.mesh.is_main:
                log.info("nothing was trained since the start: there is nothing to save")
            return False
        with trainer.watchdog.phase("save"):
            trainer.make_room()
            saver.save(background=False)
            trainer.pusher.end_release()
        return False
    with trainer.watchdog.phase("save"):
        saver.wait()
    if config.run.save_hf_at_end:
        _export(trainer)
    return True


def _sizes(state: TrainState) -> dict[tuple[int, int], int]:
    """Rollouts of each finished group: one may have grown by a round."""
    return {key: len(group) for key, group in state.finished_groups.items()}


def _begin(assembly: Assembly, outputs: Outputs | None, resumed: bool) -> None:
    """Weights to the servers, a probe and, in a new run, the first evaluation. Raises StopRun."""
    trainer = assembly.trainer
    trainer.refuse_stop()
    trainer.push(mend=True)  # It may follow a rollback.
    trainer.refuse_stop()
    with trainer.watchdog.phase("probe"):
        metrics = assembly.probe()
    if not resumed:
        evaluated = _evaluated(assembly)
        check_measured(trainer.config.run, trainer.mesh.from_main(list(evaluated.metrics)))
        if outputs is not None:
            outputs.report(0, metrics | evaluated.metrics)
            outputs.keep(0, evaluated.samples)
    # What is there now stays to the end of the run: a garbage collection need not walk it again. Where the
    # device waits for launches, those walks were a fifth of a joint step on an H200.
    gc.collect()
    gc.freeze()


def _one_step(assembly: Assembly, saver: Saver, outputs: Outputs | None) -> None:
    trainer, config = assembly.trainer, assembly.trainer.config
    with profiled(config.run.folder, config.logging, trainer.state.num_steps + 1, dist.get_rank()):
        result = trainer.step()
    metrics, step, last = dict(result.metrics), result.step, result.step == config.run.steps
    metrics["memory/trainer_gib"] = trainer.mesh.largest(trainer_mib()) / 1024
    evaluated, stopped = _judge(assembly, step, last)
    metrics, samples = metrics | evaluated.metrics, evaluated.samples
    trainer.state.measured = measured(config.run, metrics)
    after = StepMetrics(step, trainer.watchdog)
    with after.timer("save"):
        saver.poll()
        due = config.run.save_every and step % config.run.save_every == 0 and not trainer.guard.in_doubt
        if due or (last and (config.run.save_every or stopped)):
            with trainer.room_to_save():
                saver.save(background=config.run.save_in_background and not last)
    if outputs is not None:
        assert result.account is not None, "the main rank is a DP leader"
        outputs.account(step, result.account)
        outputs.report(step, metrics | after.values | {"save/failed": float(saver.num_failed)})
        every = config.logging.tokens_every
        judge = assembly.evaluate.judge
        if judge is not None and every is not None and (step - 1) % every == 0:
            samples = [*samples, *(wrong_row(pair, judge.text) for pair in result.wrong)]
        outputs.keep(step, samples)
    if config.run.save_hf_every and step % config.run.save_hf_every == 0 and not last:
        try:
            _export(trainer)
        except OSError as error:
            if trainer.mesh.is_main:
                log.warning(f"the run goes on: {error}")


def _judge(assembly: Assembly, step: int, last: bool) -> tuple[Evaluated, bool]:
    """The probe and the evaluation that are due after a step, nothing of what a stop ended; and whether one
    did. The step itself is done: the loop ends the run after its report, and the last one's models are saved
    for what makes up for the evaluation."""
    config, metrics = assembly.trainer.config, dict[str, float]()
    due = bool(assembly.evaluate.sets) and (step % config.evaluation.every == 0 or last)
    try:
        if step % config.sync.probe_every == 0:
            with assembly.trainer.watchdog.phase("probe"):
                metrics = assembly.probe()
        if due:
            evaluated = _evaluated(assembly)
            return Evaluated(metrics | evaluated.metrics, evaluated.samples), False
    except StopRun:
        if due and assembly.trainer.mesh.is_main:
            made_up = f"megatron-jackpot evaluate {config.run.folder}"
            log.warning(f"asked to stop: step {step} has no evaluation. `{made_up}` makes up for it.")
        return Evaluated(metrics, []), True
    return Evaluated(metrics, []), False


def _evaluated(assembly: Assembly) -> Evaluated:
    with assembly.trainer.watchdog.phase("evaluation", at_least_s=assembly.evaluate.limit_s):
        return assembly.evaluate()


def _export(trainer: Trainer) -> None:
    """Every model as an HF folder. Raises OSError, on every rank, when they cannot be written."""
    step = trainer.state.num_steps
    folder = trainer.config.run.folder / "hf" / f"step-{step:06d}"
    try:
        with trainer.watchdog.phase(f"export of step {step}"):
            for name, model in trainer.state.models.items():
                export_hf(model, folder / name)
    except OSError as error:
        raise OSError(
            f"{folder} could not be written: {error}. tools/megatron_to_hf.py makes it of a checkpoint."
        ) from error


def _roll_back(trainer: Trainer, saver: Saver, error: RollBack) -> None:
    """Load the newest checkpoint that did not lead here already. Raises `error` where there is none."""
    run, state = trainer.config.run, trainer.state
    trainer.pipeline.drop()
    trainer.pusher.renew()
    saver.wait()
    names = state.mesh.from_main([folder.name for folder in checkpoints(run.folder)])
    found = [name for name in names if name not in saver.bad_checkpoints]
    if not trainer.config.guard.rollback or not found:
        raise error
    if state.mesh.is_main:
        log.warning(f"step {state.num_steps + 1}: {error} Going back to {found[-1]}.")
    saver.bad_checkpoints.add(found[-1])
    checkpoint.resume(state, run.folder, newest=found[-1])
    if state.mesh.is_main:
        # A start after a crash shall not go on from what this run went back from.
        set_aside(run.folder / CHECKPOINTS / found[-1], run.keep)
