"""Where a step's time goes, and what Jackpot adds to a step without correction, on the same batches in one
run; or what a run of one model, or one with a frozen reference, takes beside the joint one; or what learning
takes by tokens per micro-batch, a push by what is proved of it.

    python benchmarks/step.py MODELS_FOLDER [key=value ...] [--steps 8]
        [--one-model | --reference | --tokens N N ... | --checksums N N ...]

MODELS_FOLDER holds policy/ and actor/ (examples/quickstart/shipped.py prints one). Starts one SGLang server,
collects each batch once and lets both corrections learn from it, in alternating order; prints medians over
the batches. With --tokens each batch is packed and learned with each number of packing.tokens in turn. With
--checksums weights are pushed with each number of sync.checksums_every in turn, and a push's requests are
listed. With --one-model it starts a server for each of two runs, with the actor and without one
(rollout.model=policy, actor=null), which take turns step by step; prints seconds, tokens and bytes held.
With --reference the second run has the policy at the start as its reference.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_jackpot.algorithm.corrections import make_correction
from megatron_jackpot.config import load_config
from megatron_jackpot.data.bins import padded
from megatron_jackpot.launch.local import start_model_servers
from megatron_jackpot.models.mesh import init_mesh
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.servers.admin import ServerAdmin
from megatron_jackpot.servers.process import stop_servers
from megatron_jackpot.sync.proof import Proof
from megatron_jackpot.train.assembly import assemble

PHASES = ("rollout", "score", "correct", "update_policy", "update_actor", "sync")
ARMS = ("jackpot", "none")
RUNS = {
    "one model": ("rollout.model=policy", "actor=null"),
    "reference": ("policy.reference={}", "algorithm.reference_kl={weight: 1.0e-3}"),
}
"""Run beside the joint one -> what sets it apart."""
RUN = Path(__file__).parents[1] / "examples" / "quickstart" / "run.yaml"


def measure(trainer, steps: int) -> tuple[dict[str, dict[str, list[float]]], list[float]]:
    """arm -> phase -> seconds per batch, and trained tokens per batch."""
    seconds: dict[str, dict[str, list[float]]] = {arm: {phase: [] for phase in PHASES} for arm in ARMS}
    tokens = []
    for step in range(steps + 1):
        measured = trainer.measurements()
        with measured.timer("rollout"):
            trained = trainer.curate(trainer.collect())
        with measured.timer("sync"):
            trainer.push()
        shared = {phase: measured.values[f"time/{phase}"] for phase in ("rollout", "sync")}
        batch = trainer.packed(trained)
        for arm in ARMS if step % 2 else ARMS[::-1]:
            trainer.methods.correction = make_correction(arm, {}, 0)
            measured = trainer.measurements()
            trainer.learn(batch, measured)
            # The first batch warms caches and is not counted.
            for phase in PHASES if step else ():
                learned = measured.values.get(f"time/{phase}", 0.0)
                seconds[arm][phase].append(shared.get(phase, learned))
        if step:
            tokens.append(float(sum(r.num_tokens for group in trained.groups for r in group)))
    return seconds, tokens


def report(seconds: dict[str, dict[str, list[float]]], tokens: list[float]) -> None:
    totals = {arm: [sum(row) for row in zip(*seconds[arm].values(), strict=True)] for arm in ARMS}
    table = Table(title=f"median over {len(tokens)} batches")
    for column in ("phase", "jackpot s", "share", "none s", "share"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase in PHASES:
        cells = []
        for arm in ARMS:
            median = statistics.median(seconds[arm][phase])
            cells += [f"{median:.4f}", f"{median / statistics.median(totals[arm]):.1%}"]
        table.add_row(phase, *cells)
    medians = {arm: statistics.median(totals[arm]) for arm in ARMS}
    table.add_row("step", f"{medians['jackpot']:.4f}", "", f"{medians['none']:.4f}", "")
    console = Console()
    console.print(table)
    console.print(
        "tokens/s of a Jackpot step (prompt and response): "
        f"{statistics.median(tokens) / medians['jackpot']:.0f}"
    )
    ratio = statistics.median(a / b for a, b in zip(totals["jackpot"], totals["none"], strict=True))
    console.print(f"ratio of a Jackpot step to a none step, same batches: {ratio:.3f}")
    learn = {
        arm: [
            total - a - b
            for total, a, b in zip(totals[arm], seconds[arm]["rollout"], seconds[arm]["sync"], strict=True)
        ]
        for arm in ARMS
    }
    ratio = statistics.median(a / b for a, b in zip(learn["jackpot"], learn["none"], strict=True))
    console.print(f"the same without rollout and sync: {ratio:.3f}")


def by_tokens(trainer, steps: int, choices: list[int]) -> None:
    """Medians of what each batch takes with micro-batches of so many tokens."""
    seconds: dict[int, list[float]] = {tokens: [] for tokens in choices}
    counts: dict[int, list[float]] = {tokens: [] for tokens in choices}
    for step in range(steps + 1):
        trained = trainer.curate(trainer.collect())
        trainer.push()
        for tokens in choices if step % 2 else choices[::-1]:
            trainer.packer.tokens = padded(tokens, trainer.mesh.tp)
            began = time.perf_counter()
            batch = trainer.packed(trained)
            trainer.learn(batch, trainer.measurements())
            if step:
                seconds[tokens].append(time.perf_counter() - began)
                counts[tokens].append(batch.num_microbatches)
    table = Table(title=f"pack, score, correct, update: median over {steps} batches")
    for column in ("packing.tokens", "micro-batches", "seconds"):
        table.add_column(column, justify="right")
    for tokens in choices:
        median = statistics.median(seconds[tokens])
        table.add_row(f"{tokens}", f"{statistics.median(counts[tokens]):g}", f"{median:.3f}")
    Console().print(table)


@contextlib.contextmanager
def requests_timed() -> Iterator[dict[str, list[float]]]:
    """Seconds of each request to the servers' control, by path."""
    found: dict[str, list[float]] = {}
    ask = ServerAdmin._all

    async def timed(self, method: str, path: str, *given, **more):
        began = time.perf_counter()
        try:
            return await ask(self, method, path, *given, **more)
        finally:
            found.setdefault(path, []).append(time.perf_counter() - began)

    ServerAdmin._all = timed
    try:
        yield found
    finally:
        ServerAdmin._all = ask


