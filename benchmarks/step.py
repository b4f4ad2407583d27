"""Where a step's time goes, and what Jackpot adds to a step without correction, on the same batches in one
run; or what a run of one model takes beside the joint one.

    python benchmarks/step.py MODELS_FOLDER [key=value ...] [--steps 8] [--one-model]

MODELS_FOLDER holds policy/ and actor/ (examples/quickstart/shipped.py prints one). Starts one SGLang server,
collects each batch once and lets both corrections learn from it, in alternating order; prints medians over
the batches. With --one-model it starts a server for each of two runs, with the actor and without one
(rollout.model=policy, actor=null), which take turns step by step; prints seconds, tokens and bytes held.
"""

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_jackpot.algorithm.corrections import make_correction
from megatron_jackpot.config import load_config
from megatron_jackpot.launch.local import start_model_servers
from megatron_jackpot.models.mesh import init_mesh
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.servers.process import stop_servers
from megatron_jackpot.train.assembly import assemble

PHASES = ("rollout", "score", "correct", "update_policy", "update_actor", "sync")
ARMS = ("jackpot", "none")
RUNS = {"joint": (), "one model": ("rollout.model=policy", "actor=null")}
"""Run -> what sets it apart."""
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


def held_bytes(models) -> dict[str, float]:
    """What a run's models keep between steps: weights, gradients, and the optimizers' states and masters."""
    held = {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0}
    for model in models:
        weights = [p for chunk in model.chunks for p in chunk.module.parameters()]
        own = {p.untyped_storage().data_ptr() for p in weights}
        held["weights"] += sum(p.nbytes for p in weights)
        held["gradients"] += sum(p.main_grad.nbytes for p in weights)
        for part in getattr(model.optimizer, "chained_optimizers", [model.optimizer]):
            for parameter, state in part.optimizer.state.items():
                held["optimizer"] += sum(getattr(value, "nbytes", 0) for value in state.values())
                held["optimizer"] += parameter.nbytes * (parameter.untyped_storage().data_ptr() not in own)
    return held


def beside(trainers: dict, steps: int) -> dict[str, dict[str, list[float]]]:
    """run -> metric -> its value in each step; the runs take turns, the first step is not counted."""
    for trainer in trainers.values():
        trainer.push()
    found: dict[str, dict[str, list[float]]] = {name: {} for name in trainers}
    for step in range(steps + 1):
        for name, trainer in [*trainers.items()][:: 1 if step % 2 else -1]:
            metrics = trainer.step().metrics
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
    sizes = [held_bytes(trainer.state.models.values()) for trainer in trainers.values()]
    for kind in sizes[0]:
        a, b = (size[kind] for size in sizes)
        table.add_row(f"bytes of {kind}", f"{a:.0f}", f"{b:.0f}", f"{b / a:.3f}")
    a, b = (sum(size.values()) for size in sizes)
    table.add_row("bytes held by the trainer", f"{a:.0f}", f"{b:.0f}", f"{b / a:.3f}")
    Console().print(table)


@contextlib.contextmanager
def assembled(folder: Path, overrides: list[str], mesh: Mesh) -> Iterator:
    """A run's assembly, with a server of its own."""
    config = load_config(RUN, [f"run.folder={folder}", *overrides])
    servers = start_model_servers(config)
    try:
        urls = tuple(server.url for server in servers)
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
    parser.add_argument("--one-model", action="store_true", help="compare with a run of one model")
    parser.add_argument("--steps", type=int, default=8, help="batches measured")
    args = parser.parse_args()
    overrides = [f"policy.hf={args.models}/policy", f"actor.hf={args.models}/actor", *args.overrides]
    config = load_config(RUN, overrides)
    mesh = init_mesh(config.parallel, config.run.seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:

        def made(name: str, changes: tuple[str, ...] = ()):
            return stack.enter_context(assembled(Path(folder) / name, [*overrides, *changes], mesh)).trainer

        if args.one_model:
            trainers = {name: made(name.replace(" ", "-"), changes) for name, changes in RUNS.items()}
            report_beside(trainers, beside(trainers, args.steps), args.steps)
        else:
            report(*measure(made("run"), args.steps))


if __name__ == "__main__":
    main()
