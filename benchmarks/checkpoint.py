"""What a checkpoint costs: seconds, the pause that training sees, and GB/s against a plain write of the same bytes.

    python benchmarks/checkpoint.py [--hidden 512] [--layers 8] [--rounds 5] [--folder DIR]

Policy and actor are Qwen3 models with random weights, with AdamW state, on one rank. Each round does, in alternating
order, a save in the foreground, a save in the background while the main thread computes, and a plain write (with
fsync) of as many bytes; medians over the rounds.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table

from megatron_jackpot.checkpoint import Saver
from megatron_jackpot.config import Optimizer, Parallel, Precision
from megatron_jackpot.config_run import Run
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.models.families import family_of, read_hf_config
from megatron_jackpot.models.mesh import destroy_mesh, init_mesh
from megatron_jackpot.provenance import checkpoints
from tests.tiny import write_model


def make_trainer(folder: Path, hidden: int, layers: int) -> SimpleNamespace:
    """What a Saver needs of a trainer: two models after one optimizer step each."""
    parallel = Parallel()
    mesh = init_mesh(parallel, 0)
    models = {}
    for name, scale in (("policy", 1), ("actor", 2)):
        shape = dict(
            hidden_size=hidden // scale,
            intermediate_size=3 * hidden // scale,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=hidden // scale // 8,
            vocab_size=8192,
        )
        hf = write_model(folder / name, 0, **shape)
        family = family_of(read_hf_config(hf))
        models[name] = MegatronModel.load(
            name, family, hf, mesh=mesh, parallel=parallel,
            precision=Precision(dtype="float32"), padded_vocab=8192,
        )  # fmt: skip
        models[name].add_optimizer(Optimizer(), 10)
        for chunk in models[name].chunks:
            chunk.zero_grad_buffer()
        models[name].optimizer.step()
    nothing = SimpleNamespace(state_dict=lambda: {}, kept={}, controllers=lambda: {})
    return SimpleNamespace(
        **models,
        mesh=mesh,
        loader=None,
        collector=nothing,
        guard=nothing,
        methods=nothing,
        num_steps=0,
        num_probes=0,
    )


def plain_write(path: Path, num_bytes: int) -> float:
    content = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8).numpy()
    started = time.perf_counter()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def one_round(saver: Saver, trainer: SimpleNamespace, first: bool) -> dict[str, float]:
    """Seconds of one save of each kind."""
    seconds = {}
    for background in (True, False) if first else (False, True):
        trainer.num_steps += 1
        started = time.perf_counter()
        saver.save(background=background)
        pause = time.perf_counter() - started
        if background:
            while saver._writing is not None and saver._writing.thread.is_alive():
                time.sleep(0.01)
            finish = time.perf_counter()
            saver.poll()
            pause += time.perf_counter() - finish
        seconds["background pause" if background else "foreground"] = pause
        if background:
            seconds["background whole"] = time.perf_counter() - started
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default a temporary folder")
    args = parser.parse_args()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        trainer = make_trainer(folder, args.hidden, args.layers)
        saver = Saver(trainer, Run(folder=folder / "run", keep=1))
        saver.save(background=False)
        files = [path for path in checkpoints(folder / "run")[-1].rglob("*") if path.is_file()]
        num_bytes = sum(path.stat().st_size for path in files)
        rounds = []
        for number in range(args.rounds):
            row = {"plain write": plain_write(folder / "plain", num_bytes)} if number % 2 else {}
            row |= one_round(saver, trainer, first=number % 2 == 0)
            rounds.append(row or {})
            row.setdefault("plain write", plain_write(folder / "plain", num_bytes))
        report(
            {name: statistics.median(row[name] for row in rounds) for name in rounds[0]},
            num_bytes,
            args.rounds,
        )
        destroy_mesh()
        shutil.rmtree(folder / "run")


def report(median: dict[str, float], num_bytes: int, rounds: int) -> None:
    table = Table(title=f"{num_bytes / 1e6:.0f} MB, median of {rounds} rounds")
    for column in ("what", "seconds", "GB/s"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name in ("plain write", "foreground", "background whole", "background pause"):
        rate = "" if name == "background pause" else f"{num_bytes / median[name] / 1e9:.2f}"
        table.add_row(name, f"{median[name]:.3f}", rate)
    console = Console(width=100)
    console.print(table)
    console.print(f"foreground save / plain write: {median['foreground'] / median['plain write']:.2f}")
    console.print(
        f"background pause / foreground save: {median['background pause'] / median['foreground']:.3f}"
    )


if __name__ == "__main__":
    main()
