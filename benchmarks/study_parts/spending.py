"""What arms that end at the same number of rollouts made of them: tokens, seconds, avg and pass@8."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.study_parts import stats
from benchmarks.study_parts.markdown import head, row

JUDGED = ("eval/policy_exact", "eval/policy_avg@8", "eval/policy_pass@8")
SHOWN = (
    *("steps", "rollouts", "equal", "tokens trained", "sampling s", "other s", "other s a step"),
    *("exact", "avg@8", "pass@8"),
)
RATIOS, GAPS = ("tokens trained", "sampling s", "other s"), ("exact", "avg@8", "pass@8")


def spent_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """A finished run's account, from its evaluations."""
    rows = [row for row in rows if JUDGED[0] in row]
    last = rows[-1]
    steps, other = last["step"], last["time/spent"] - last["time/sampling"]
    # A mean over the steps since the line before.
    windows = np.diff([row["step"] for row in rows])
    equal = [row["rollout/equal_rewards"] for row in rows[1:]]
    account = {
        "steps": last["step"],
        "rollouts": last["spent/samples"],
        "equal": float(np.dot(windows, equal) / windows.sum()),
        "tokens trained": last["spent/tokens"],
        "sampling s": last["time/sampling"],
        "other s": other,
        "other s a step": other / steps,
    }
    return account | {name.rpartition("_")[2]: last[name] for name in JUDGED}


def spending(
    runs: dict[str, list[list[dict[str, Any]]]],
    warmups: Sequence[int],
    contrasts: Sequence[tuple[str, str]],
) -> list[str]:
    """Markdown: means over seeds of each arm, then paired differences. `runs`: arm -> each seed's lines."""
    found = {arm: [spent_of(rows) for rows in seeds] for arm, seeds in runs.items()}
    lines = ["After as many rollouts, means over the seeds (lowest-highest); processor seconds:", ""]
    lines += head(["arm", *SHOWN])
    for arm, accounts in found.items():
        lines.append(row([arm, *(_cell(name, [one[name] for one in accounts]) for name in SHOWN)]))
    heads = ["arm", "against", *RATIOS, *GAPS]
    lines += ["", "Paired: ratios, and differences with 95% by bootstrap and wins:", ""]
    lines += head(heads)
    for one, other in contrasts:
        pairs = list(zip(found[one], found[other], strict=True))
        ratios = [np.mean([a[name] / b[name] for a, b in pairs]) for name in RATIOS]
        gaps = [np.array([a[name] - b[name] for a, b in pairs]) for name in GAPS]
        cells = [f"{ratio:.2f}" for ratio in ratios] + [_gap(gap, warmups) for gap in gaps]
        lines.append(row([one, other, *cells]))
    return [*lines, ""]


def _cell(name: str, values: Sequence[float]) -> str:
    digits = 0 if name in SHOWN[:2] + RATIOS else 3
    low, mean, high = min(values), float(np.mean(values)), max(values)
    spread = "" if low == high else f" ({low:.{digits}f}-{high:.{digits}f})"
    return f"{mean:.{digits}f}{spread}"


def _gap(gaps: np.ndarray, warmups: Sequence[int]) -> str:
    low, high = stats.bootstrap(gaps, warmups)
    return f"{gaps.mean():+.3f} [{low:+.3f}, {high:+.3f}], {int((gaps > 0).sum())} of {len(gaps)}"
