"""What keeps a run from training on nonsense: skipped steps are bounded, and the policy pauses when rollouts
drift."""

import math
from collections import Counter
from typing import Any

from megatron_jackpot.config.run import Guards


class RollBack(RuntimeError):
    """Numbers are not finite and training cannot go on with them; raised on every rank alike."""


class Guard:
    """Counts skipped optimizer steps and decides when the policy pauses; the same numbers reach every rank.

    Paused, the policy stands still and the actor is trained by distillation alone, until acceptance and KL
    are back inside their bounds by the share `hysteresis`.
    """

    def __init__(self, config: Guards):
        self.config = config
        self.paused = False
        self.skipped_in_a_row: Counter[str] = Counter()
        """Model -> optimizer steps since the last that was applied."""

    def watch(self, acceptance: float, kl: float) -> None:
        """Decide from the mean acceptance and KL(target || server) of a mini-batch; what is not finite counts
        as out of bounds."""
        bounds = self.config
        slack = bounds.hysteresis if self.paused else 0.0
        # A floor near 1 must stay reachable.
        low = bounds.acceptance_floor is not None and not (
            min(bounds.acceptance_floor * (1 + slack), (1 + bounds.acceptance_floor) / 2)
            <= acceptance
            < math.inf
        )
        high = bounds.kl_ceiling is not None and not (-math.inf < kl <= bounds.kl_ceiling * (1 - slack))
        self.paused = low or high

    @property
    def in_doubt(self) -> bool:
        """Whether the last gradient of a model was not applied: its weights may be what is wrong, and are not
        saved."""
        return any(self.skipped_in_a_row.values())

    def may_step(self, model: str, grad_norm: float) -> bool:
        """Whether a gradient may be applied. Raises RollBack when guard.max_skipped in a row may not."""
        if math.isfinite(grad_norm):
            self.skipped_in_a_row[model] = 0
            return True
        self.skipped_in_a_row[model] += 1
        if self.skipped_in_a_row[model] > self.config.max_skipped:
            raise RollBack(
                f"grad_norm/{model} is {grad_norm} for the {self.skipped_in_a_row[model]}. time in a row, "
                f"guard.max_skipped = {self.config.max_skipped}. Look at the data and at lr/{model} of these "
                "steps."
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"paused": self.paused}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.paused = bool(state["paused"])
        self.skipped_in_a_row.clear()
