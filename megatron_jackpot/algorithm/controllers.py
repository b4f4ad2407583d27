"""Settings that follow a measurement: lam a wanted acceptance, the weight of a loss's term what it moves
(lambda_distill a wanted KL(policy || actor), an entropy bonus a wanted entropy).

A controller measures one batch and moves the setting for the next.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from megatron_jackpot.algorithm.obrs import (
    LAM_MAX,
    LAM_MIN,
    check_acceptance,
    check_bounds,
    lambda_for_acceptance,
)
from megatron_jackpot.algorithm.tokens import SumOverBatch

ERROR_LIMIT = 2.0
"""Largest |log(measured / set-point)| that counts: one wild batch moves the weight only so far."""


@dataclass
class TargetAcceptance:
    """Keeps the mean acceptance near `acceptance` by moving lam, one batch behind."""

    acceptance: float
    """Wanted mean of min(1, r / lam) over the tokens, in (0, 1)."""
    lam: float
    """lam of the first batch, later of the next one."""
    lam_min: float = LAM_MIN
    """Least lam."""
    lam_max: float = LAM_MAX
    """Largest lam."""

    def __post_init__(self) -> None:
        check_acceptance(self.acceptance)
        check_bounds("lam", self.lam_min, self.lam_max)
        _check_within("lam", self.lam, self.lam_min, self.lam_max)

    def update(self, log_ratio_T: Tensor, mask_T: Tensor, sum_over_batch: SumOverBatch) -> float:
        """lam for the next batch, from log(p_target / q) of this one; kept where no token counts.

        Calls `sum_over_batch` once.
        """
        self.lam = lambda_for_acceptance(
            log_ratio_T,
            mask_T,
            self.acceptance,
            sum_over_batch,
            lam_min=self.lam_min,
            lam_max=self.lam_max,
            fallback=self.lam,
        )
        return self.lam

    def state_dict(self) -> dict[str, float]:
        return {"lam": self.lam}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Raises ValueError for wrong keys; a lam outside the present bounds becomes the nearer one."""
        (lam,) = _loaded(state, ["lam"], "TargetAcceptance")
        self.lam = min(max(lam, self.lam_min), self.lam_max)


@dataclass
class SteeredWeight:
    """PI control of a weight in log space: log weight = integral + gain_p * e, e = log(measured / wanted), or
    -e where the term raises what is measured.

    integral += gain_i * e per batch. It starts at log weight and never leaves the bounds, so it does not wind
    up: the weight leaves a bound with the first error of the other sign.
    """

    wanted: float = 0.1
    """Set-point of what is measured, which the term lowers or raises."""
    weight: float = 1.0
    """From where it is moved, later what it was moved to."""
    term: Literal["lowers", "raises"] = "lowers"
    """What the term does to the measurement: a penalty of a KL lowers it, an entropy bonus raises it."""
    gain_p: float = 0.2
    """Twice what is wanted raises the weight by 2^gain_p as long as it lasts."""
    gain_i: float = 0.02
    """Twice what is wanted raises the weight by 2^gain_i per batch, for good."""
    weight_min: float = 1e-4
    """Least weight."""
    weight_max: float = 100.0
    """Largest weight."""
    integral: float = field(init=False)
    """Log of the weight without its proportional part."""

    def __post_init__(self) -> None:
        if not 0 < self.wanted < math.inf:
            raise ValueError(f"wanted = {self.wanted}: must be a finite number > 0. Use 0.1.")
        for name, gain, usual in (("gain_p", self.gain_p, 0.2), ("gain_i", self.gain_i, 0.02)):
            if not 0 <= gain < math.inf:
                raise ValueError(f"{name} = {gain}: must be a finite number >= 0. Use {usual}.")
        check_bounds("weight", self.weight_min, self.weight_max)
        _check_within("weight", self.weight, self.weight_min, self.weight_max)
        self.integral = math.log(self.weight)

    def update(self, measured: float) -> float:
        """The weight after a measurement; NaN, where nothing was measured, changes nothing."""
        if math.isnan(measured):
            return self.weight
        floor, ceiling = (self.wanted * math.exp(sign * ERROR_LIMIT) for sign in (-1, 1))
        error = math.log(min(max(measured, floor), ceiling) / self.wanted)
        error = error if self.term == "lowers" else -error
        self.integral = self._bounded(self.integral + self.gain_i * error)
        self.weight = self._weight(self.integral + self.gain_p * error)
        return self.weight

    def state_dict(self) -> dict[str, float]:
        return {"weight": self.weight, "integral": self.integral}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Raises ValueError for wrong keys; what lies outside the present bounds becomes the nearer one."""
        weight, integral = _loaded(state, ["weight", "integral"], "SteeredWeight")
        self.weight = min(max(weight, self.weight_min), self.weight_max)
        self.integral = self._bounded(integral)

    def _bounded(self, log_weight: float) -> float:
        return min(max(log_weight, math.log(self.weight_min)), math.log(self.weight_max))

    def _weight(self, log_weight: float) -> float:
        """Bounded after exp as well, which may round past a bound."""
        return min(max(math.exp(self._bounded(log_weight)), self.weight_min), self.weight_max)


def _check_within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} = {value}: must lie in [{low}, {high}] where it is steered. Start inside.")


def _loaded(state: Mapping[str, float], keys: list[str], owner: str) -> list[float]:
    if set(state) != set(keys):
        raise ValueError(
            f"state of {owner} has keys {sorted(state)}: must be {sorted(keys)}. Resume with its version."
        )
    wrong = [key for key in keys if not math.isfinite(state[key])]
    if wrong:
        raise ValueError(
            f"state of {owner}: {wrong[0]} = {state[wrong[0]]} must be finite. Resume an earlier one."
        )
    return [float(state[key]) for key in keys]
