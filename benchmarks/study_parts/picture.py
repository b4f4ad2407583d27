"""Pictures of a stage: curves with bands, survival, and accuracy against what the steps would cost."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cost
from benchmarks.study_parts import stats
from benchmarks.study_parts.plan import Plan
from benchmarks.study_parts.report import FEWEST, Block, blocks, finished

PAIR = "Qwen3 1.7B -> 8B"
PRICED = (128, 16)
"""Sequences that a GPU decodes at once: cost.py's default, and where decoding weighs more."""
COLOURS = {
    "on_policy": "black",
    "none": "tab:red",
    "tis": "tab:orange",
    "icepop": "tab:green",
    "jackpot_paper": "tab:purple",
    "jackpot_recommended": "tab:blue",
}


def draw(plan: Plan, folder: Path) -> list[Path]:
    """MISMATCH.png in the stage's folder, of each with a whole block; cost.png of those with some seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    place, paths = folder / f"stage_{plan.stage}", []
    found = blocks(plan, finished(plan, folder))
    for block in found:
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(11, 4.2), width_ratios=(2, 1), layout="constrained"
        )
        for arm in plan.arms:
            values, steps, rate = _curves(block, arm)
            if not len(values):
                continue
            colour = _band(left, steps, values, arm, f"{arm}, lr {rate:g}")
            right.step(steps, stats.survival(values.tolist()), where="post", color=colour)
        left.set(xlabel="step", ylabel="share of held-out items right", title=f"mismatch {block.mismatch}")
        right.set(xlabel="step", ylabel="share of runs not collapsed", ylim=(0, 1.05))
        left.legend(fontsize=8)
        paths.append(_save(figure, place / f"{block.mismatch}.png"))
    enough = [block for block in found if len(block.seeds) >= FEWEST]
    if enough and all(_method(arm) is not None for arm in plan.arms):
        paths.append(_draw_costs(plan, enough, place / "cost.png"))
    return paths


def _draw_costs(plan: Plan, found: list[Block], path: Path) -> Path:
    """A row for each mismatch: by steps, and by GPU-seconds at each of PRICED, in on-policy steps' worth."""
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        len(found),
        1 + len(PRICED),
        figsize=(13, 3.8 * len(found)),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for block, panels in zip(found, rows, strict=True):
        for arm in plan.arms:
            values, steps, _ = _curves(block, arm)
            if not len(values):
                continue
            _band(panels[0], steps, values, arm, arm)
            for panel, concurrency in zip(panels[1:], PRICED, strict=True):
                _band(panel, np.array(steps) * price(arm, concurrency), values, arm, arm)
        seeds = f"{len(block.seeds)} seeds"
        panels[0].set(
            ylabel="share of held-out items right", title=f"{block.mismatch}, {seeds}", xlabel="step"
        )
        for panel, concurrency in zip(panels[1:], PRICED, strict=True):
            panel.set(title=f"priced as {PAIR}, {concurrency} at once", xlabel="cost, in steps of on-policy")
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(plan.arms))
    return _save(figure, path)


def price(arm: str, concurrency: int) -> float:
    """GPU-seconds of an arm's step over on-policy's, overlapped, by cost.py for PAIR.

    Raises ValueError for an arm without a price.
    """
    method = _method(arm)
    if method is None:
        raise ValueError(f"arm {arm!r}: none of {[known.name for known in cost.METHODS]}. Name it after one.")
    load = cost.Load(prompt=256, response=4096, sequences=512, samples=8, concurrency=concurrency)
    actor, policy = cost.PAIRS[PAIR]
    own, base = (cost.step_cost(m, policy, actor, load, cost.Hardware()) for m in (method, cost.METHODS[0]))
    return cost.balanced(own, 8.0)[1] / cost.balanced(base, 8.0)[1]


def _method(arm: str) -> cost.Method | None:
    """cost.py's method of that name, or of what stands before the preset."""
    known = {method.name: method for method in cost.METHODS}
    return known.get(arm, known.get(arm.partition("_")[0]))


def _curves(block: Block, arm: str) -> tuple[np.ndarray, list[int], float]:
    """(accuracy [U, E] of the runs that did not fail, at the arm's best rate; steps [E]; the rate)."""
    rate = block.rates[block.judged(arm, "last")[1]]
    curves = [curve for curve in block.curves[arm][rate].values() if not curve.failed]
    return np.array([curve.values() for curve in curves]), curves[0].steps if curves else [], rate


def _band(panel: Any, x: Any, values: np.ndarray, arm: str, label: str) -> Any:
    """The mean, in a band from the lowest to the highest seed; its colour."""
    (line,) = panel.plot(x, values.mean(0), label=label, color=COLOURS.get(arm))
    panel.fill_between(x, values.min(0), values.max(0), alpha=0.1, color=line.get_color())
    return line.get_color()


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