def by_checksums(trainer, pushes: int, choices: list[int]) -> None:
    """Medians of a push with each number of pushes between checksums, and of its requests."""
    moved = next(iter(trainer.state.served.chunks[0].parameters()))
    admin, folder = trainer.sync.admin, trainer.sync.hf_folder
    proofs = {every: Proof(admin, folder, checksums_every=every) for every in choices}
    table = Table(title=f"{pushes} pushes each, ms")
    for column in ("sync.checksums_every", "push", "mean", "requests"):
        table.add_column(column, justify="left" if column == "requests" else "right")
    seconds: dict[int, list[float]] = {every: [] for every in choices}
    asked: dict[int, dict[str, list[float]]] = {every: {} for every in choices}
    # One after the other: a push of another proof's would be a fault, which always asks for checksums.
    for every, proof in proofs.items():
        trainer.sync.proof = proof
        for number in range(pushes + 2):
            trainer.state.num_steps += 1
            with torch.no_grad():
                moved.mul_(1.001)
            with requests_timed() as found:
                began = time.perf_counter()
                trainer.push()
                total = time.perf_counter() - began
            # The first two of a start always ask for checksums.
            if number >= 2:
                seconds[every].append(total)
                for path, times in found.items():
                    asked[every].setdefault(path, []).extend(times)
    for every in choices:
        mine = asked[every].items()
        parts = [f"{path[1:]} {statistics.median(t) * 1e3:.1f} x {len(t) / pushes:.2g}" for path, t in mine]
        both = (statistics.median(seconds[every]), statistics.mean(seconds[every]))
        table.add_row(f"{every}", *(f"{value * 1e3:.1f}" for value in both), "\n".join(parts))
    Console().print(table)


def held_bytes(models) -> dict[str, float]:
    """What a run's models keep between steps: weights, gradients, and the optimizers' states and masters."""
    held = {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0}
    for model in models:
        weights = [p for chunk in model.chunks for p in chunk.parameters()]
        own = {p.untyped_storage().data_ptr() for p in weights}
        held["weights"] += sum(p.nbytes for p in weights)
        held["gradients"] += sum(p.main_grad.nbytes for p in weights if p.requires_grad)
        if model.optimizer is None:
            continue
        for part in getattr(model.optimizer, "chained_optimizers", [model.optimizer]):
            for parameter, state in part.optimizer.state.items():
                held["optimizer"] += sum(getattr(value, "nbytes", 0) for value in state.values())
                held["optimizer"] += parameter.nbytes * (parameter.untyped_storage().data_ptr() not in own)
    return held


