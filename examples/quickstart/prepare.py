"""Makes the quickstart's policy and actor by supervised warm-up through Megatron, once; prints their folder
last.

    python examples/quickstart/prepare.py

The result is cached under $JACKPOT_HOME (default ~/.cache/megatron-jackpot) by the hash of this folder's code
and warmup.yaml, and of the tasks in run.yaml.
"""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import torch
import yaml
from common import HERE, accuracy, heldout, make_mesh_and_packer, make_model, read_run, read_warmup
from corpus import examples
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from supervised import train
from tokenizer import VOCAB_SIZE, build

from megatron_jackpot.config import Config, Optimizer
from megatron_jackpot.data.packing import Packer
from megatron_jackpot.models.hf_folder import Spec, write_safetensors
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.sync.stream import export

CODE = ("warmup.yaml", "tokenizer.py", "corpus.py", "supervised.py", "common.py", "prepare.py")
console = Console(stderr=True)


def cache_folder(config: Config) -> Path:
    digest = hashlib.sha256()
    for name in CODE:
        digest.update((HERE / name).read_bytes())
    digest.update(yaml.safe_dump([config.data.model_dump(mode="json"), config.evaluation.seed]).encode())
    home = Path(os.environ.get("JACKPOT_HOME", Path.home() / ".cache" / "megatron-jackpot"))
    return home / f"quickstart-{digest.hexdigest()[:16]}"


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
        torch_dtype="float32",
        **shape,
    )


def warm_up(
    name: str, warmup: dict, config: Config, mesh: Mesh, packer: Packer, folder: Path
) -> dict[str, float]:
    """Train one model and write its HF folder; returns what is worth knowing about it."""
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
    score = accuracy(model, test, tokenizer, config, packer)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.family.hf_config, indent=1))
    tensors = export(model)
    specs = [Spec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    write_safetensors(folder / "model.safetensors", specs, tensors.__getitem__)
    tokenizer.save_pretrained(folder)
    parameters = sum(p.numel() for p in model.chunks[0].parameters())
    return dict(accuracy=score, seconds=seconds, tokens=last.tokens, parameters=parameters)


def main() -> None:
    config, warmup = read_run([]), read_warmup()
    folder = cache_folder(config)
    if not (folder / "report.json").is_file():
        console.print(f"Making the quickstart's models, once, in {folder}")
        unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
        mesh, packer = make_mesh_and_packer(warmup["packing_tokens"], warmup["seed"])
        report = {}
        for name in ("actor", "policy"):
            report[name] = warm_up(name, warmup, config, mesh, packer, unfinished / name)
        (unfinished / "report.json").write_text(json.dumps(report, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    for name, made in json.loads((folder / "report.json").read_text()).items():
        console.print(
            f"{name}: {made['parameters']:,} parameters, held-out accuracy {made['accuracy']:.3f} "
            f"after {made['tokens']:,} tokens of warm-up in {made['seconds']:.0f} s"
        )
    print(folder)


if __name__ == "__main__":
    main()
