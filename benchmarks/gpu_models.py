"""Models and batches of the gpu_* benchmarks: Qwen3 shapes with Megatron's random weights, rollouts of given
lengths.

Random weights and proposals say nothing about learning; what a step costs does not depend on them."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_common import DEVICE
from megatron_jackpot.config import Config, parse_config
from megatron_jackpot.models import cpu
from megatron_jackpot.models.families import family_of
from megatron_jackpot.models.mesh import destroy_mesh, init_mesh
from megatron_jackpot.records import Aggregated, Batch, Prompt, Rollout
from megatron_jackpot.train.guard import Guard
from megatron_jackpot.train.methods import Methods
from megatron_jackpot.train.state import TrainState
from megatron_jackpot.train.step_metrics import Agreed
from megatron_jackpot.train.trainer import MiniBatch, Trainer
from tests.loading import load_models
from tests.tiny import hf_config

K = 20
PROMPT = 8


def make_config(tokens: int, precision: dict[str, Any], **sections: Any) -> Config:
    """A run of one step on packed micro-batches of `tokens`; its models' paths are never read."""
    tree: dict[str, Any] = dict(
        run=dict(folder=f"{tempfile.gettempdir()}/jackpot-benchmark"),
        policy=dict(hf="unused"),
        actor=dict(hf="unused"),
        data=dict(tasks=dict(chain_sum={}), max_prompt_tokens=PROMPT),
        rollout=dict(prompts_per_step=1, max_new_tokens=tokens - PROMPT, top_k_logp=K),
        packing=dict(tokens=tokens),
        precision=precision,
        logging=dict(tokens_every=None),
    )
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse_config(tree)


def make_trainer(config: Config, shapes: dict[str, dict], folders: dict[str, Path] | None = None) -> Trainer:
    """Policy and actor of the given config.json fields; weights from `folders`, else random."""
    cpu.install()
    mesh = init_mesh(config.parallel, config.run.seed)
    families = {name: family_of(hf_config(**shape)) for name, shape in shapes.items()}
    models = load_models(config, mesh, folders or dict.fromkeys(families), families, steps=100)
    state = TrainState(mesh=mesh, **models, methods=Methods.from_config(config), guard=Guard(config.guard))
    return Trainer(config, state)


def make_batch(trainer: Trainer, lengths: list[int], vocab: int) -> Batch:
    """One rollout per length, of random tokens from a random proposal, packed and on the device."""
    rollouts = [_rollout(sample, length, vocab) for sample, length in enumerate(lengths)]
    return trainer.packer.pack([rollouts], K)


def correct(trainer: Trainer, batch: Batch) -> tuple[MiniBatch, Aggregated, Agreed]:
    """The batch as one scored mini-batch, its weights, and the denominators."""
    scores = trainer.scorer(batch, step=0, served_version=0)
    correction = trainer.correct(scores)
    aggregated = trainer.aggregate(scores, correction)
    agreed = trainer.agree(scores, correction, aggregated)
    mini = MiniBatch(batch, slice(0, batch.num_microbatches), scores)
    return mini, aggregated, agreed._replace(num_policy=max(agreed.num_policy, 1.0))


def update_policy(trainer: Trainer, mini: MiniBatch, aggregated: Aggregated, agreed: Agreed) -> None:
    """One optimizer step of the policy, whether it has moved since it was scored or not."""
    trainer.update_policy(mini, aggregated, agreed, trainer.measurements(), first=False)


def _rollout(sample: int, length: int, vocab: int) -> Rollout:
    generator = np.random.default_rng([sample, length])
    response = length - PROMPT
    ids = np.argsort(generator.random((response, min(vocab, 4 * K))), axis=-1)[:, :K].astype(np.int32)
    # Close to uniform, as a model of random weights is: most tokens are accepted, and both updates run.
    logp = np.sort(generator.normal(-np.log(vocab), 0.3, (response, K)))[:, ::-1]
    sampled = generator.integers(0, K, response)
    row = np.arange(response)
    return Rollout(
        prompt=Prompt(0, tuple(generator.integers(3, vocab, PROMPT).tolist()), "x"),
        epoch=0,
        sample=sample,
        tokens=ids[row, sampled],
        server_logp=logp[row, sampled].astype(np.float32),
        topk_ids=ids,
        topk_logp=logp.astype(np.float32),
        valid=np.ones(response, bool),
        weight_version=np.zeros(response, np.int32),
        finish="stop",
        advantage=float(generator.normal()),
    )


def close() -> None:
    """Leave the mesh and give back the memory of models that are no longer referred to."""
    destroy_mesh()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
