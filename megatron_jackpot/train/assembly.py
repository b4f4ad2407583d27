"""From a configuration to a trainer: models, prompts, source of rollouts, sync.

Everything that can be wrong with the input is refused here, before the first step.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

from megatron_jackpot.algorithm.objectives import AStarPO
from megatron_jackpot.config import Config, Data
from megatron_jackpot.config.model_folder import check_stop_ids, read_hf_config, stop_token_ids
from megatron_jackpot.config.model_shape import misfits, padded_vocab_size
from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.data.prompts import Limits, heldout_prompts, named_prompts, training_prompts
from megatron_jackpot.data.tokenizer import check_same_tokenizer, load_tokenizer, text_of
from megatron_jackpot.data.value_table import ValueTable
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.models.families import Family, family_of
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.records import Prompt
from megatron_jackpot.rewards.pool import RewardPool
from megatron_jackpot.rollout.source import ServerSource
from megatron_jackpot.run.clock import started_at, write_start
from megatron_jackpot.run.interrupt import Stop, never
from megatron_jackpot.servers.client import SGLangClient
from megatron_jackpot.servers.client_process import ClientProcess
from megatron_jackpot.servers.protocol import Sampling
from megatron_jackpot.servers.served_folder import served_folder
from megatron_jackpot.sync.broadcast import BroadcastSync
from megatron_jackpot.sync.disk import DiskSync
from megatron_jackpot.sync.ipc import IPCSync
from megatron_jackpot.train.auto_packing import with_number
from megatron_jackpot.train.evaluation import Evaluator
from megatron_jackpot.train.guard import Guard
from megatron_jackpot.train.methods import Methods
from megatron_jackpot.train.probe import Prober
from megatron_jackpot.train.reference import Reference
from megatron_jackpot.train.state import TrainState
from megatron_jackpot.train.trainer import Trainer


@dataclass(frozen=True)
class Assembly:
    """A trainer, and how it is checked and judged."""

    trainer: Trainer
    probe: Prober
    evaluate: Evaluator

    def close(self) -> None:
        """End reward workers, HTTP sessions and the weight group."""
        try:
            if self.trainer.source is not None:
                self.trainer.source.close()
        finally:
            if self.trainer.sync is not None:
                self.trainer.sync.close()


def assemble(config: Config, mesh: Mesh, stop: Stop = never) -> Assembly:
    """`stop` gives a reason to interrupt a rollout, or None. Raises ValueError or FileNotFoundError naming
    the field for anything that cannot work."""
    config = with_number(config, mesh)
    methods = Methods.from_config(config)
    check_same_tokenizer(config.folders)
    tokenizer = load_tokenizer(config.policy.hf)
    families = load_families(config)
    eos = tokenizer.eos_token_id
    stop_ids = checked_stop_ids(config, families, eos if isinstance(eos, int) else None)
    limits = prompt_limits(config, mesh, families)
    training = training_prompts(config.data, tokenizer, limits=limits)
    heldout = heldout_prompts(
        config.data, config.evaluation, tokenizer, exclude=training.texts, limits=limits
    )
    sets = named_prompts(config.data, config.evaluation, tokenizer, exclude=training.texts, limits=limits)
    models = {name: load_model(name, config, mesh, families) for name in config.models}
    with ExitStack() as opened:
        source = None
        if mesh.is_leader:
            source = make_source(config, families, stop_ids, partial(text_of, tokenizer))
            opened.callback(source.close)
            _check_labels(config, mesh, source, training.prompts, heldout.prompts, sets)
        per_step, seed = config.rollout.prompts_per_step, config.run.seed
        state = TrainState(
            mesh=mesh,
            policy=models["policy"],
            actor=models.get("actor"),
            reference=Reference.load(config, mesh, families, padded_vocab(families, mesh)),
            methods=methods,
            guard=Guard(config.guard),
            loader=PromptLoader(
                training.prompts, per_step, mesh.dp_rank, mesh.dp, seed, config.data.changed_rows
            ),
            packing_tokens=config.packing.size,
        )
        know_values(config, state, training.prompts)
        sync = make_sync(config, stop) if mesh.is_main else None
        if sync is not None:
            opened.callback(sync.close)
        trainer = Trainer(config, state, source=source, sync=sync, stop=stop)
        probe = Prober(
            config,
            state,
            trainer.scorer,
            source,
            training.prompts[: config.sync.probe_prompts],
            stop,
        )
        evaluate = Evaluator(
            config,
            state,
            source,
            {"": heldout.prompts, **sets},
            stop_ids=stop_ids,
            packing_tokens=trainer.packer.tokens,
            stop=stop,
        )
        opened.pop_all()  # Whole: from here on it is `close` that ends them.
    return Assembly(trainer, probe, evaluate)


def _check_labels(
    config: Config,
    mesh: Mesh,
    source: ServerSource,
    training: Sequence[Prompt],
    heldout: Sequence[Prompt],
    sets: Mapping[str, Sequence[Prompt]],
) -> None:
    """Raises ValueError where a file holds answers that no response could ever match; this rank's share of
    them. Generated problems are right by construction."""
    files: list[tuple[Path | None, Sequence[Prompt]]] = []
    if config.data.source == "jsonl":
        files += [(config.data.path, training), (config.data.heldout_path, heldout)]
    files += [(config.evaluation.sets[name].path, named) for name, named in sets.items()]
    for path, prompts in files:
        if path is not None:
            source.check_labels(prompts[mesh.dp_rank :: mesh.dp], path)


def know_values(config: Config, state: TrainState, prompts: Sequence[Prompt]) -> None:
    """The table of an objective that asks for one. Raises ValueError where it is not of these prompts, this
    reference and these rewards."""
    objective = state.methods.objective
    if not isinstance(objective, AStarPO):
        return
    path, reference = Path(objective.values).expanduser(), state.reference
    assert reference is not None, "the objective was refused without one"
    table = ValueTable.read(path)
    table.check(prompts, path)
    table.check_source(config, reference.digest, path)
    state.methods.objective = objective.with_values(table.values, state.mesh.device)


def load_families(config: Config) -> dict[str, Family]:
    """The models' families by name, checked against the run's sequence lengths."""
    families = {name: family_of(read_hf_config(folder)) for name, folder in config.folders.items()}
    mistakes = misfits(config, families)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return families


def load_model(name: str, config: Config, mesh: Mesh, families: dict[str, Family]) -> MegatronModel:
    """One model from its HF folder, with its optimizer."""
    section = config.models[name]
    model = MegatronModel.load(
        name,
        families[name],
        section.hf,
        mesh=mesh,
        parallel=config.parallel,
        precision=config.precision,
        padded_vocab=padded_vocab(families, mesh),
    )
    model.add_optimizer(section.optimizer, config.run.steps * config.algorithm.num_minibatches)
    return model


def padded_vocab(families: dict[str, Family], mesh: Mesh) -> int:
    """One size for all models, so that their slices of the vocabulary hold the same ids."""
    return padded_vocab_size([family.vocab_size for family in families.values()], mesh.tp)


def checked_stop_ids(config: Config, families: dict[str, Family], eos: int | None) -> tuple[int, ...]:
    """What ends a response for trainer, evaluation and servers.

    Raises ValueError for one outside a model.
    """
    stop_ids = stop_token_ids(eos, [section.hf for section in config.models.values()])
    check_stop_ids(stop_ids, _rows(families))
    return stop_ids


def prompt_limits(config: Config, mesh: Mesh, families: dict[str, Family]) -> Limits:
    """What prompts must fit: both embeddings; and the day the run began, which the main rank writes down."""
    now = None
    if mesh.is_main:
        now = started_at(config.run.folder, config.run.resume)
        write_start(config.run.folder, now)
    return Limits(rows=_rows(families), now=mesh.from_main(now))


def _rows(families: dict[str, Family]) -> dict[str, int]:
    return {name: family.vocab_size for name, family in families.items()}


def make_source(
    config: Config,
    families: dict[str, Family],
    stop_ids: tuple[int, ...],
    decode: Callable[[Sequence[int]], str],
) -> ServerSource:
    """Client, reward pool and sampling of one DP leader."""
    rollout, served = config.rollout, families[config.served]
    client = partial(
        SGLangClient,
        config.servers.urls,
        vocab_size=served.vocab_size,
        context_length=served.context_length,
        concurrency=rollout.concurrency,
        request_timeout_s=rollout.request_timeout_s,
        retries=rollout.retries,
        prefix_cache=config.servers.prefix_cache,
        through_pushes=rollout.ahead > 0,
    )
    sampling = Sampling(
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        top_k_logp=rollout.top_k_logp,
        stop_token_ids=stop_ids,
    )

    return ServerSource(
        partial(ClientProcess, client),
        partial(reward_pool, config.data),
        urls=config.servers.urls,
        sampling=sampling,
        samples_per_prompt=rollout.samples_per_prompt,
        num_ids=min(family.vocab_size for family in families.values()),
        max_failed_groups=rollout.max_failed_groups,
        decode=decode,
        limit_s=config.run.phase_timeout_s,
    )


def reward_pool(data: Data) -> RewardPool:
    """The workers that score responses."""
    return RewardPool(
        data.judge,
        data.reward_workers,
        data.reward_timeout_s,
        memory_bytes=int(data.reward_memory_gb * 2**30),
        network=data.reward_network,
        max_failed=data.max_failed_rewards,
        batch=data.reward_batch,
        code=data.code.model_dump(),
    )


class SyncSettings(TypedDict):
    """What every way takes."""

    hf_folder: Path
    bucket_bytes: int
    timeout_s: float
    patience_s: float
    release_memory: bool
    checksums_every: int
    stop: Stop


def make_sync(config: Config, stop: Stop = never) -> DiskSync | BroadcastSync:
    """The way of the served model's weights to the servers."""
    sync, servers, folder = config.sync, config.servers, config.run.folder / "sync"
    shared = SyncSettings(
        hf_folder=served_folder(config),
        bucket_bytes=sync.bucket_bytes,
        timeout_s=sync.timeout_s,
        patience_s=servers.start_timeout_s,
        release_memory=servers.release_memory,
        # Lent memory comes back without its weights.
        checksums_every=1 if servers.release_memory else sync.checksums_every,
        stop=stop,
    )
    if sync.method == "disk":
        return DiskSync(servers.urls, folder=folder, **shared)
    if sync.method == "ipc":
        return IPCSync(servers.urls, proof_folder=folder, **shared)
    return BroadcastSync(servers.urls, proof_folder=folder, backend=sync.backend, **shared)
