"""Curves of one or more runs in one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from megatron_jackpot.monitor.differences import labels
from megatron_jackpot.monitor.metrics import Row, read_metrics, series

CONTROL = "tab:gray"
COLORS = (
    *("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple"),
    *("tab:brown", "tab:pink", "tab:olive", "tab:cyan", "black"),
)
FIRST, SECOND = "-", "--"
PANELS = (
    (
        "Held-out accuracy: policy, actor dashed",
        {"eval/policy_accuracy": FIRST, "eval/actor_accuracy": SECOND},
    ),
    ("Reward of the rollouts", {"reward/mean": FIRST}),
    ("Acceptance, Z dashed", {"jackpot/acceptance": FIRST, "jackpot/z": SECOND}),
    ("KL(policy || server), top-k", {"kl/target_server": FIRST}),
)
"""Title -> metric -> line style. The style is the metric, the colour the run."""


def plot_runs(folders: Sequence[Path], out: Path, control: Path | None = None) -> Figure:
    """Write the picture of the runs' metrics to `out` (PNG) and return the figure.

    Raises ValueError for more runs than there are colours.
    """
    if len(folders) > len(COLORS):
        raise ValueError(f"{len(folders)} runs: there are {len(COLORS)} colours. Plot fewer at a time.")
    runs = list(zip(COLORS, map(read_metrics, folders), strict=False))
    handles = [
        Line2D([], [], color=color, label=name) for color, name in zip(COLORS, labels(folders), strict=False)
    ]
    figure = Figure(figsize=(11, 7.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, metrics) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for color, rows in runs:
            _draw(axes, rows, metrics, color)
        if control is not None and "eval/policy_accuracy" in metrics:
            _draw(axes, read_metrics(control), {"eval/policy_accuracy": FIRST}, CONTROL)
        _finish(axes, title)
    if control is not None:
        handles.append(Line2D([], [], color=CONTROL, label="control"))
    # Below the panels: nothing of a curve is hidden.
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return figure


def _draw(axes: Axes, rows: list[Row], metrics: Mapping[str, str], color: str) -> None:
    for metric, style in metrics.items():
        steps, values = series(rows, metric)
        if steps:
            marker = "o" if len(steps) < 25 else None
            axes.plot(steps, values, style, color=color, marker=marker, markersize=3, linewidth=1.4)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color=CONTROL)
