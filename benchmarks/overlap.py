"""What sampling ahead saves, and that it changes no step's responses: step time at rollout.ahead 0, 1 and 2.

    python benchmarks/overlap.py [--steps 12] [--rounds 100]

Tiny models on one rank, scripted rollouts without a server: a batch takes as long as an update, which is
measured first. "even": one batch after the other, as on servers that are full. "heavy tail": a batch's groups
side by side, each as long, in seconds and in tokens, as a Pareto draw of its prompt says, the longest of 8
about as long as an update. Prints medians, their ratio to taking turns, what `plan`'s timeline has for the
even shape, and the lengths that were trained on, which must not depend on `ahead`: their mean, and their
quantiles at 50, 90, 99 and 100%.

"replies": how much slower learning is while the rollouts' thread asks a server in another process as often
as one of a 0.6B model answers, and reads and parses what comes, with and without top-k. The forms take turns
every quarter of a second in an order that is drawn, and each round gives a ratio: other work on the machine
moves single ones by tens of per cent. Trimmed means of them, with 95% intervals by resampling.
"""

import argparse
import asyncio
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.models.mesh import destroy_mesh
from megatron_jackpot.plan.timeline import Rates, Work, simulate
from megatron_jackpot.rollout.loop_thread import LoopThread
from megatron_jackpot.servers.client import SGLangClient
from megatron_jackpot.servers.client_process import ClientProcess
from megatron_jackpot.servers.protocol import Sampling
from tests.parallel.layouts import NUM_PROMPTS, TOP_K, Layout, load_trainer, make_config
from tests.parallel.spawn import run_ranks
from tests.rollout.sources import HeavyTail, ScriptedSource
from tests.servers.fake_server import VOCAB, FakeServer, group, raw
from tests.tiny import groups, rollout, write_models

AHEAD = (0, 1, 2)
SHAPES = ("even", "heavy tail")
WARM = 2
"""Steps that are not counted."""
REPLIES = {20: 11_900, 0: 28_300}
"""top-k -> tokens a second of one server, a 0.6B model on an H200 (results/2026-11-27-h200.md)."""
SAMPLES, LENGTH = 8, 256
"""Of a reply."""
WINDOW_S = 0.25
"""Of learning beside one form of replies, in each round."""
Form = int | None
"""top-k of the replies, or none at all."""


class Even(ScriptedSource):
    """Rollouts that take `batch_s` a batch, one after the other."""

    def __init__(self, batch_s: float) -> None:
        super().__init__()
        self.batch_s, self.servers = batch_s, asyncio.Lock()

    async def collect(self, epoch, prompts, **options):
        async with self.servers:
            await asyncio.sleep(self.batch_s)
        return await super().collect(epoch, prompts, **options)


class Step(NamedTuple):
    metrics: dict[str, float]
    lengths: list[int]
    """Of the responses that it trained on."""


def reply(k: int) -> bytes:
    """A group's, as a server sends it."""
    samples = group(SAMPLES, length=LENGTH, k=20)
    if k == 0:
        for one in samples:
            fields = one["meta_info"].items()
            one["meta_info"] = {name: value for name, value in fields if "top_logprobs" not in name}
    return json.dumps(samples).encode()


