"""Makes the quickstart's policy and actor by supervised warm-up through Megatron: what models/ holds.

    python examples/quickstart/prepare.py FOLDER

FOLDER gets policy/ and actor/ in fp16, and models.json: hashes, held-out accuracy, and what they were made
from. Another processor rounds its own way, and 1800 steps make that visible: a second making has other bits
and another accuracy. That is why the models are in the repository. A quarter of an hour of one core.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from common import accuracy, heldout, make_mesh_and_packer, make_model, read_run, read_warmup
from corpus import examples
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from shipped import RECORD
from supervised import train
from tokenizer import VOCAB_SIZE, build

from megatron_jackpot.config import Config, Optimizer
from megatron_jackpot.config.model_folder import read_hf_config
from megatron_jackpot.data.packing import Packer
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.models.hf_folder import Spec, write_safetensors
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.run.provenance import machine, versions
from megatron_jackpot.sync.stream import export

console = Console(stderr=True)


def hf_config(shape: dict, tokenizer) -> dict:
    return dict(
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        vocab_size=VOCAB_SIZE,
        head_dim=32,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        hidden_act="silu",
        attention_bias=False,
        attention_dropout=0.0,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        torch_dtype="float16",
        **shape,
    )


def warm_up(
    name: str, warmup: dict, config: Config, mesh: Mesh, packer: Packer, folder: Path
) -> dict[str, Any]:
    """Train one model and write its HF folder; returns its line of models.json."""
    knobs, tokenizer = warmup[name], build()
    steps, lr = knobs["steps"], knobs["lr"]
    optimizer = Optimizer(lr=lr, min_lr=lr / 10, warmup_steps=50, decay=knobs["decay"], weight_decay=0.01)
    torch.manual_seed(warmup["seed"])
    model = make_model(name, hf_config(knobs["hf"], tokenizer), None, mesh, optimizer, steps)
    test, development = heldout(config, tokenizer)
    corpus = examples(
        config.data,
        tokenizer,
        carelessness=warmup["carelessness"],
        seed=warmup["seed"],
        forbidden=test.texts | development.texts,
    )
    started = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    last = None
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(f"warm-up of the {name}", total=steps)

        def on_step(progress) -> bool:
            nonlocal last
            last = progress
            bar.update(
                task, completed=progress.step, description=f"warm-up of the {name}, loss {progress.loss:.3f}"
            )
            if progress.step % 100:
                return False
            score = accuracy(model, development, tokenizer, config, packer)
            bar.console.print(f"{name}: step {progress.step}, loss {progress.loss:.3f}, accuracy {score:.3f}")
            return "stop_at" in knobs and score >= knobs["stop_at"]

        train(model, corpus, packer, batch=warmup["batch"], steps=steps, on_step=on_step)
    seconds = time.perf_counter() - started
    write(model, tokenizer, folder)
    # Of the files, not of the model in memory: fp16 may tip an answer.
    rounded = make_model(name, read_hf_config(folder), folder, mesh, optimizer, steps)
    return dict(
        accuracy=accuracy(rounded, test, tokenizer, config, packer),
        parameters=sum(p.numel() for p in model.chunks[0].parameters()),
        steps=last.step,
        tokens=last.tokens,
        seconds=round(seconds),
        sha256={p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())},
    )


def write(model: MegatronModel, tokenizer, folder: Path) -> None:
    """An HF folder in fp16: half the bytes in the repository; the run computes in its own precision."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.family.hf_config, indent=1) + "\n")
    tensors = {name: tensor.half() for name, tensor in export(model).items()}
    specs = [Spec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    write_safetensors(folder / "model.safetensors", specs, tensors.__getitem__)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where they go; must not exist")
    folder = parser.parse_args().folder
    if folder.exists():
        parser.error(f"{folder} exists. Name another folder, or remove it first.")
    config, warmup = read_run([]), read_warmup()
    mesh, packer = make_mesh_and_packer(warmup)
    models = {}
    for name in ("actor", "policy"):
        made = models[name] = warm_up(name, warmup, config, mesh, packer, folder / name)
        console.print(
            f"{name}: {made['parameters']:,} parameters, held-out accuracy {made['accuracy']:.4f} "
            f"after {made['tokens']:,} tokens of warm-up in {made['seconds']} s"
        )
    record = dict(models=models, warmup=warmup, machine=machine(warmup["threads"]), versions=versions())
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
