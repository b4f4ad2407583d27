"""The curves of the page: which metrics share a picture, and their points."""

import math
import re
from collections.abc import Iterable
from statistics import median

from megatron_jackpot.monitor.metrics import METRICS, Row, series

MOST_POINTS = 1000
"""Rows of a run on the page; of a longer run every k-th, and all with an evaluation."""
LARGEST = 1e30
"""Larger numbers are drawn as missing: the canvas computes in floats too."""

EVALUATION = r"eval/(?:(.+?)/)?\w+_(?:accuracy|pass@\d+)(?:/(.+))?"
"""An accuracy of a named set or of a task, and pass@k."""

Chart = dict[str, object]

CHARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Held-out accuracy", "", ("eval/policy_accuracy", "eval/actor_accuracy")),
    ("Reward of the rollouts", "", ("reward/mean", "reward/correct")),
    ("Loss", "", ("loss/policy", "loss/actor")),
    ("Gradient norm", "before clipping", ("grad_norm/policy", "grad_norm/actor")),
    ("Learning rate", "", ("lr/policy", "lr/actor")),
    ("Acceptance and Z", "", ("jackpot/acceptance", "jackpot/z", "is/kept")),
    ("KL(policy || server)", "a lower bound, over the candidates", ("kl/target_server",)),
    ("Effective sample size", "share of the tokens", ("weight/ess",)),
    ("Response length", "tokens", ("rollout/response_tokens",)),
    (
        "Shares of the rollouts",
        "cut at the limit; groups of equal rewards; rewards that failed",
        ("rollout/truncated", "rollout/equal_rewards", "reward/timed_out", "reward/crashed"),
    ),
    ("Seconds of a step", "", ("time/step", "time/rollout", "time/score", "time/update_policy")),
    ("Tokens per second", "rollout; trained", ("rollout/tokens_per_s", "train/tokens_per_s")),
    ("Model FLOPs utilisation", "of the trainer's GPUs over the whole step", ("train/mfu",)),
    ("Memory", "GiB; largest rank, each server", ("memory/trainer_gib", "memory/server_gib")),
)
"""Title, explanation, metrics. What no run has measured is left out."""

PHASES = ("rollout", "make_room", "score", "correct", "update_policy", "update_actor", "sync", "save")
"""The parts of a step in their order; what is left of time/step is "other"."""


def points(rows: list[Row]) -> dict[str, tuple[list[int], list[float | None]]]:
    """Metric -> (steps, values) of the rows that are drawn; a value that is not finite is None."""
    known = {row["step"]: row for row in rows}
    every = math.ceil(len(known) / MOST_POINTS) or 1
    drawn = [
        row
        for place, (_, row) in enumerate(sorted(known.items()))
        if place % every == 0 or place == len(known) - 1 or any(name.startswith("eval/") for name in row)
    ]
    found: dict[str, tuple[list[int], list[float | None]]] = {}
    for row in drawn:
        for name, value in row.items():
            if name != "step" and (value is None or isinstance(value, (int, float))):
                steps, values = found.setdefault(str(name), ([], []))
                steps.append(row["step"])
                values.append(number(value))
    return found


def with_rates(rows: list[Row], flops_per_token: float | None, peak: float | None) -> list[Row]:
    """The rows with tokens/s of the whole step, and MFU where the model's FLOPs and the peak are known."""
    more = []
    for row in rows:
        tokens, seconds = row.get("train/tokens"), row.get("time/step")
        rates = {}
        if tokens and seconds:
            rates["train/tokens_per_s"] = tokens / seconds
            if flops_per_token and peak:
                rates["train/mfu"] = flops_per_token * tokens / seconds / peak
        more.append({**row, **rates})
    return more


def charts(measured: Iterable[str]) -> list[Chart]:
    """Those with a metric that some run has, in order; then one for each evaluation of a set or task."""
    here = set(measured)
    shown = [
        {"title": title, "help": help, "metrics": [name for name in names if name in here]}
        for title, help, names in CHARTS
    ]
    usual = {name for _, _, names in CHARTS for name in names}
    sets: dict[str, list[str]] = {}
    # Of the two models the policy first, in the colour that it has everywhere.
    for name in sorted(here - usual, key=lambda name: ("policy_" not in name, name)):
        if parts := re.fullmatch(EVALUATION, name, re.DOTALL):
            sets.setdefault(", ".join(filter(None, parts.groups())) or "pass@k", []).append(name)
    shown += [{"title": f"Evaluation: {what}", "help": "", "metrics": some} for what, some in sets.items()]
    return [chart for chart in shown if chart["metrics"]]


def phases(rows: list[Row]) -> list[tuple[str, float]]:
    """Median seconds of each part of a step, and of the rest."""
    whole = series(rows, "time/step")[1]
    if not whole:
        return []
    parts = [(name, series(rows, f"time/{name}")[1]) for name in PHASES]
    shown = [(name, median(values)) for name, values in parts if values]
    # A save comes after the step's own clock has stopped.
    rest = median(whole) - sum(seconds for name, seconds in shown if name != "save")
    return [*shown, ("other", max(0.0, rest))]


def meanings(measured: Iterable[str]) -> dict[str, str]:
    return {name: METRICS[name] for name in measured if name in METRICS}


def number(value: object, digits: int = 5) -> float | None:
    """Rounded to so many significant digits; None for what cannot be drawn."""
    if not isinstance(value, (int, float)) or not abs(value) < LARGEST:
        return None
    return float(f"{value:.{digits}g}")
