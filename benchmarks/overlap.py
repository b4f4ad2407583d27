"""What sampling ahead saves, and that it changes no step's responses: step time at rollout.ahead 0, 1 and 2.

    python benchmarks/overlap.py [--steps 12]

Tiny models on one rank, scripted rollouts without a server: a batch takes as long as an update, which is
measured first. "even": one batch after the other, as on servers that are full. "heavy tail": a batch's groups
side by side, each as long as a Pareto draw of its prompt says, the longest of 8 about as long as an update.
Prints medians, their ratio to taking turns, what `plan`'s timeline has for the even shape, and the mean
response length, which must not depend on `ahead`.

"replies": how much slower a step's learning is while the rollouts' thread parses replies as fast as a server
sends them, with and without top-k; runs with and without replies take turns.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.models.mesh import destroy_mesh
from megatron_jackpot.plan.timeline import Rates, Work, simulate
from megatron_jackpot.servers.protocol import Sampling
from megatron_jackpot.servers.reply import parse_group
from tests.parallel.layouts import NUM_PROMPTS, Layout, load_trainer, make_config
from tests.parallel.spawn import run_ranks
from tests.rollout.sources import ScriptedSource
from tests.servers.fake_server import VOCAB, group
from tests.tiny import rollout, write_models

AHEAD = (0, 1, 2)
SHAPES = ("even", "heavy tail")
WARM = 2
"""Steps that are not counted."""
REPLIES = {20: 11_900, 0: 28_300}
"""top-k -> tokens a second of one server, a 0.6B model on an H200 (results/2026-11-27-h200.md)."""
SAMPLES, LENGTH = 8, 256
"""Of a reply."""
ROUNDS = 3
"""How often each form of replies is measured."""


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


def reply(k: int) -> tuple[bytes, Sampling]:
    """A group's, as a server sends it."""
    samples = group(SAMPLES, length=LENGTH, k=20)
    if k == 0:
        for one in samples:
            fields = one["meta_info"].items()
            one["meta_info"] = {name: value for name, value in fields if "top_logprobs" not in name}
    sampling = Sampling(temperature=1, max_new_tokens=LENGTH, top_k_logp=k)
    return json.dumps(samples).encode(), sampling


async def parse_replies(k: int) -> None:
    """For ever, at the rate of REPLIES."""
    body, sampling = reply(k)
    due = time.perf_counter()
    while True:
        parse_group(body, SAMPLES, sampling, vocab_size=VOCAB)
        due += SAMPLES * LENGTH / REPLIES[k]
        await asyncio.sleep(max(0.0, due - time.perf_counter()))


def processor_share(k: int) -> float:
    """Of one core, that parsing takes at the rate of REPLIES."""
    body, sampling = reply(k)
    parse_group(body, SAMPLES, sampling, vocab_size=VOCAB)
    started = time.process_time()
    for _ in range(20):
        parse_group(body, SAMPLES, sampling, vocab_size=VOCAB)
    return (time.process_time() - started) / 20 * REPLIES[k] / (SAMPLES * LENGTH)


def _steps(
    shape: str, batch_s: float, ahead: int, steps: int, folder: Path, replies: int | None = None
) -> list[dict[str, float]]:
    """Metrics of each step; `replies` is the top-k of those that are parsed meanwhile."""
    config = make_config(Layout(), folder)
    rollouts = config.rollout.model_copy(update={"ahead": ahead, "max_staleness": max(ahead, 1)})
    trainer = load_trainer(config.model_copy(update={"rollout": rollouts}))
    prompts = [rollout(p, 0).prompt for p in range(NUM_PROMPTS * 4)]
    trainer.state.loader = PromptLoader(prompts, NUM_PROMPTS, 0, 1, 5)
    trainer.source = trainer.pipeline.source = Timed(shape, batch_s)
    if replies is not None:
        trainer.source.thread.submit(parse_replies(replies))
    rows = [trainer.step().metrics for _ in range(steps + WARM)][WARM:]
    trainer.pipeline.interrupt("the end")
    trainer.source.close()
    destroy_mesh()
    return rows


def _measure(rank: int, world: int, steps: int, folder: str) -> tuple[dict, dict]:
    """(shape -> ahead -> steps, top-k of the replies -> seconds of learning)."""
    alone = _steps("even", 0.0, 0, steps, Path(folder))
    update_s = statistics.median(row["time/step"] for row in alone)
    found = {s: {a: _steps(s, update_s, a, steps, Path(folder)) for a in AHEAD} for s in SHAPES}
    learning: dict[int | None, list[float]] = {form: [] for form in (None, *REPLIES)}
    for _ in range(ROUNDS):
        for form, seconds in learning.items():
            rows = _steps("even", 0.0, 1, steps, Path(folder), form)
            seconds += [row["time/step"] - row["time/rollout"] for row in rows]
    return found, learning


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
        found, learning = run_ranks(_measure, 1, 600, args.steps, folder)[0]
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
    Console().print(_of_learning(learning))


def _of_learning(learning: dict[int | None, list[float]]) -> Table:
    table = Table(title="learning while replies are parsed")
    for column in ("replies", "tokens/s", "of a core", "median s", "ratio"):
        table.add_column(column, justify="left" if column == "replies" else "right")
    idle = statistics.median(learning[None])
    for form, seconds in learning.items():
        name, rate, share = "none", "", ""
        if form is not None:
            name = f"top-{form}" if form else "without top-k"
            rate, share = f"{REPLIES[form]:,}", f"{processor_share(form):.1%}"
        median = statistics.median(seconds)
        table.add_row(name, rate, share, f"{median:.4f}", f"{median / idle:.3f}")
    return table


if __name__ == "__main__":
    main()
