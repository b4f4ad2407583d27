"""Which GPUs should train and which sample, and how far ahead: the timeline over what could be chosen."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from megatron_jackpot.config import Config
from megatron_jackpot.plan.formulas import Plan, make_plan
from megatron_jackpot.plan.seconds import Assumptions, total_seconds
from megatron_jackpot.plan.tables import memory_troubles
from megatron_jackpot.plan.timeline import Rates, Timeline, Work, simulate, slots_of

AHEADS = (0, 1, 2, 4)
PARTS = 16
"""Splits are tried in this many parts of all GPUs."""
MOST = 2048
"""Responses of a step that are simulated; of more, this many on as many fewer servers."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a benchmark of the servers and a run have shown."""

    server_tps: float
    stream_tps: float
    push_s: float
    spread: float


@dataclass(frozen=True)
class Choice:
    """A split and what it gives. Example: 32 training GPUs, 32 servers, ahead 1."""

    trainers: int
    servers: int
    ahead: int
    timeline: Timeline


def choose(plan: Plan, servers: int, ahead: int, assumed: Assumptions, measured: Measured) -> Choice:
    """What `servers` give a plan's trainers."""
    rollout = plan.config.rollout
    longest = float(rollout.max_new_tokens)
    fewer = max(1, min(servers, -(-plan.sequences // MOST)))
    work = Work(
        sequences=max(1, rollout.prompts_per_step // fewer) * rollout.samples_per_prompt,
        mean_tokens=plan.mean_tokens * longest / plan.longest,
        spread=measured.spread,
        longest=longest,
        group=rollout.samples_per_prompt,
    )
    rates = Rates(
        stream_tps=measured.stream_tps,
        server_tps=measured.server_tps,
        learn_s=total_seconds(plan, assumed),
        push_s=measured.push_s,
    )
    slots = slots_of(plan.dp, rollout.concurrency, servers)
    found = simulate(work, rates, servers=max(1, servers // fewer), slots=slots, ahead=ahead)
    return Choice(plan.gpus, servers, ahead, found)


def splits(config: Config, gpus: int, assumed: Assumptions) -> Iterator[tuple[Plan, int]]:
    """(plan of the training GPUs, servers on the others) of every split of `gpus` that fits their memory."""
    one = config.parallel.tp * config.parallel.pp * config.parallel.cp
    most = one * config.rollout.prompts_per_step
    tried = {gpus * part // PARTS // one * one for part in range(1, PARTS)}
    for trainers in sorted(trainers for trainers in tried if 0 < trainers <= most):
        servers = (gpus - trainers) // config.servers.tp
        plan = make_plan(config, trainers, assumed.mean_tokens)
        if servers and not memory_troubles(plan):
            yield plan, servers


def show_timeline(
    plan: Plan, assumed: Assumptions, measured: Measured, console: Console | None = None
) -> None:
    """Print the plan's own split at some `ahead`, and of each the best split of as many GPUs."""
    console = console or Console()
    gpus = plan.gpus + plan.num_servers * plan.config.servers.tp
    mine = [choose(plan, plan.num_servers, ahead, assumed, measured) for ahead in AHEADS]
    console.print(_table("This split", mine))
    tried = list(splits(plan.config, gpus, assumed))
    if not tried:
        return
    best = [
        min((choose(p, n, ahead, assumed, measured) for p, n in tried), key=lambda c: c.timeline.step_s)
        for ahead in AHEADS
    ]
    console.print(_table(f"The best of {len(tried)} splits of {gpus} GPUs", best))


def _table(title: str, choices: list[Choice]) -> Table:
    table = Table(title=title)
    for column in ("train", "servers", "ahead", "step s", "steps/h", "trainer idle", "servers idle"):
        table.add_column(column, justify="right")
    for column in ("age", "oldest"):
        table.add_column(column, justify="right")
    for c in choices:
        t = c.timeline
        numbers = (
            f"{c.trainers}",
            f"{c.servers}",
            f"{c.ahead}",
            f"{t.step_s:.1f}",
            f"{t.steps_per_hour:.1f}",
        )
        idle = (f"{t.idle_trainer:.0%}", f"{t.idle_servers:.0%}")
        table.add_row(*numbers, *idle, f"{t.staleness_mean:.2f}", f"{t.staleness_max}")
    return table
