"""What one sees of a run: a line of progress per step, and a table at the end."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table

from megatron_jackpot.monitor.evaluations import evaluation_table
from megatron_jackpot.monitor.metrics import Row, read_metrics, series

SHOWN = {
    "reward/mean": ("reward", "{:.3f}"),
    "jackpot/acceptance": ("accept", "{:.3f}"),
    "kl/target_server": ("KL", "{:.4f}"),
    "rollout/tokens_per_s": ("tok/s", "{:.0f}"),
    "eval/policy_accuracy": ("policy", "{:.3f}"),
    "eval/actor_accuracy": ("actor", "{:.3f}"),
}
"""Metric -> (short name, format) of the progress line; an accuracy stays until the next evaluation."""

REPORTED = {
    "eval/policy_accuracy": ("policy accuracy", "{:.3f}", max),
    "eval/actor_accuracy": ("actor accuracy", "{:.3f}", max),
    "reward/mean": ("reward", "{:.3f}", max),
    "jackpot/acceptance": ("acceptance", "{:.3f}", max),
    "jackpot/z": ("Z", "{:.3f}", max),
    "kl/target_server": ("KL(policy||server)", "{:.4f}", min),
    "rollout/tokens_per_s": ("rollout tokens/s", "{:.0f}", max),
    "sync/server_version": ("weight version on the server", "{:.0f}", max),
}
"""Metric -> (title, format, which value is best) of the final table."""


PROGRESS_FILE = "progress.log"
"""The lines of progress in a run's folder, each with the time."""
PACE_STEPS = 20
"""Last steps behind seconds per step and the time left."""


class StepLogger:
    """Progress of rank 0: a rich bar on a terminal, else a plain line per step. Use as a context manager."""

    def __init__(
        self,
        num_steps: int,
        *,
        progress: bool = True,
        console: Console | None = None,
        first_step: int = 0,
        file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`first_step` is the number of steps already done, as after a resume; `file` gets every line too."""
        self.console = console or Console()
        self.num_steps, self.file, self._clock = num_steps, file, clock
        self._times = deque([(first_step, clock())], maxlen=PACE_STEPS + 1)
        self._accuracy: dict[str, float] = {}
        self._bar = None
        if progress and self.console.is_terminal:
            self._bar = Progress(
                # On a narrow terminal the metrics are cut, not the step.
                TextColumn(
                    "step {task.completed}/{task.total}", table_column=Column(no_wrap=True, min_width=12)
                ),
                BarColumn(bar_width=10),
                TextColumn("{task.fields[pace]}", table_column=Column(no_wrap=True, min_width=22)),
                TextColumn("{task.fields[line]}"),
                console=self.console,
            )
            self._task = self._bar.add_task("steps", total=num_steps, completed=first_step, line="", pace="")
            self._bar.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` counts from 1; 0 is the evaluation before the first step."""
        self._accuracy |= {name: value for name, value in metrics.items() if name.startswith("eval/")}
        line, pace = progress_line({**self._accuracy, **metrics}), self._pace(step)
        whole = "  ".join(filter(None, [f"step {step}/{self.num_steps}", pace, line]))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=line, pace=pace)
        else:
            self.print(whole)
        if self.file is not None:
            with suppress(OSError):  # A full disk must not end a run that only tells how far it is.
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')}  {whole}\n")

    def _pace(self, step: int) -> str:
        """'2.9 s/step, 3:20 left', evaluations and saves included; nothing before the first step's end."""
        if step <= self._times[-1][0]:
            self._times.clear()
        self._times.append((step, self._clock()))
        (before, began), (done, now) = self._times[0], self._times[-1]
        if done == before:
            return ""
        seconds = (now - began) / (done - before)
        left = round(seconds * (self.num_steps - done))
        hours = f"{left // 3600}:{left // 60 % 60:02}" if left >= 3600 else str(left // 60)
        return f"{seconds:.1f} s/step, {hours}:{left % 60:02} left"

    def print(self, message: str) -> None:
        """A line of its own, above the bar where there is one."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> "StepLogger":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def progress_line(metrics: Mapping[str, float]) -> str:
    """'reward 0.250  accept 0.913  KL 0.0210  tok/s 512', for the metrics that are there."""
    shown = [(name, *SHOWN[name]) for name in SHOWN if metrics.get(name) is not None]
    return "  ".join(f"{short} {form.format(metrics[name])}" for name, short, form in shown)


def final_rows(rows: list[Row]) -> list[tuple[str, str, str, str]]:
    """(metric, first, last, best) of each reported metric that was measured, and the time of all steps."""
    cells = []
    for name, (title, form, best) in REPORTED.items():
        values = series(rows, name)[1]
        if values:
            cells.append((title, *(form.format(value) for value in (values[0], values[-1], best(values)))))
    return [*cells, ("total time", "", f"{sum(series(rows, 'time/step')[1]):.1f} s", "")]


def final_table(rows: list[Row]) -> Table:
    """`final_rows` for a terminal."""
    table = Table(title=f"{max((row['step'] for row in rows), default=0)} steps")
    table.add_column("metric")
    for column in ("first", "last", "best"):
        table.add_column(column, justify="right")
    for cells in final_rows(rows):
        table.add_row(*cells)
    return table


def print_evaluations(rows: list[Row], console: Console | None = None) -> None:
    """What `megatron-jackpot evaluate` found."""
    heads, cells = evaluation_table(rows)
    table = Table(box=SIMPLE_HEAD)  # Lines between the columns would take what 80 letters have left.
    for head in heads:
        table.add_column(head, justify="left" if head in ("model", "set") else "right")
    for row in cells:
        table.add_row(*row)
    (console or Console()).print(table)


def print_report(folder: Path, console: Console | None = None) -> None:
    """The final table of a run folder."""
    (console or Console()).print(final_table(read_metrics(folder)))
