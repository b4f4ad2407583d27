"""One fixed batch through `Trainer.learn` on any parallel layout; what comes out must not depend on the
layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from megatron_jackpot.algorithm.selectors_base import Group, Selection, Selector
from megatron_jackpot.config import Config, parse_config
from megatron_jackpot.config.model_folder import read_hf_config
from megatron_jackpot.models.families import family_of
from megatron_jackpot.models.mesh import destroy_mesh, init_mesh
from megatron_jackpot.rollout.collected import Collected
from megatron_jackpot.sync.stream import export
from megatron_jackpot.train.assembly import load_families, padded_vocab
from megatron_jackpot.train.curator import Trained
from megatron_jackpot.train.guard import Guard
from megatron_jackpot.train.methods import Methods
from megatron_jackpot.train.reference import Reference
from megatron_jackpot.train.state import TrainState
from megatron_jackpot.train.trainer import Trainer
from tests.loading import load_models
from tests.tiny import groups

NUM_PROMPTS = 8
TOP_K = 8


@dataclass(frozen=True, kw_only=True)
class Uneven(Selector):
    """Prunes drawn rollouts, of some prompts more than of others, and weighs the rest."""

    denominator: Literal["full", "selected"] = "full"

    def __call__(self, group: Group) -> Selection:
        (kept_C,) = (group.draw_N >= 0.4).nonzero(as_tuple=True)
        return Selection(index_S=kept_C, weight_S=0.5 + 2 * group.draw_N[kept_C])


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    pp: int = 1
    dp: int = 1
    vpp: int | None = None
    sp: bool = False
    packing: bool = True
    num_minibatches: int = 1
    overlap: bool = False
    sharded_optimizer: bool = True
    correction: tuple[tuple[str, object], ...] = (("name", "jackpot"),)
    filters: tuple[str, ...] = ()
    objective: str = "ppo"
    aggregation: str = "token"
    selector: str = "all"
    target: str = "old"
    distill: str = "k3_sample"
    fused: bool = True
    entropy_bonus: float = 0.0
    reference_kl: tuple[tuple[str, object], ...] = ()
    """Of the policy to the actor's folder, or in a run of one model to the policy at the start."""
    top_k: int = TOP_K
    """What servers return; 0 leaves the candidates to the trainer."""
    one_model: bool = False
    """No actor: servers hold the policy."""

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp


def make_config(layout: Layout, folder: Path) -> Config:
    overlap = dict(overlap_grad_reduce=layout.overlap, overlap_param_gather=layout.overlap)
    parallel = dict(
        tp=layout.tp,
        pp=layout.pp,
        vpp=layout.vpp,
        sequence_parallel=layout.sp,
        distributed_optimizer=layout.sharded_optimizer,
        timeout_s=60,
        **overlap,
    )
    optimizer = dict(lr=1e-3, clip_grad=1e6)
    distill = dict(distill_weight=0.5, distill=dict(name=layout.distill))
    reference = None
    if layout.reference_kl:
        reference = dict(hf=None if layout.one_model else str(folder / "actor"), offload=True)
    actor = dict(hf=str(folder / "actor"), optimizer=optimizer, **distill)
    return parse_config(
        dict(
            run=dict(folder=str(folder / "run"), seed=5),
            policy=dict(hf=str(folder / "policy"), optimizer=optimizer, reference=reference),
            actor=None if layout.one_model else actor,
            data=dict(tasks=dict(chain_sum={}), max_prompt_tokens=16),
            rollout=dict(
                model="policy" if layout.one_model else "actor",
                prompts_per_step=NUM_PROMPTS,
                samples_per_prompt=4,
                max_new_tokens=16,
                top_k_logp=layout.top_k,
            ),
            # Four micro-batches of a few sequences each, two on each of two data-parallel ranks.
            packing=dict(enabled=layout.packing, tokens=128),
            algorithm=dict(
                correction=dict(layout.correction),
                filters=[dict(name=name) for name in layout.filters],
                objective=dict(name=layout.objective),
                aggregation=dict(name=layout.aggregation),
                selector=dict(name=layout.selector),
                entropy=dict(bonus=layout.entropy_bonus, target=2.0) if layout.entropy_bonus else None,
                reference_kl=dict(layout.reference_kl) or None,
                num_candidates=TOP_K,
                num_minibatches=layout.num_minibatches,
                target=layout.target,
            ),
            parallel=parallel,
            precision=dict(dtype="float32", fused_linear=layout.fused),
        )
    )


