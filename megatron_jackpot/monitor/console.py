"""What one sees of a run: a line of progress per step, and a table at the end."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

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


class StepLogger:
    """Progress of rank 0: a rich bar on a terminal, else a plain line per step. Use as a context manager."""

    def __init__(
        self, num_steps: int, *, progress: bool = True, console: Console | None = None, first_step: int = 0
    ):
        """`first_step` is the number of steps already done, as after a resume."""
        self.console = console or Console()
        self.num_steps = num_steps
        self._accuracy: dict[str, float] = {}
        self._bar = None
        if progress and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[line]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("steps", total=num_steps, completed=first_step, line="")
            self._bar.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` counts from 1; 0 is the evaluation before the first step."""
        self._accuracy |= {name: value for name, value in metrics.items() if name.startswith("eval/")}
        line = progress_line({**self._accuracy, **metrics})
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=line)
        else:
            self.print(f"step {step}/{self.num_steps}  {line}")

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
    """(metric, first, last, best) of each reported metric, "-" where it was not measured, and the time of all
    steps."""
    cells = []
    for name, (title, form, best) in REPORTED.items():
        values = series(rows, name)[1]
        shown = (values[0], values[-1], best(values)) if values else ()
        cells.append((title, *([form.format(value) for value in shown] or ["-"] * 3)))
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


def print_report(folder: Path, console: Console | None = None) -> None:
    """The final table of a run folder."""
    (console or Console()).print(final_table(read_metrics(folder)))
