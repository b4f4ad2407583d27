"""Tables of what is finished of a stage: balanced blocks only, every arm shown, won or lost."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study_parts import stats
from benchmarks.study_parts.markdown import head, row
from benchmarks.study_parts.plan import Plan, Run, run_folder
from benchmarks.study_parts.runner import DONE, LINES, ORIGIN, difference, origin
from benchmarks.study_parts.spending import spending
from benchmarks.study_parts.symptoms import symptoms

WORTH, CLOSE = 0.02, 0.05
"""A smaller mean difference makes no arm better; an interval above -CLOSE is close to the reference."""
FEWEST = 3
"""Seeds of a verdict."""
POLICY, ACTOR = "eval/policy_accuracy", "eval/actor_accuracy"


@dataclass(frozen=True)
class Curve:
    """The evaluations of a finished run, [E]."""

    run: Run
    rows: list[dict[str, Any]]
    stale: list[str]
    """Which of code, settings and models have changed since."""

    def values(self, name: str = POLICY) -> list[float]:
        return [row[name] for row in self.rows if name in row]

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows if POLICY in row]

    @property
    def failed(self) -> bool:
        return any("failed" in row for row in self.rows)


@dataclass(frozen=True)
class Block:
    """What is compared at one mismatch: the same rates and seeds in every arm."""

    mismatch: str
    rates: list[float]
    seeds: list[int]
    warmups: list[int]
    curves: dict[str, dict[float, dict[int, Curve]]]
    """Arm -> rate -> seed -> its run."""

    def measured(self, arm: str, measure: str) -> np.ndarray:
        """[rates, U] of "last" or "area"."""
        return np.array([[_measure(self.curves[arm][r][s], measure) for s in self.seeds] for r in self.rates])

    def judged(self, arm: str, measure: str) -> tuple[np.ndarray, int]:
        """(measure [U] at the rate that is best, by "last", for the other units; the best rate's index)."""
        chosen, best = stats.cross_fitted(self.measured(arm, "last"))
        return self.measured(arm, measure)[chosen, np.arange(len(self.seeds))], best

    def rows(self, arm: str, rate: int) -> list[list[dict[str, Any]]]:
        """The lines of each seed at the rate of that index."""
        return [curve.rows for curve in self.curves[arm][self.rates[rate]].values()]


def _measure(curve: Curve, measure: str) -> float:
    return curve.values()[-1] if measure == "last" else stats.area(curve.steps, curve.values())


def finished(plan: Plan, folder: Path) -> list[Curve]:
    """Every run that is done."""
    found = []
    for run in plan.runs:
        place = run_folder(folder, run)
        if not (place / DONE).is_file():
            continue
        rows = [json.loads(line) for line in (place / LINES).read_text(encoding="utf-8").splitlines()]
        then = json.loads((place / ORIGIN).read_text(encoding="utf-8"))
        found.append(Curve(run, rows, difference(then, origin(plan, run, folder))))
    return found


def blocks(plan: Plan, curves: Sequence[Curve]) -> list[Block]:
    """Of each mismatch the seeds of which every arm is done at the plan's first rate, and the rates of which
    all of these are."""
    done = {(c.run.mismatch, c.run.lr, c.run.seed, c.run.arm): c for c in curves}
    made = []
    for mismatch in plan.mismatches:
        whole = {
            (lr, seed)
            for lr in plan.lrs
            for seed in plan.seeds
            if all((mismatch, lr, seed, arm) in done for arm in plan.arms)
        }
        seeds = [seed for seed in plan.seeds if (plan.lrs[0], seed) in whole]
        rates = [lr for lr in plan.lrs if seeds and all((lr, seed) in whole for seed in seeds)]
        if rates:
            by_arm = {
                arm: {lr: {seed: done[mismatch, lr, seed, arm] for seed in seeds} for lr in rates}
                for arm in plan.arms
            }
            made.append(Block(mismatch, rates, seeds, [seed % plan.warmups for seed in seeds], by_arm))
    return made


def write_report(plan: Plan, folder: Path) -> str:
    """Markdown of everything that is finished, under a heading of the second level; also into
    FOLDER/stage_X/report.md."""
    curves = finished(plan, folder)
    found = blocks(plan, curves)
    used = sum(len(block.rates) * len(block.seeds) * len(plan.arms) for block in found)
    lines = [f"## Stage {plan.stage}: {len(curves)} of {len(plan.runs)} runs", "", plan.question.strip(), ""]
    if used < len(plan.runs):
        lines += [
            f"NOT WHOLE: {used} runs form balanced blocks, {len(curves) - used} others are left out.",
            "",
        ]
    if stale := Counter(what for curve in curves for what in curve.stale):
        lines += [f"STALE: made with other {dict(stale)} (runs each) than this checkout has.", ""]
    commits = Counter(str(curve.rows[0]["commit"])[:12] for curve in curves)
    lines += [f"Commits: {dict(commits)}. Decision rule: {plan.decision.strip()}", ""]
    for block in found:
        lines += _tables(plan, block)
        lines += symptoms({arm: block.rows(arm, block.judged(arm, "last")[1]) for arm in plan.arms})
        if plan.samples is not None:
            lines += spending({arm: block.rows(arm, 0) for arm in plan.arms}, block.warmups, _against(plan))
    text = "\n".join(lines)
    (folder / f"stage_{plan.stage}" / "report.md").write_text(text + "\n", encoding="utf-8")
    return text


def put_into(document: Path, plan: Plan, text: str) -> None:
    """Replace what stands between the document's two marks of the stage. Raises ValueError without them."""
    begin, end = (f"<!-- stage {plan.stage}: {what} -->" for what in ("begin", "end"))
    before, found, rest = document.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(
            f"{document}: has no {begin} with a {end} after it. Write both where the report is to stand."
        )
    document.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")


def _tables(plan: Plan, block: Block) -> list[str]:
    rates = ", ".join(f"{rate:g}" for rate in block.rates)
    lines = [f"### Mismatch {block.mismatch}: seeds {block.seeds}, learning rates {rates}", ""]
    names = ("arm", "best lr", "last, mean [95%]", "lowest-highest", "area [95%]", "actor, last")
    lines += head((*names, "collapsed", "drawdown", "failed", "s a step"))
    for arm in plan.arms:
        last, best = block.judged(arm, "last")
        surface, _ = block.judged(arm, "area")
        at_best = list(block.curves[arm][block.rates[best]].values())
        actors = [curve.values(ACTOR)[-1] for curve in at_best if curve.values(ACTOR)]
        seconds = np.median([value for curve in at_best for value in curve.values("time/step")])
        cells = [
            arm,
            f"{block.rates[best]:g}",
            _interval(last, block.warmups),
            f"{last.min():.3f}-{last.max():.3f}",
            _interval(surface, block.warmups),
            f"{np.mean(actors):.3f}" if actors else "",
            f"{sum(stats.collapsed_at(curve.values()) is not None for curve in at_best)} of {len(at_best)}",
            f"{max(stats.drawdown(curve.values()) for curve in at_best):.3f}",
            str(sum(curve.failed for curve in at_best)),
            f"{seconds:.2f}",
        ]
        lines.append(row(cells))
    start = np.mean([curve.values()[0] for curve in block.curves[plan.reference][block.rates[0]].values()])
    lines += [
        "",
        f"At step 0 the policy has {start:.3f}. Paired differences of the accuracy at the last step:",
        "",
    ]
    lines += head(("arm", "against", "mean [95%]", "wins", "resolvable, 80% power", "verdict"))
    for one, other in _against(plan):
        gaps = block.judged(one, "last")[0] - block.judged(other, "last")[0]
        sd = float(gaps.std(ddof=1)) if len(gaps) > 1 else plan.assumed_sd
        smallest = stats.resolvable(sd, len(gaps))
        wins = f"{int((gaps > 0).sum())} of {len(gaps)}"
        found = verdict(gaps, block.warmups, smallest, close=other == plan.reference)
        lines.append(row((one, other, _interval(gaps, block.warmups), wins, f"{smallest:.3f}", found)))
    return [*lines, ""]


def _against(plan: Plan) -> list[tuple[str, str]]:
    """Every contrast of the plan, and every arm with the reference."""
    against = [(arm, plan.reference) for arm in plan.arms if arm != plan.reference]
    return [*dict.fromkeys([*plan.contrasts, *against])]


def verdict(gaps: np.ndarray, groups: Sequence[int], smallest: float, *, close: bool) -> str:
    """Better where the interval excludes 0 and the mean is worth it and resolvable; unresolved, it leans."""
    if len(gaps) < FEWEST:
        return "too few seeds"
    low, high = stats.bootstrap(gaps, groups)
    mean = float(gaps.mean())
    sign = "better" if mean > 0 else "worse"
    # Percentiles of a few seeds end at the extremes: what cannot be resolved cannot be excluded either.
    largest = max(abs(low), abs(high), smallest)
    if low * high > 0 and abs(mean) >= WORTH:
        found = sign if abs(mean) >= smallest else f"leans {sign}, unresolved; at most {largest:.3f}"
    else:
        found = f"no difference larger than {largest:.3f}"
    return f"{found}; {'close' if low > -CLOSE else 'not shown to be close'}" if close else found


def _interval(values: np.ndarray, warmups: Sequence[int]) -> str:
    if len(values) < 2:
        return f"{values.mean():.3f}"
    low, high = stats.bootstrap(values, warmups)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"
