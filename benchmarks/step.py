"""Where a step's time goes, and what Jackpot adds to a step without correction, on the same batches in one
run.

    python benchmarks/step.py MODELS_FOLDER [key=value ...] [--steps 8]

MODELS_FOLDER holds policy/ and actor/ (examples/quickstart/shipped.py prints one). Starts one SGLang server,
collects each batch once and lets both corrections learn from it, in alternating order; prints medians over
the batches.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_jackpot.algorithm.corrections import make_correction
from megatron_jackpot.config import load_config
from megatron_jackpot.launch.local import start_actor_servers
from megatron_jackpot.models.mesh import init_mesh
from megatron_jackpot.servers.process import stop_servers
from megatron_jackpot.train.assembly import assemble

PHASES = ("rollout", "score", "correct", "update_policy", "update_actor", "sync")
ARMS = ("jackpot", "none")
RUN = Path(__file__).parents[1] / "examples" / "quickstart" / "run.yaml"


def measure(trainer, steps: int) -> tuple[dict[str, dict[str, list[float]]], list[float]]:
    """arm -> phase -> seconds per batch, and trained tokens per batch."""
    seconds: dict[str, dict[str, list[float]]] = {arm: {phase: [] for phase in PHASES} for arm in ARMS}
    tokens = []
    for step in range(steps + 1):
        measured = trainer.measurements()
        with measured.timer("rollout"):
            groups = trainer.with_advantages(trainer.collect())
        with measured.timer("sync"):
            trainer.push()
        shared = {phase: measured.values[f"time/{phase}"] for phase in ("rollout", "sync")}
        batch = trainer.packer.pack(groups, trainer.config.rollout.top_k_logp)
        for arm in ARMS if step % 2 else ARMS[::-1]:
            trainer.methods.correction = make_correction(arm, {}, 0)
            measured = trainer.measurements()
            trainer.learn(batch, measured)
            # The first batch warms caches and is not counted.
            for phase in PHASES if step else ():
                learned = measured.values.get(f"time/{phase}", 0.0)
                seconds[arm][phase].append(shared.get(phase, learned))
        if step:
            tokens.append(float(sum(r.num_tokens for group in groups for r in group)))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=8, help="batches measured")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"run.folder={folder}", f"policy.hf={args.models}/policy", f"actor.hf={args.models}/actor"]
        config = load_config(RUN, [*paths, *args.overrides])
        servers = start_actor_servers(config)
        try:
            urls = [server.url for server in servers]
            config = config.model_copy(
                update={"servers": config.servers.model_copy(update={"urls": tuple(urls)})}
            )
            assembly = assemble(config, init_mesh(config.parallel, config.run.seed))
            report(*measure(assembly.trainer, args.steps))
            assembly.close()
        finally:
            stop_servers(servers, 15)


if __name__ == "__main__":
    main()
