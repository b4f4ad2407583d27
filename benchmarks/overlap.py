"""What sampling ahead saves, and that it changes no step's responses: step time at rollout.ahead 0, 1 and 2.

    python benchmarks/overlap.py [--steps 12]

Tiny models on one rank, scripted rollouts without a server: a batch takes as long as an update, which is
measured first. "even": one batch after the other, as on servers that are full. "heavy tail": a batch's groups
side by side, each as long as a Pareto draw of its prompt says, the longest of 8 about as long as an update.
Prints medians, their ratio to taking turns, what `plan`'s timeline has for the even shape, and the mean
response length, which must not depend on `ahead`.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.models.mesh import destroy_mesh
from megatron_jackpot.plan.timeline import Rates, Work, simulate
from tests.parallel.layouts import NUM_PROMPTS, Layout, load_trainer, make_config
from tests.parallel.spawn import run_ranks
from tests.rollout.sources import ScriptedSource
from tests.tiny import rollout, write_models

AHEAD = (0, 1, 2)
SHAPES = ("even", "heavy tail")
WARM = 2
"""Steps that are not counted."""


class Timed(ScriptedSource):
    """Rollouts that take `batch_s` a batch, of one shape or the other."""

    def __init__(self, shape: str, batch_s: float) -> None:
        super().__init__()
        self.shape, self.batch_s, self.servers = shape, batch_s, asyncio.Lock()

    async def collect(self, epoch, prompts, **options):
        if self.shape == "even":
            async with self.servers:
                await asyncio.sleep(self.batch_s)
        else:
            draws = [random.Random(f"{epoch}/{prompt.id}").paretovariate(2.0) for prompt in prompts]
            # The mean of the longest of 8 draws is about 5.
            await asyncio.gather(*(asyncio.sleep(self.batch_s * draw / 5) for draw in draws))
        return await super().collect(epoch, prompts, **options)


def _steps(shape: str, batch_s: float, ahead: int, steps: int, folder: Path) -> list[dict[str, float]]:
    config = make_config(Layout(), folder)
    rollouts = config.rollout.model_copy(update={"ahead": ahead, "max_staleness": max(ahead, 1)})
    trainer = load_trainer(config.model_copy(update={"rollout": rollouts}))
    prompts = [rollout(p, 0).prompt for p in range(NUM_PROMPTS * 4)]
    trainer.state.loader = PromptLoader(prompts, NUM_PROMPTS, 0, 1, 5)
    trainer.source = trainer.pipeline.source = Timed(shape, batch_s)
    rows = [trainer.step().metrics for _ in range(steps + WARM)][WARM:]
    trainer.pipeline.interrupt("the end")
    trainer.source.close()
    destroy_mesh()
    return rows


def _measure(rank: int, world: int, steps: int, folder: str) -> dict[str, dict[int, list[dict[str, float]]]]:
    alone = _steps("even", 0.0, 0, steps, Path(folder))
    update_s = statistics.median(row["time/step"] for row in alone)
    return {s: {a: _steps(s, update_s, a, steps, Path(folder)) for a in AHEAD} for s in SHAPES}


def timeline_s(update_s: float, ahead: int) -> float:
    """A step's seconds by the timeline: one server, one response at a time, as long as an update."""
    work = Work(sequences=1, mean_tokens=1.0, spread=0.0, longest=2.0)
    rates = Rates(stream_tps=1 / update_s, server_tps=1 / update_s, learn_s=update_s, push_s=0.0)
    return simulate(work, rates, servers=1, slots=1, ahead=ahead).step_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        found = run_ranks(_measure, 1, 600, args.steps, folder)[0]
    table = Table(title=f"median over {args.steps} steps")
    for column in (
        "rollouts",
        "ahead",
        "step s",
        "ratio",
        "timeline",
        "trainer idle",
        "servers idle",
        "tokens",
        "age",
    ):
        table.add_column(column, justify="left" if column == "rollouts" else "right")
    for shape, runs in found.items():
        serial = statistics.median(row["time/step"] for row in runs[0])
        for ahead, rows in runs.items():
            step, trainer, servers = (
                statistics.median(row[name] for row in rows)
                for name in ("time/step", "idle/trainer", "idle/servers")
            )
            tokens = statistics.mean(row["rollout/response_tokens"] for row in rows)
            age = max(row["staleness/max"] for row in rows)
            by_plan = f"{timeline_s(serial / 2, ahead):.3f}" if shape == "even" else ""
            cells = (f"{step:.3f}", f"{step / serial:.2f}", by_plan, f"{trainer:.0%}", f"{servers:.0%}")
            table.add_row(shape, str(ahead), *cells, f"{tokens:.4f}", f"{age:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
