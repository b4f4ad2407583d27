"""What a stage's logs show of each arm at its beginning and its end: where to look for what fails first."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.study_parts.markdown import head, row

LOGGED = {
    "KL(target, server)": "kl/target_server",
    "ESS": "weight/ess",
    "expected acceptance": "jackpot/acceptance_expected",
    "Z, 5% quantile": "jackpot/z_p05",
    "clipped": "objective/clip_fraction",
    "grad norm": "grad_norm/policy",
}
"""Heading -> metric, of which a line has the mean over the steps since the line before."""
LEAD = "actor - policy"
"""The actor's accuracy less the policy's: a sampler ahead of its pupil or behind it."""


def symptoms(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> list[str]:
    """Markdown; `runs`: arm -> the lines of each seed. Means over seeds, first window -> last."""
    lines = ["What the logs show, means of the first window of steps -> of the last:", ""]
    lines += head(["arm", *LOGGED, LEAD])
    for arm, seeds in runs.items():
        cells = [arm, *(_change([_ends(rows, name) for rows in seeds]) for name in LOGGED.values())]
        cells.append(_change([_leads(rows) for rows in seeds]))
        lines.append(row(cells))
    return [*lines, ""]


def _ends(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float] | None:
    values = [row[name] for row in rows if name in row]
    return (values[0], values[-1]) if values else None


def _leads(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Of the first line after step 0 and of the last."""
    actor, policy = "eval/actor_accuracy", "eval/policy_accuracy"
    leads = [row[actor] - row[policy] for row in rows if actor in row and row["step"] > 0]
    return (leads[0], leads[-1]) if leads else None


def _change(ends: Sequence[tuple[float, float] | None]) -> str:
    """Example: '0.052 -> 0.084'; empty where no run has it."""
    there = [one for one in ends if one is not None]
    if not there:
        return ""
    first, last = np.mean(there, axis=0)
    return f"{first:.3f} -> {last:.3f}"
