"""From a configuration to a run: models, prompts, source of rollouts, sync, and the loop over steps.

Everything that can be wrong with the input is refused here, before the first step.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_jackpot.config import Config, ConfigError
from megatron_jackpot.config.model_folder import read_hf_config
from megatron_jackpot.config.model_shape import padded_vocab_size
from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.data.prompts import heldout_prompts, training_prompts
from megatron_jackpot.data.tokenizer import check_same_tokenizer, load_tokenizer
from megatron_jackpot.models.deterministic import be_deterministic
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.models.families import Family, family_of
from megatron_jackpot.models.mesh import init_mesh
from megatron_jackpot.monitor.console import StepLogger, print_report
from megatron_jackpot.monitor.metrics import JsonLines, MetricsWriter
from megatron_jackpot.monitor.prometheus import PrometheusEndpoint
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.records import Prompt
from megatron_jackpot.rewards.pool import RewardPool
from megatron_jackpot.rollout.collector import StopRun
from megatron_jackpot.rollout.source import ServerSource
from megatron_jackpot.run.interrupt import StopRequest
from megatron_jackpot.run.provenance import checkpoints
from megatron_jackpot.servers.client import SGLangClient
from megatron_jackpot.servers.protocol import Sampling
from megatron_jackpot.servers.served_folder import served_folder
from megatron_jackpot.sync.broadcast import BroadcastSync
from megatron_jackpot.sync.disk import DiskSync
from megatron_jackpot.sync.ipc import IPCSync
from megatron_jackpot.sync.stream import export_hf
from megatron_jackpot.train import checkpoint
from megatron_jackpot.train.checkpoint import Saver
from megatron_jackpot.train.evaluation import evaluate
from megatron_jackpot.train.guard import RollBack
from megatron_jackpot.train.methods import Methods
from megatron_jackpot.train.probe import check_families, probe
from megatron_jackpot.train.trainer import Trainer


@dataclass(frozen=True)
class Assembly:
    """A trainer, and the prompts it is checked and judged by."""

    trainer: Trainer
    heldout: list[Prompt]
    probes: list[Prompt]
    """Prompts for comparing the servers' log-probs with the trainer's."""
    stop_ids: tuple[int, ...]

    def close(self) -> None:
        """End reward workers, HTTP sessions and the weight group."""
        if self.trainer.source is not None:
            self.trainer.source.close()
        if self.trainer.sync is not None:
            self.trainer.sync.close()


def assemble(config: Config, mesh: Mesh, stop: Callable[[], str | None] = lambda: None) -> Assembly:
    """`stop` gives a reason to interrupt a rollout, or None. Raises ValueError or FileNotFoundError naming
    the field for anything that cannot work."""
    methods = Methods.from_config(config)
    check_same_tokenizer(config.policy.hf, config.actor.hf)
    tokenizer = load_tokenizer(config.policy.hf)
    families = load_families(config)
    training = training_prompts(config.data, tokenizer)
    heldout = heldout_prompts(config.data, config.evaluation, tokenizer, exclude=training.texts)
    policy, actor = (load_model(name, config, mesh, families) for name in ("policy", "actor"))
    stop_ids = stop_token_ids(tokenizer.eos_token_id, families["actor"])
    source = None
    if mesh.is_leader:
        decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
        source = make_source(config, methods, families["actor"], stop_ids, decode)
        if config.data.source == "jsonl":
            # Generated problems are right by construction; a file may hold answers no response could ever
            # match.
            source.check_labels([*training.prompts, *heldout.prompts][mesh.dp_rank :: mesh.dp])
    trainer = Trainer(
        config,
        mesh,
        methods,
        policy,
        actor,
        loader=PromptLoader(
            training.prompts, config.rollout.prompts_per_step, mesh.dp_rank, mesh.dp, config.run.seed
        ),
        source=source,
        sync=make_sync(config) if mesh.is_main else None,
        stop=stop,
    )
    probes = training.prompts[: config.sync.probe_prompts]
    return Assembly(trainer, heldout.prompts, probes, stop_ids)


def load_families(config: Config) -> dict[str, Family]:
    """Both models' families, checked against the run's sequence lengths."""
    families = {name: family_of(read_hf_config(getattr(config, name).hf)) for name in ("policy", "actor")}
    check_families(config, families["policy"], families["actor"])
    return families


def load_model(name: str, config: Config, mesh: Mesh, families: dict[str, Family]) -> MegatronModel:
    """Policy or actor from its HF folder, with its optimizer."""
    section = getattr(config, name)
    model = MegatronModel.load(
        name,
        families[name],
        section.hf,
        mesh=mesh,
        parallel=config.parallel,
        precision=config.precision,
        padded_vocab=padded_vocab_size([family.vocab_size for family in families.values()], mesh.tp),
    )
    model.add_optimizer(section.optimizer, config.run.steps * config.algorithm.num_minibatches)
    return model


def stop_token_ids(eos: int | None, family: Family) -> tuple[int, ...]:
    """The tokenizer's end-of-text id and those of config.json. Raises ValueError when there is none."""
    listed = family.hf_config.get("eos_token_id")
    ids = {eos, *(listed if isinstance(listed, list) else [listed])} - {None}
    if not ids:
        raise ValueError(
            "Neither the tokenizer nor config.json names an eos token: responses would never end."
        )
    return tuple(sorted(ids))


