"""`plan`'s timeline beside runs on servers: told what one that takes turns measured, it predicts the others.

    python benchmarks/timeline.py RUN_AT_AHEAD_0 [RUN_AT_AHEAD_1 ...]

Medians over the steps after the first ones. The rates are those of the first run: a step's tokens over its
rollout's seconds, its learning, its push. So the first row shows that they add up, and the others what the
timeline is worth. It knows nothing of cores that servers and trainer share. Runs of one data-parallel leader.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_jackpot.config import Config, load_config
from megatron_jackpot.plan.timeline import Rates, Timeline, Work, simulate, slots_of

WARM = 2
"""Steps that are not counted, beside those in which the pipeline fills."""


@dataclass(frozen=True)
class Run:
    config: Config
    steps: int
    median: dict[str, float]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Raises ValueError for a run without enough steps."""
        config = load_config(folder / "config.yaml")
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if row["step"] > WARM + config.rollout.ahead]
        if not rows:
            raise ValueError(f"{folder}: no step after the first {WARM + config.rollout.ahead}. Run more.")
        names = ("time/step", "time/rollout", "time/sync", "idle/trainer", "idle/servers")
        names += ("rollout/response_tokens", "staleness/mean")
        return cls(config, len(rows), {n: statistics.median(row[n] for row in rows) for n in names})


def predicted(turns: Run, ahead: int) -> Timeline:
    """By the timeline, at the rates of a run that takes turns."""
    config, measured = turns.config, turns.median
    work = Work(
        sequences=config.rollout.prompts_per_step * config.rollout.samples_per_prompt,
        mean_tokens=measured["rollout/response_tokens"],
        spread=0.0,
        longest=float(config.rollout.max_new_tokens),
        group=config.rollout.samples_per_prompt,
    )
    tps = work.sequences * work.mean_tokens / measured["time/rollout"] / config.servers.num
    rates = Rates(
        stream_tps=tps,
        server_tps=tps,
        learn_s=measured["time/step"] - measured["time/rollout"] - measured["time/sync"],
        push_s=measured["time/sync"],
    )
    slots = slots_of(1, config.rollout.concurrency, config.servers.num)
    return simulate(work, rates, servers=config.servers.num, slots=slots, ahead=ahead)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("turns", type=Path, help="a run at rollout.ahead = 0")
    parser.add_argument("others", type=Path, nargs="*", help="the same at others")
    args = parser.parse_args()
    runs = [Run.read(folder) for folder in (args.turns, *args.others)]
    if runs[0].config.rollout.ahead:
        parser.error(f"{args.turns} was sampled ahead. Name a run at rollout.ahead = 0 first.")
    table = Table(title="measured / by the timeline")
    for column in ("ahead", "steps", "step s", "trainer idle", "servers idle", "age", "learning s", "push s"):
        table.add_column(column, justify="right")
    for run in runs:
        m, t = run.median, predicted(runs[0], run.config.rollout.ahead)
        table.add_row(
            str(run.config.rollout.ahead),
            str(run.steps),
            f"{m['time/step']:.2f} / {t.step_s:.2f}",
            f"{m['idle/trainer']:.0%} / {t.idle_trainer:.0%}",
            f"{m['idle/servers']:.0%} / {t.idle_servers:.0%}",
            f"{m['staleness/mean']:.2f} / {t.staleness_mean:.2f}",
            f"{m['time/step'] - m['time/rollout'] - m['time/sync']:.2f}",
            f"{m['time/sync']:.2f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
