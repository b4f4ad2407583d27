"""What is made of finished runs: intervals, the smallest difference a design resolves, survival.

Shapes: U units (a seed with its warm-up), E evaluations of a run, N draws of a bootstrap.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

PATIENCE = 3
"""Evaluations in a row under half the running maximum that make a collapse."""
DRAWS = 4000


def area(steps: Sequence[float], values: Sequence[float]) -> float:
    """Mean height of the curve: the trapezoids' area over the steps' range."""
    x, y = np.asarray(steps, float), np.asarray(values, float)
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (x[-1] - x[0]))


def bootstrap(
    values: np.ndarray, groups: Sequence[int], *, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Interval of the mean of `values` [U]: groups (warm-ups) are drawn anew, then units within each.

    Percentiles of few units are too narrow: of three, the interval ends at or inside the extremes.
    """
    rng = np.random.default_rng(seed)
    members = np.asarray(groups)
    rows = [values[members == name] for name in sorted(set(groups))]
    chosen = rng.integers(len(rows), size=(draws, len(rows)))
    sums, sizes = np.empty(chosen.shape), np.empty(chosen.shape)
    for index, row in enumerate(rows):
        here = chosen == index
        sums[here] = rng.choice(row, size=(int(here.sum()), len(row))).sum(1)
        sizes[here] = len(row)
    means = sums.sum(1) / sizes.sum(1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def resolvable(sd: float, units: int, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest mean of paired differences that a two-sided t test on `units` pairs finds with `power`:
    (t[1 - alpha / 2] + t[power]) sd / sqrt(units). Infinite for fewer than two."""
    if units < 2:
        return math.inf
    freedom = units - 1
    return (t_quantile(1 - alpha / 2, freedom) + t_quantile(power, freedom)) * sd / math.sqrt(units)


def t_quantile(probability: float, freedom: int) -> float:
    """Of Student's t, by bisection on its distribution; for probabilities in [0.5, 1)."""
    return _bisect(lambda t: _t_distribution(t, freedom) - probability, 0.0, 1e4)


def _t_distribution(t: float, freedom: int) -> float:
    """Closed forms in theta = atan(t / sqrt(freedom)): Abramowitz and Stegun 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    if odd:
        both = 2 / math.pi * (theta + (sine * total if freedom > 1 else 0.0))
    else:
        both = sine * total
    return 0.5 + both / 2


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return low


def drawdown(values: Sequence[float]) -> float:
    """How far the curve fell below its own running maximum."""
    y = np.asarray(values, float)
    return float((np.maximum.accumulate(y) - y).max())


def collapsed_at(values: Sequence[float]) -> int | None:
    """Index of the evaluation that completes a collapse; None where there is none."""
    y = np.asarray(values, float)
    under = 0
    for index, low in enumerate(y < np.maximum.accumulate(y) / 2):
        under = under + 1 if low else 0
        if under == PATIENCE:
            return index
    return None


def survival(curves: Sequence[Sequence[float]]) -> list[float]:
    """Share of the runs that have not collapsed by each evaluation; all curves are equally long."""
    ends = [collapsed_at(curve) for curve in curves]
    return [sum(end is None or end > index for end in ends) / len(ends) for index in range(len(curves[0]))]


def cross_fitted(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Indices, of `values` [rates, U]: (each unit's, the best rate for the others; the best rate for all).

    Nobody chooses by what it is then judged by; a single unit has no others and chooses itself.
    """
    total = values.sum(1, keepdims=True)
    others = total - values if values.shape[1] > 1 else values
    return others.argmax(0), int(total.argmax())
