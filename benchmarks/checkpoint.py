"""What a checkpoint costs: seconds, the pause that training sees, and GB/s against a plain write of the same
bytes.

    python benchmarks/checkpoint.py [--ranks 1] [--hidden 512] [--layers 8] [--rounds 5] [--folder DIR]

Policy and actor are Qwen3 models with random weights, with AdamW state, on one rank or data-parallel on
several. Each round does, in alternating order, a save in the foreground, a save in the background while the
main thread multiplies matrices, and a plain write (with fsync) of as many bytes; medians over the rounds, of
the slowest rank. "Work beside it" is how many products the main thread does during a background save, over
how many it does alone.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_jackpot.config import Optimizer, Parallel
from megatron_jackpot.config.run import Guards, Run
from megatron_jackpot.models.mesh import destroy_mesh, init_mesh
from megatron_jackpot.run.provenance import checkpoints
from megatron_jackpot.run.watchdog import Watchdog
from megatron_jackpot.train.checkpoint import Saver
from megatron_jackpot.train.guard import Guard
from megatron_jackpot.train.state import TrainState
from tests.loading import load_model
from tests.parallel.spawn import run_ranks
from tests.tiny import write_model


def make_state(folder: Path, hidden: int, layers: int) -> TrainState:
    """Two models after one optimizer step each, and nothing else to save."""
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
        hf = folder / name
        if mesh.is_main:
            write_model(hf, 0, **shape)
        mesh.barrier()
        models[name] = load_model(hf, name=name, mesh=mesh, parallel=parallel)
        models[name].add_optimizer(Optimizer(), 10)
        for chunk in models[name].chunks:
            chunk.zero_grad_buffer()
        models[name].optimizer.step()
    methods = SimpleNamespace(controllers=lambda: {})
    return TrainState(mesh=mesh, **models, methods=methods, guard=Guard(Guards()))


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


def products(until: Callable[[], bool]) -> float:
    """Matrix products per second of the main thread."""
    matrix, count, started = torch.rand(192, 192), 0, time.perf_counter()
    while not until():
        matrix = (matrix @ matrix).clamp(0, 1)
        count += 1
    return count / (time.perf_counter() - started)


def one_round(saver: Saver, first: bool) -> dict[str, float]:
    """Seconds of one save of each kind, and the share of its speed that work beside the background save
    had."""
    seconds = {}
    for background in (True, False) if first else (False, True):
        saver.state.num_steps += 1
        soon = time.perf_counter() + 0.5
        alone = products(lambda soon=soon: time.perf_counter() > soon)
        dist.barrier()
        started = time.perf_counter()
        saver.save(background=background)
        pause = time.perf_counter() - started
        if background:
            seconds["work beside it"] = products(lambda: not saver._writing.thread.is_alive()) / alone
            finish = time.perf_counter()
            saver.poll()
            pause += time.perf_counter() - finish
        seconds["background pause" if background else "foreground"] = pause
        if background:
            seconds["background whole"] = time.perf_counter() - started
    return seconds


def measure(rank: int, world: int, args: argparse.Namespace, temporary: str) -> dict[str, float]:
    """Medians over the rounds on one rank, and the bytes of a checkpoint."""
    folder = Path(temporary)
    state = make_state(folder, args.hidden, args.layers)
    run = Run(folder=folder / "run", keep=1, save_every=1)
    saver = Saver(state, run, Watchdog(run.folder, rank, 3600))
    saver.save(background=False)
    files = [path for path in checkpoints(folder / "run")[-1].rglob("*") if path.is_file()]
    num_bytes = sum(path.stat().st_size for path in files)
    rounds = []
    for number in range(args.rounds):
        write = partial(plain_write, folder / f"plain-{rank}", num_bytes // world)
        row = {"plain write": write()} if number % 2 else {}
        row |= one_round(saver, first=number % 2 == 0)
        row.setdefault("plain write", write())
        rounds.append(row)
    destroy_mesh()
    return {name: statistics.median(row[name] for row in rounds) for name in rounds[0]} | {"bytes": num_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        ranks = run_ranks(measure, args.ranks, 3600, args, temporary)
    slowest = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    slowest["work beside it"] = min(rank["work beside it"] for rank in ranks)
    report(slowest, args)


def report(median: dict[str, float], args: argparse.Namespace) -> None:
    megabytes = median["bytes"] / 1e6
    table = Table(title=f"{megabytes:.0f} MB, {args.ranks} rank(s), median of {args.rounds} rounds")
    for column in ("what", "seconds", "GB/s"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name in ("plain write", "foreground", "background whole", "background pause"):
        rate = "" if name == "background pause" else f"{megabytes / 1e3 / median[name]:.2f}"
        table.add_row(name, f"{median[name]:.3f}", rate)
    console = Console(width=100)
    console.print(table)
    console.print(f"foreground save / plain write: {median['foreground'] / median['plain write']:.2f}")
    console.print(
        f"background pause / foreground save: {median['background pause'] / median['foreground']:.3f}"
    )
    console.print(f"speed of work beside a background save: {median['work beside it']:.2f}")


if __name__ == "__main__":
    main()