def make_source(
    config: Config, methods: Methods, actor: Family, stop_ids: tuple[int, ...], decode: functools.partial
) -> ServerSource:
    """Client, reward pool and sampling of one DP leader."""
    rollout = config.rollout
    client = SGLangClient(
        config.servers.urls,
        vocab_size=actor.vocab_size,
        context_length=actor.context_length,
        concurrency=rollout.concurrency,
        request_timeout_s=rollout.request_timeout_s,
        retries=rollout.retries,
    )
    sampling = Sampling(
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        top_k_logp=rollout.top_k_logp,
        stop_token_ids=stop_ids,
    )

    def advantages(rewards: Sequence[float]) -> list[float]:
        return methods.advantage(rewards).tolist()

    return ServerSource(
        client,
        RewardPool(
            config.data.reward,
            config.data.reward_workers,
            config.data.reward_timeout_s,
            memory_bytes=int(config.data.reward_memory_gb * 2**30),
            network=config.data.reward_network,
        ),
        sampling=sampling,
        samples_per_prompt=rollout.samples_per_prompt,
        max_failed_groups=rollout.max_failed_groups,
        advantage=advantages,
        decode=decode,
    )


def make_sync(config: Config) -> DiskSync | BroadcastSync:
    """The way of the actor's weights to the servers."""
    sync, servers, folder = config.sync, config.servers, config.run.folder / "sync"
    shared = dict(
        hf_folder=served_folder(config),
        bucket_bytes=sync.bucket_bytes,
        timeout_s=sync.timeout_s,
        patience_s=servers.start_timeout_s,
        release_memory=servers.release_memory,
    )
    if sync.method == "disk":
        return DiskSync(servers.urls, folder=folder, **shared)
    if sync.method == "ipc":
        return IPCSync(servers.urls, proof_folder=folder, **shared)
    return BroadcastSync(servers.urls, proof_folder=folder, backend=sync.backend, **shared)


def run(config: Config, mesh: Mesh | None = None, stop: StopRequest | None = None) -> bool:
    """One rank of a training run, from the first check to the final table.

    Raises ConfigError before the first step.

    `mesh` is one that is there already, of the same layout. True when all steps are done, False when the run
    saved and ended because `stop` asked for it.
    """
    try:
        if config.precision.deterministic:
            be_deterministic()
        mesh = mesh or init_mesh(config.parallel, config.run.seed)
        stop = stop or StopRequest(config.run)
        assembly = assemble(config, mesh, stop.reason)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(*error.args) from error
    try:
        resumed = _resume(config, assembly.trainer)
        saver = Saver(assembly.trainer, config.run)
        finished = None
        while finished is None:
            finished = _attempt(assembly, saver, resumed)
            resumed = True
    except ConfigError:
        raise
    except Exception as error:
        assembly.trainer.watchdog.dump(f"{type(error).__name__}: {error}")
        raise
    finally:
        assembly.close()
    if mesh.is_main and finished:
        print_report(config.run.folder)
    if mesh.is_main and not finished:
        stop.done()
        print(f"saved after step {assembly.trainer.num_steps} and ended as asked", flush=True)
    return finished


Report = Callable[[int, dict[str, float]], None]
Account = Callable[[int], object]


def _resume(config: Config, trainer: Trainer) -> bool:
    """Load the newest checkpoint if the run is to go on from one; whether it did."""
    run, mesh = config.run, trainer.mesh
    try:
        checkpoint.check_room(trainer, run)
    except ValueError as error:
        raise ConfigError(*error.args) from error
    if not run.resume or (run.resume == "auto" and not mesh.from_main(checkpoints(run.folder))):
        return False
    try:
        troubles = checkpoint.resume(trainer, run.folder)
    except ValueError as error:
        raise ConfigError(*error.args) from error
    if mesh.is_main:
        kept = len(trainer.collector.kept)
        more = f", with {kept} groups of the next one" if kept else ""
        print(*troubles, f"resumed after step {trainer.num_steps}{more}", sep="\n", flush=True)
    return True


def _attempt(assembly: Assembly, saver: Saver, resumed: bool) -> bool | None:
    """What `_train` returns; None when the run went back to a checkpoint, to go on from there with another
    attempt."""
    trainer = assembly.trainer
    with contextlib.ExitStack() as outputs:
        report, account = _outputs(trainer.config, trainer.mesh, trainer, resumed, outputs)
        try:
            return _train(assembly, saver, report, account, resumed)
        except RollBack as error:
            _roll_back(trainer, saver, error)
    return None