class Replies:
    """What servers answer at `urls`, by top-k, asked for in a thread of its own at the rate of REPLIES."""

    def __init__(self, urls: dict[int, str]) -> None:
        self.thread = LoopThread()
        self.turn = self.number = 0
        self.clients = {
            k: ClientProcess(partial(SGLangClient, [url], vocab_size=VOCAB, context_length=4096))
            for k, url in urls.items()
        }
        self.one = asyncio.Lock()
        for client in self.clients.values():
            self.thread.wait(client.__aenter__(), 10, "a client")
            self.thread.wait(client.use(0), 60, "a client to start")

    def use(self, form: Form) -> tuple[float, int]:
        """From now on these, when the last one of others is there; the thread's processor seconds and the
        replies so far."""

        async def change() -> tuple[float, int]:
            async with self.one:
                self.turn += 1
            if form is not None:
                self.thread.submit(self._ask(form, self.turn))
            return time.thread_time(), self.number

        return self.thread.wait(change(), 10, "a reply")

    async def _ask(self, k: int, turn: int) -> None:
        sampling = Sampling(temperature=1, max_new_tokens=LENGTH, top_k_logp=k)
        every = SAMPLES * LENGTH / REPLIES[k]
        due = time.perf_counter() + random.random() * every
        while True:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            async with self.one:
                if self.turn != turn:
                    return
                await self.clients[k].generate_group([1], SAMPLES, sampling)
                self.number += 1
            due += every

    def close(self) -> None:
        self.use(None)
        for client in self.clients.values():
            self.thread.wait(client.__aexit__(None, None, None), 60, "a client to end")
        self.thread.close()


def _steps(shape: str, batch_s: float, ahead: int, steps: int, folder: Path) -> list[Step]:
    config = make_config(Layout(), folder)
    rollouts = config.rollout.model_copy(update={"ahead": ahead, "max_staleness": max(ahead, 1)})
    trainer = load_trainer(config.model_copy(update={"rollout": rollouts}))
    prompts = [rollout(p, 0).prompt for p in range(NUM_PROMPTS * 4)]
    trainer.state.loader = PromptLoader(prompts, NUM_PROMPTS, 0, 1, 5)
    source = Even(batch_s) if shape == "even" else HeavyTail(batch_s / 5)
    trainer.source = trainer.pipeline.source = source
    take, lengths = trainer.pipeline.take, list[list[int]]()

    def noted(*args, **options):
        taken = take(*args, **options)
        lengths.append([len(r.tokens) for group in taken.groups for r in group])
        return taken

    trainer.pipeline.take = noted
    rows = [Step(trainer.step().metrics, lengths[-1]) for _ in range(steps + WARM)][WARM:]
    trainer.pipeline.interrupt("the end")
    trainer.source.close()
    destroy_mesh()
    return rows


class Round(NamedTuple):
    """A window of learning beside one form of replies."""

    learn_s: float
    """Of a batch."""
    core: float
    """Share of one that the replies' thread took."""
    tps: float
    """Tokens a second that came."""


def _learning(folder: Path, urls: dict[int, str], rounds: int) -> dict[Form, list[Round]]:
    trainer = load_trainer(make_config(Layout(), folder))
    batch = trainer.packer.pack(groups(range(1)), TOP_K)
    replies = Replies(urls)
    for _ in range(WARM):
        trainer.learn(batch, trainer.measurements())
    # As `train` does before its first step.
    gc.collect()
    gc.freeze()
    order: list[Form] = [None, *REPLIES]
    found: dict[Form, list[Round]] = {form: [] for form in order}
    for _ in range(rounds):
        random.shuffle(order)
        for form in order:
            busy, number = replies.use(form)
            started, learned = time.perf_counter(), 0
            while time.perf_counter() < started + WINDOW_S:
                trainer.learn(batch, trainer.measurements())
                learned += 1
            taken = time.perf_counter() - started
            busy_then, number_then = replies.use(None)
            tokens = (number_then - number) * SAMPLES * LENGTH
            found[form].append(Round(taken / learned, (busy_then - busy) / taken, tokens / taken))
    replies.close()
    destroy_mesh()
    return found


def _measure(rank: int, world: int, steps: int, rounds: int, folder: str, urls: dict[int, str]) -> tuple:
    """(shape -> ahead -> steps, what `_learning` gives)."""
    found = {}
    if steps:
        alone = _steps("even", 0.0, 0, steps, Path(folder))
        update_s = statistics.median(row.metrics["time/step"] for row in alone)
        found = {s: {a: _steps(s, update_s, a, steps, Path(folder)) for a in AHEAD} for s in SHAPES}
    return found, _learning(Path(folder), urls, rounds)