def load_trainer(config: Config, total_steps: int = 10) -> Trainer:
    """`total_steps` optimizer steps are what a decay of the learning rate is over."""
    mesh = init_mesh(config.parallel, config.run.seed)
    folders = {name: section.hf for name, section in config.models.items()}
    # The actor's folder is the reference's: no other vocabulary counts in the padding.
    families = {name: family_of(read_hf_config(folder)) for name, folder in folders.items()}
    models = {"actor": None, **load_models(config, mesh, folders, families, total_steps)}
    methods = Methods.from_config(config)
    kinds = load_families(config)
    reference = Reference.load(config, mesh, kinds, padded_vocab(kinds, mesh))
    state = TrainState(mesh=mesh, **models, methods=methods, guard=Guard(config.guard), reference=reference)
    return Trainer(config, state)


def collected(groups: list) -> Collected:
    """A leader's groups as a rollout brings them."""
    return Collected(groups=groups, sampled=groups, sums={}, epoch=0, trained=[], lost=[])


def run_layout(layout: Layout, folder: Path, steps: int = 1) -> dict | None:
    """Metrics of every step, keep decisions by (rollout, position) and exported weights after `steps`; on
    rank 0 only."""
    config = make_config(layout, folder)
    trainer = load_trainer(config)
    mesh = trainer.mesh
    keeps = _record_keeps(trainer)
    history: list[dict] = []
    for _ in range(steps):
        mine = groups(range(mesh.dp_rank, NUM_PROMPTS, mesh.dp)) if mesh.is_leader else None
        measured = trainer.measurements()
        trained = Trained(groups=mine or [], pruned=[])
        if layout.selector != "all" and mine is not None:
            trained = trainer.methods.curator(
                mine, trainer.state.num_steps, trainer.sum_over_batch, mesh.device
            )
        measured.note_rollouts(collected(mine or []), trained, mesh.dp)
        trainer.learn(trainer.packed(trained if mesh.is_leader else None), measured, mine)
        trainer.state.num_steps += 1
        history.append(measured.reduced(mesh))
    weights = {name: export(model) for name, model in trainer.state.models.items()}
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, keeps)
    destroy_mesh()
    if dist.get_rank() != 0:
        return None
    merged: dict = {}
    for part in parts:
        for key, kept in part.items():
            assert merged.setdefault(key, kept) == kept, f"ranks disagree about {key}"
    return dict(metrics=history[-1], history=history, keep=merged, weights=weights)


def run_cases(
    rank: int, world: int, cases: dict[str, Layout], folder: str, steps: int
) -> dict[str, dict | None]:
    """`run_layout` of every case, by name, as a function for `run_ranks`."""
    return {name: run_layout(layout, Path(folder), steps) for name, layout in cases.items()}


def _record_keeps(trainer: Trainer) -> dict:
    """(step, epoch, prompt, sample, position) -> whether the token was kept, filled by every correction."""
    keeps: dict = {}
    correct = trainer.correct

    def recorded(scores):
        correction = correct(scores)
        if scores is not None:
            batch = scores.batch
            for place in torch.nonzero(batch.mask_MT).tolist():
                at = tuple(place)
                key = (scores.step, *batch.rollout_id_MT3[at].tolist(), int(batch.position_MT[at]))
                keeps[key] = bool(correction.keep_MT[at])
        return correction

    trainer.correct = recorded
    return keeps
