"""What a reward returns: a number, or several by name, of which `score` is the reward."""

import math
import re
from collections.abc import Mapping
from numbers import Real

SCORE = "score"
"""Of several numbers that a reward returns, the reward."""
MOST_MEASURED = 32
"""Numbers beside it: each is a metric."""


def numbers_of(returned: object) -> tuple[float, dict[str, float]]:
    """The reward, and the other numbers by name where a mapping was returned; those are measured alone.

    Raises ValueError, whose text goes on after what was returned.
    """
    if not isinstance(returned, Mapping):
        return _finite(returned, ""), {}
    if SCORE not in returned:
        raise ValueError(f"whose keys have no '{SCORE}', which is the reward")
    measured = {name: _finite(one, f" under {name!r}") for name, one in returned.items() if name != SCORE}
    odd = [name for name in measured if not (isinstance(name, str) and re.fullmatch("[A-Za-z0-9_-]+", name))]
    if odd:
        raise ValueError(f"where {odd[0]!r} makes no metric: use letters, digits, '_' and '-'")
    if len(measured) > MOST_MEASURED:
        raise ValueError(f"of {len(measured)} numbers beside '{SCORE}', must be at most {MOST_MEASURED}")
    return _finite(returned[SCORE], f" under '{SCORE}'"), measured


def of_reward(name: str, measured: Mapping[str, float]) -> dict[str, float]:
    """What a reward measured, by its own name where there are several."""
    return {f"{name}/{key}" if name else key: value for key, value in measured.items()}


def _finite(value: object, where: str) -> float:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"not a finite float{where}")
    return float(value)
