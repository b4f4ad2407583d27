"""Curves of one or more runs in one picture."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_jackpot.monitor.metrics import Row, read_metrics, series

POLICY, ACTOR, CONTROL, OTHER = "tab:blue", "tab:orange", "tab:gray", "tab:green"
STYLES = ("-", "--", ":", "-.")
PANELS = (
    (
        "Held-out accuracy",
        {"eval/policy_accuracy": ("policy", POLICY), "eval/actor_accuracy": ("actor", ACTOR)},
    ),
    ("Reward of the rollouts", {"reward/mean": ("reward", OTHER)}),
    ("Acceptance and Z", {"jackpot/acceptance": ("acceptance", POLICY), "jackpot/z": ("Z", ACTOR)}),
    ("KL(policy || server), top-k", {"kl/target_server": ("KL", OTHER)}),
)
"""Title -> metric -> (label, colour). The colour is the metric, the line style the run."""


def plot_runs(folders: list[Path], out: Path, control: Path | None = None) -> Figure:
    """Write the picture of the runs' metrics to `out` (PNG) and return the figure."""
    runs = list(zip(_names(folders), map(read_metrics, folders), strict=True))
    figure = Figure(figsize=(11, 7), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, metrics) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for i, (name, rows) in enumerate(runs):
            _draw(
                axes,
                rows,
                metrics,
                style=STYLES[i % len(STYLES)],
                suffix=f" ({name})" if len(runs) > 1 else "",
            )
        if control is not None and "eval/policy_accuracy" in metrics:
            _draw(
                axes,
                read_metrics(control),
                {"eval/policy_accuracy": ("control", CONTROL)},
                style="-",
                suffix="",
            )
        _finish(axes, title)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return figure


def _draw(
    axes: Axes, rows: list[Row], metrics: dict[str, tuple[str, str]], *, style: str, suffix: str
) -> None:
    for metric, (label, color) in metrics.items():
        steps, values = series(rows, metric)
        if steps:
            marker = "o" if len(steps) < 25 else None
            axes.plot(
                steps,
                values,
                style,
                color=color,
                marker=marker,
                markersize=3,
                linewidth=1.6,
                label=label + suffix,
            )


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(fontsize=8, framealpha=0.8, edgecolor="none", ncols=2)
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color=CONTROL)


def _names(folders: list[Path]) -> list[str]:
    """The folders' own names where they differ, else with their parents."""
    paths = [Path(folder).resolve() for folder in folders]
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [f"{path.parent.name}/{path.name}" for path in paths]