def timeline_s(update_s: float, ahead: int) -> float:
    """A step's seconds by the timeline: one server, one response at a time, as long as an update."""
    work = Work(sequences=1, mean_tokens=1.0, spread=0.0, longest=2.0)
    rates = Rates(stream_tps=1 / update_s, server_tps=1 / update_s, learn_s=update_s, push_s=0.0)
    return simulate(work, rates, servers=1, slots=1, ahead=ahead).step_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="of each shape and ahead; 0 for replies alone")
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        write_models(Path(folder))
        fake = {k: servers.enter_context(FakeServer(generate=[raw(reply(k))])) for k in REPLIES}
        urls = {k: server.url for k, server in fake.items()}
        found, learning = run_ranks(_measure, 1, 600, args.steps, args.rounds, folder, urls)[0]
    if found:
        Console(width=110).print(_of_shapes(found, args.steps))
    Console(width=110).print(_of_learning(learning))
    print(f"load of the last minute {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")


def _of_shapes(found: dict[str, dict[int, list[Step]]], steps: int) -> Table:
    table = Table(title=f"median over {steps} steps")
    for column in (
        "rollouts",
        "ahead",
        "step s",
        "ratio",
        "timeline",
        "trainer idle",
        "servers idle",
        "mean tokens",
        "quantiles",
        "age",
    ):
        table.add_column(column, justify="left" if column == "rollouts" else "right")
    for shape, runs in found.items():
        serial = statistics.median(step.metrics["time/step"] for step in runs[0])
        for ahead, taken in runs.items():
            rows = [step.metrics for step in taken]
            step, trainer, servers = (
                statistics.median(row[name] for row in rows)
                for name in ("time/step", "idle/trainer", "idle/servers")
            )
            lengths = sorted(length for step in taken for length in step.lengths)
            shares = "/".join(str(lengths[int(q * (len(lengths) - 1))]) for q in (0.5, 0.9, 0.99, 1))
            age = max(row["staleness/max"] for row in rows)
            by_plan = f"{timeline_s(serial / 2, ahead):.3f}" if shape == "even" else ""
            cells = (f"{step:.3f}", f"{step / serial:.2f}", by_plan, f"{trainer:.0%}", f"{servers:.0%}")
            table.add_row(shape, str(ahead), *cells, f"{statistics.mean(lengths):.4f}", shares, f"{age:.0f}")
    return table


def _of_learning(found: dict[Form, list[Round]]) -> Table:
    table = Table(title=f"learning beside replies, {len(found[None])} rounds")
    for column in ("replies", "tokens/s", "of a core", "seconds", "ratio"):
        table.add_column(column, justify="left" if column == "replies" else "right")
    for form, rounds in found.items():
        name, ratio = "none", ""
        if form is not None:
            name = f"top-{form}" if form else "without top-k"
            pairs = [mine.learn_s / none.learn_s for mine, none in zip(rounds, found[None], strict=True)]
            ratio = "{:.3f} [{:.3f}, {:.3f}]".format(trimmed(pairs), *interval(pairs))
        rate = f"{statistics.mean(one.tps for one in rounds):,.0f}"
        share = f"{statistics.mean(one.core for one in rounds):.1%}"
        table.add_row(name, rate, share, f"{trimmed([one.learn_s for one in rounds]):.4f}", ratio)
    return table


def trimmed(values: Sequence[float]) -> float:
    """Mean without the lowest and the highest fifth."""
    cut = len(values) // 5
    return statistics.mean(sorted(values)[cut : len(values) - cut])


def interval(values: Sequence[float], times: int = 500) -> tuple[float, float]:
    """95% of the trimmed mean, by resampling."""
    rng = random.Random(0)
    means = sorted(trimmed(rng.choices(values, k=len(values))) for _ in range(times))
    return means[times // 40], means[-times // 40]


if __name__ == "__main__":
    main()
