"""What benchmarks/ahead.sh ran, in Markdown and as FOLDER/ahead.png.

python benchmarks/ahead_table.py FOLDER SEED [SEED ...]
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from megatron_jackpot.monitor.metrics import read_metrics, series

ARMS, AHEAD = ("none", "tis", "jackpot"), (0, 4)
HEAD = (
    *("correction", "ahead", "policy: start", "end, mean", "by seed", "deepest fall", "actor: end"),
    *("acceptance", "staleness, mean and largest", "end - in turn, by seed", "mean"),
)


def rows_of(folder: Path, arm: str, ahead: int, seeds: list[int]) -> list[list[dict[str, Any]]]:
    return [read_metrics(folder / f"{arm}-{ahead}-seed{seed}") for seed in seeds]


def curves(runs: list[list[dict[str, Any]]], name: str) -> np.ndarray:
    """[seeds, evaluations]."""
    return np.array([series(rows, name)[1] for rows in runs])


def cells(folder: Path, arm: str, ahead: int, seeds: list[int]) -> list[str]:
    runs = rows_of(folder, arm, ahead, seeds)
    policy = curves(runs, "eval/policy_accuracy")
    stale = [series(rows, "staleness/mean")[1][-1] for rows in runs]
    oldest = [max(series(rows, "staleness/max")[1]) for rows in runs]
    acceptance = ""
    if arm == "jackpot":
        last = [np.mean(series(rows, "jackpot/acceptance")[1][-10:]) for rows in runs]
        acceptance = f"{min(last):.2f}-{max(last):.2f}"
    differences = mean = ""
    if ahead:
        in_turn = curves(rows_of(folder, arm, 0, seeds), "eval/policy_accuracy")
        apart = policy[:, -1] - in_turn[:, -1]
        differences, mean = ", ".join(f"{one:+.3f}" for one in apart), f"{apart.mean():+.3f}"
    return [
        *(arm, str(ahead), f"{policy[:, 0].mean():.3f}", f"{policy[:, -1].mean():.3f}"),
        ", ".join(f"{end:.3f}" for end in policy[:, -1]),
        f"{(np.maximum.accumulate(policy, 1) - policy).max():.3f}",
        f"{curves(runs, 'eval/actor_accuracy')[:, -1].mean():.3f}",
        *(acceptance, f"{np.mean(stale):.1f}, {max(oldest):.0f}", differences, mean),
    ]


def draw(folder: Path, seeds: list[int]) -> None:
    """A panel for each correction: the seeds' mean, in a band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(ARMS), figsize=(11, 3.6), sharey=True, layout="constrained")
    for arm, panel in zip(ARMS, panels, strict=True):
        for ahead, colour in zip(AHEAD, ("tab:blue", "tab:orange"), strict=True):
            runs = rows_of(folder, arm, ahead, seeds)
            steps, values = series(runs[0], "eval/policy_accuracy")[0], curves(runs, "eval/policy_accuracy")
            panel.plot(steps, values.mean(0), color=colour, label=f"rollout.ahead={ahead}")
            panel.fill_between(steps, values.min(0), values.max(0), alpha=0.15, color=colour)
        panel.set(xlabel="step", title=arm)
    panels[0].set(ylabel="policy's accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(AHEAD))
    figure.savefig(folder / "ahead.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("seeds", nargs="+", type=int, metavar="SEED")
    given = parser.parse_args()
    table = [cells(given.folder, arm, ahead, given.seeds) for arm in ARMS for ahead in AHEAD]
    for line in (HEAD, ["---"] * len(HEAD), *table):
        print(f"| {' | '.join(line)} |")
    draw(given.folder, given.seeds)


if __name__ == "__main__":
    main()
