"""What the trainer does with a batch of the quickstart, without a server: seconds of each phase, and
processor seconds.

    python benchmarks/learn.py MODELS_FOLDER [key=value ...] [--steps 6]
    torchrun --nproc-per-node 2 benchmarks/learn.py MODELS_FOLDER parallel.threads=1

MODELS_FOLDER holds policy/ and actor/ (examples/quickstart/shipped.py prints one). The rollouts are made up
here: the run's first prompts with their answers, random top-k and advantages; each step learns from the same.
With PYTHONPATH at another checkout it measures that one: rounds that take turns compare two. On a busy
machine compare processor seconds, of this rank and all its threads.
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from megatron_jackpot.config import Config, load_config
from megatron_jackpot.data.prompts import training_prompts
from megatron_jackpot.data.tokenizer import load_tokenizer
from megatron_jackpot.models.mesh import init_mesh
from megatron_jackpot.records import Prompt, Rollout
from megatron_jackpot.train.assembly import load_families, load_model
from megatron_jackpot.train.guard import Guard
from megatron_jackpot.train.methods import Methods
from megatron_jackpot.train.state import TrainState
from megatron_jackpot.train.trainer import Trainer

RUN = Path(__file__).parents[1] / "examples" / "quickstart" / "run.yaml"
PHASES = ("score", "correct", "update_policy", "update_actor")


def rollout(prompt: Prompt, sample: int, answer: list[int], top_k: int, draw: np.random.Generator) -> Rollout:
    """The answer, as if a server had sampled it."""
    tokens = np.array(answer, np.int32)
    ids = np.stack([draw.permutation(100)[:top_k] for _ in answer]).astype(np.int32)
    weight = np.sort(draw.exponential(size=ids.shape), axis=1)[:, ::-1] + 0.01
    logp = np.log(0.99 * weight / weight.sum(1, keepdims=True)).astype(np.float32)
    return Rollout(
        prompt=prompt,
        epoch=0,
        sample=sample,
        tokens=tokens,
        server_logp=logp[:, 0],
        topk_ids=ids,
        topk_logp=logp,
        valid=np.ones(len(tokens), np.bool_),
        weight_version=np.zeros(len(tokens), np.int32),
        finish="stop",
        reward=1.0,
        correct=True,
        advantage=float(draw.normal()),
    )


def made_up(config: Config) -> list[list[Rollout]]:
    """A step's groups."""
    tokenizer, draw = load_tokenizer(config.policy.hf), np.random.default_rng(0)
    prompts = training_prompts(config.data, tokenizer).prompts[: config.rollout.prompts_per_step]
    found = []
    for prompt in prompts:
        answer = tokenizer.encode(prompt.label["answer"], add_special_tokens=False)
        ended = [*answer, tokenizer.eos_token_id]
        given = (ended, config.rollout.top_k_logp, draw)
        found.append([rollout(prompt, i, *given) for i in range(config.rollout.samples_per_prompt)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=6, help="steps measured, after one that is not")
    args = parser.parse_intermixed_args()
    models = [f"{name}.hf={args.models / name}" for name in ("policy", "actor")]
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(RUN, [f"run.folder={folder}", *models, *args.overrides])
        mesh = init_mesh(config.parallel, config.run.seed)
        families = load_families(config)
        built = {name: load_model(name, config, mesh, families) for name in config.models}
        methods, guard = Methods.from_config(config), Guard(config.guard)
        state = TrainState(mesh=mesh, methods=methods, guard=guard, **built)
        trainer = Trainer(config, state)
        groups = made_up(config)[mesh.dp_rank :: mesh.dp]
        batch = trainer.packer.pack(groups, config.rollout.top_k_logp)
        rows: list[dict[str, float]] = []
        for _ in range(args.steps + 1):
            measured, before = trainer.measurements(), resource.getrusage(resource.RUSAGE_SELF)
            started = time.perf_counter()
            trainer.learn(batch, measured)
            seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
            row = {phase: measured.values[f"time/{phase}"] for phase in PHASES}
            row |= {"all": seconds, "user": after.ru_utime - before.ru_utime}
            rows.append(row | {"system": after.ru_stime - before.ru_stime})
    medians = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}
    print(
        f"rank {torch.distributed.get_rank()}: {batch.num_microbatches} x {batch.tokens_MT.shape[1]} tokens, "
        f"{torch.get_num_threads()} threads: " + ", ".join(f"{name} {s:.3f}" for name, s in medians.items())
    )


if __name__ == "__main__":
    main()