def models_of(trainer) -> list:
    """All that a run holds, the reference too."""
    reference = trainer.state.reference
    return [*trainer.state.models.values(), *([] if reference is None else [reference.model])]


def beside(trainers: dict, steps: int) -> dict[str, dict[str, list[float]]]:
    """run -> metric -> its value in each step; the runs take turns, the first step is not counted. Of the
    first rank: others have no metrics."""
    for trainer in trainers.values():
        trainer.push()
    found: dict[str, dict[str, list[float]]] = {name: {} for name in trainers}
    for step in range(steps + 1):
        for name, trainer in [*trainers.items()][:: 1 if step % 2 else -1]:
            metrics = trainer.step().metrics
            if dist.get_rank():
                continue
            metrics["tokens per second"] = metrics["train/tokens"] / metrics["time/step"]
            for metric, value in metrics.items() if step else ():
                found[name].setdefault(metric, []).append(value)
    return found


def report_beside(trainers: dict, found: dict[str, dict[str, list[float]]], steps: int) -> None:
    """Medians of both runs, and of their ratios step by step."""
    table = Table(title=f"median over {steps} steps")
    for column in ("", *trainers, "ratio"):
        table.add_column(column, justify="right" if column else "left")
    joint, alone = (found[name] for name in trainers)
    rows = [f"time/{phase}" for phase in (*PHASES, "step")]
    for metric in (*rows, "train/tokens", "tokens per second", "rollout/tokens_per_s", "sync/bytes"):
        pair = [run.get(metric, [0.0] * steps) for run in (joint, alone)]
        ratio = statistics.median(b / a if a else 1.0 for a, b in zip(*pair, strict=True))
        digits = 4 if metric in rows else 0
        cells = [f"{statistics.median(values):.{digits}f}" for values in pair]
        table.add_row(metric, *cells, f"{ratio:.3f}")
    sizes = [held_bytes(models_of(trainer)) for trainer in trainers.values()]
    for kind in sizes[0]:
        a, b = (size[kind] for size in sizes)
        table.add_row(f"bytes of {kind}", f"{a:.0f}", f"{b:.0f}", f"{b / a:.3f}")
    a, b = (sum(size.values()) for size in sizes)
    table.add_row("bytes held by the trainer", f"{a:.0f}", f"{b:.0f}", f"{b / a:.3f}")
    Console().print(table)


def from_first(make: Callable[[], Any]) -> Any:
    """What rank 0 makes, on every rank."""
    made = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    return made[0]


@contextlib.contextmanager
def assembled(folder: Path, overrides: list[str], mesh: Mesh) -> Iterator:
    """A run's assembly, with a server of its own, which the first rank starts."""
    config = load_config(RUN, [f"run.folder={folder}", *overrides])
    servers = start_model_servers(config) if dist.get_rank() == 0 else []
    try:
        urls = from_first(lambda: tuple(server.url for server in servers))
        config = config.model_copy(update={"servers": config.servers.model_copy(update={"urls": urls})})
        assembly = assemble(config, mesh)
        yield assembly
        assembly.close()
    finally:
        stop_servers(servers, 15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--one-model", dest="beside", action="store_const", const="one model")
    kinds.add_argument("--tokens", type=int, nargs="+", help="numbers of packing.tokens to compare")
    kinds.add_argument("--checksums", type=int, nargs="+", help="numbers of sync.checksums_every to compare")
    kinds.add_argument("--reference", dest="beside", action="store_const", const="reference")
    parser.add_argument("--steps", type=int, default=8, help="batches, or pushes, measured")
    args = parser.parse_args()
    overrides = [f"policy.hf={args.models}/policy", f"actor.hf={args.models}/actor", *args.overrides]
    config = load_config(RUN, overrides)
    mesh = init_mesh(config.parallel, config.run.seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:

        def made(name: str, changes: tuple[str, ...] = ()):
            return stack.enter_context(assembled(Path(folder) / name, [*overrides, *changes], mesh)).trainer

        if args.beside is not None:
            runs = {"joint": (), args.beside: RUNS[args.beside]}
            trainers = {name: made(name.replace(" ", "-"), changes) for name, changes in runs.items()}
            report_beside(trainers, beside(trainers, args.steps), args.steps)
        elif args.tokens is not None:
            by_tokens(made("run"), args.steps, args.tokens)
        elif args.checksums is not None:
            by_checksums(made("run"), args.steps, args.checksums)
        else:
            report(*measure(made("run"), args.steps))


if __name__ == "__main__":
    main()
