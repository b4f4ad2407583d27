"""From a configuration to a run: models, prompts, source of rollouts, sync, and the loop over steps.

Everything that can be wrong with the input is refused here, before the first step.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_jackpot import checkpoint
from megatron_jackpot.batch import Prompt
from megatron_jackpot.config import Config
from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.data.prompts import heldout_prompts, training_prompts
from megatron_jackpot.data.tokenizer import check_same_tokenizer, load_tokenizer
from megatron_jackpot.evaluation import evaluate
from megatron_jackpot.gates import check_families, probe
from megatron_jackpot.logger import StepLogger, print_report
from megatron_jackpot.methods import Methods
from megatron_jackpot.metrics import MetricsWriter
from megatron_jackpot.models.build import padded_vocab_size
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.models.families import Family, family_of, read_hf_config
from megatron_jackpot.models.mesh import init_mesh
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.rewards.pool import RewardPool
from megatron_jackpot.rollout.engine import Sampling
from megatron_jackpot.rollout.sglang import SGLangClient
from megatron_jackpot.rollout.source import ServerSource
from megatron_jackpot.sync.broadcast import BroadcastSync
from megatron_jackpot.sync.disk import DiskSync
from megatron_jackpot.sync.export import export_hf
from megatron_jackpot.trainer import Trainer


class Refused(ValueError):
    """The input cannot work; the message names the field and the remedy."""


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


def assemble(config: Config, mesh: Mesh) -> Assembly:
    """Raises ValueError or FileNotFoundError naming the field for anything that cannot work."""
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
            # Generated problems are right by construction; a file may hold answers no response could ever match.
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
        RewardPool(config.data.reward, config.data.reward_workers, config.data.reward_timeout_s),
        sampling=sampling,
        samples_per_prompt=rollout.samples_per_prompt,
        max_failed_groups=rollout.max_failed_groups,
        advantage=advantages,
        decode=decode,
    )


def make_sync(config: Config) -> DiskSync | BroadcastSync:
    """The way of the actor's weights to the servers."""
    sync, folder = config.sync, config.run.folder / "sync"
    shared = dict(hf_folder=config.actor.hf, bucket_bytes=sync.bucket_bytes, timeout_s=sync.timeout_s)
    if sync.method == "disk":
        return DiskSync(config.servers.urls, folder=folder, **shared)
    return BroadcastSync(config.servers.urls, proof_folder=folder, backend=sync.backend, **shared)


def run(config: Config, mesh: Mesh | None = None) -> None:
    """One rank of a training run, from the first check to the final table. Raises Refused before the first step.

    `mesh` is one that is there already, of the same layout.
    """
    try:
        mesh = mesh or init_mesh(config.parallel, config.run.seed)
        assembly = assemble(config, mesh)
        if config.run.resume:
            troubles = checkpoint.resume(assembly.trainer, config.run.folder)
            if mesh.is_main:
                print(*troubles, f"resumed after step {assembly.trainer.num_steps}", sep="\n", flush=True)
    except (ValueError, FileNotFoundError) as error:
        raise Refused(*error.args) from error
    try:
        with contextlib.ExitStack() as outputs:
            report = _report(config, mesh, assembly.trainer.num_steps, outputs)
            _train(assembly, report)
    finally:
        assembly.close()
    if mesh.is_main:
        print_report(config.run.folder)


Report = Callable[[int, dict[str, float]], None]


def _train(assembly: Assembly, report: Report) -> None:
    trainer, config = assembly.trainer, assembly.trainer.config
    trainer.push()
    metrics = probe(trainer, assembly.probes)
    if trainer.num_steps == 0:
        report(0, {**metrics, **evaluate(trainer, assembly.heldout, assembly.stop_ids)})
    for step in range(trainer.num_steps + 1, config.run.steps + 1):
        metrics = trainer.step()
        if step % config.sync.probe_every == 0:
            metrics |= probe(trainer, assembly.probes)
        if assembly.heldout and (step % config.evaluation.every == 0 or step == config.run.steps):
            metrics |= evaluate(trainer, assembly.heldout, assembly.stop_ids)
        report(step, metrics)
        if config.run.save_every and (step % config.run.save_every == 0 or step == config.run.steps):
            checkpoint.save(trainer, config.run.folder, config.run.keep)
        if step == config.run.steps or (config.run.save_hf_every and step % config.run.save_hf_every == 0):
            for model in (trainer.policy, trainer.actor):
                export_hf(model, config.run.folder / "hf" / f"step-{step:06d}" / model.name)


def _report(config: Config, mesh: Mesh, done: int, outputs: contextlib.ExitStack) -> Report:
    """Metrics files and progress on the main rank, nothing elsewhere."""
    if not mesh.is_main:
        return lambda step, metrics: None
    knobs = config.logging
    resume_step = done if config.run.resume else None
    writer = outputs.enter_context(
        MetricsWriter(config.run.folder, knobs.tensorboard, knobs.wandb_project, resume_step=resume_step)
    )
    progress = outputs.enter_context(StepLogger(config.run.steps, progress=knobs.progress))

    def report(step: int, metrics: dict[str, float]) -> None:
        writer.write(step, metrics)
        progress.log(step, metrics)

    return report