def _train(assembly: Assembly, saver: Saver, report: Report, account: Account, resumed: bool) -> bool:
    """The loop over steps. False when it ended early because it was asked to stop. Raises RollBack."""
    trainer, config = assembly.trainer, assembly.trainer.config
    trainer.push()
    metrics = probe(trainer, assembly.probes)
    if not resumed:
        report(0, {**metrics, **evaluate(trainer, assembly.heldout, assembly.stop_ids)})
    try:
        while trainer.num_steps < config.run.steps:
            trainer.refuse_stop()
            _one_step(assembly, saver, report, account)
    except StopRun:
        with trainer.watchdog.phase("save"):
            trainer.make_room()
            saver.save(background=False)
        return False
    with trainer.watchdog.phase("save"):
        saver.wait()
    if config.run.save_hf_at_end:
        _export(trainer)
    return True


def _one_step(assembly: Assembly, saver: Saver, report: Report, account: Account) -> None:
    trainer, config = assembly.trainer, assembly.trainer.config
    metrics = trainer.step()
    step, last = trainer.num_steps, trainer.num_steps == config.run.steps
    if step % config.sync.probe_every == 0:
        metrics |= probe(trainer, assembly.probes)
    if assembly.heldout and (step % config.evaluation.every == 0 or last):
        metrics |= evaluate(trainer, assembly.heldout, assembly.stop_ids)
    with trainer.timer("save"):
        saver.poll()
        due = config.run.save_every and step % config.run.save_every == 0 and not trainer.guard.in_doubt
        if due or (config.run.save_every and last):
            with trainer.room_to_save():
                saver.save(background=config.run.save_in_background and not last)
    account(step)
    report(step, metrics | {"time/save": trainer.values["time/save"], "save/failed": float(saver.num_failed)})
    if config.run.save_hf_every and step % config.run.save_hf_every == 0 and not last:
        try:
            _export(trainer)
        except OSError as error:
            if trainer.mesh.is_main:
                print(f"WARNING: the run goes on: {error}", flush=True)


def _export(trainer: Trainer) -> None:
    """Both models as HF folders. Raises OSError, on every rank, when they cannot be written."""
    folder = trainer.config.run.folder / "hf" / f"step-{trainer.num_steps:06d}"
    try:
        with trainer.watchdog.phase(f"export of step {trainer.num_steps}"):
            for model in (trainer.policy, trainer.actor):
                export_hf(model, folder / model.name)
    except OSError as error:
        raise OSError(
            f"{folder} could not be written: {error}. tools/megatron_to_hf.py makes it of a checkpoint."
        ) from error


def _roll_back(trainer: Trainer, saver: Saver, error: RollBack) -> None:
    """Load the newest checkpoint that did not lead here already. Raises `error` where there is none."""
    run, mesh = trainer.config.run, trainer.mesh
    saver.wait()
    found = [
        name
        for name in mesh.from_main([f.name for f in checkpoints(run.folder)])
        if name not in saver.led_astray
    ]
    if not trainer.config.guard.rollback or not found:
        raise error
    if mesh.is_main:
        print(f"WARNING: step {trainer.num_steps + 1}: {error} Going back to {found[-1]}.", flush=True)
    saver.led_astray.add(found[-1])
    checkpoint.resume(trainer, run.folder, newest=found[-1])


def _outputs(
    config: Config, mesh: Mesh, trainer: Trainer, resumed: bool, outputs: contextlib.ExitStack
) -> tuple[Report, Account]:
    """Metrics, progress and the account of prompts: written by the main rank, called by every rank."""
    if not mesh.is_main:
        return (
            lambda step, metrics: None,
            lambda step: trainer.collector.account() if mesh.is_leader else None,
        )
    knobs, folder = config.logging, config.run.folder
    resume_step = trainer.num_steps if resumed else None
    if config.run.resume == "auto" and not resumed:
        resume_step = -1  # What an attempt without a checkpoint left is done again.
    writer = outputs.enter_context(
        MetricsWriter(folder, knobs.tensorboard, knobs.wandb_project, resume_step=resume_step)
    )
    prompts = JsonLines(folder / "prompts.jsonl", resume_step)
    outputs.callback(prompts.close)
    progress = outputs.enter_context(StepLogger(config.run.steps, progress=knobs.progress))

    sinks = [writer.write, progress.log]
    if knobs.prometheus_port is not None:
        endpoint = PrometheusEndpoint(knobs.prometheus_host, knobs.prometheus_port)
        sinks.append(outputs.enter_context(endpoint).write)

    def report(step: int, metrics: dict[str, float]) -> None:
        for sink in sinks:
            sink(step, metrics)

    def account(step: int) -> None:
        prompts.write({"step": step, **trainer.collector.account()})

    return report, account
