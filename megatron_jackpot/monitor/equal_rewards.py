"""A run in which every group's rewards are equal learns nothing, and looks like one that works: say so."""

import logging
from collections.abc import Mapping

from megatron_jackpot.config import Config

log = logging.getLogger(__name__)

STEPS = 10
"""Steps after which it is no accident."""


class EqualRewards:
    """Warns once, when the first STEPS steps that it sees had no group with two different rewards."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._steps = 0

    def look(self, step: int, metrics: Mapping[str, float]) -> None:
        """`metrics` of a step; those of an evaluation alone have no groups."""
        if self._steps == STEPS or (equal := metrics.get("rollout/equal_rewards")) is None:
            return
        self._steps = self._steps + 1 if equal == 1 else STEPS
        if equal == 1 and self._steps == STEPS:
            log.warning(self._text(metrics))

    def _text(self, metrics: Mapping[str, float]) -> str:
        data, rollout = self.config.data, self.config.rollout
        rewards = " and ".join(f"{key} = '{name}'" for key, name in data.reward_names.items())
        causes = [
            f"{rewards} finds no answer in a response, or the data writes answers in another way",
            f"rollout.max_new_tokens = {rollout.max_new_tokens} cuts responses off before their answer ("
            f"{metrics.get('rollout/truncated', 0.0):.0%} were cut off)",
            "the problems are too hard, or too easy, for the model that samples",
        ]
        if rollout.samples_per_prompt == 1:
            causes.insert(0, "rollout.samples_per_prompt = 1 leaves a group nothing to be compared with")
        return (
            f"after {STEPS} steps all rewards of every group were equal (mean "
            f"{metrics.get('reward/mean', 0.0):g}): nothing is learned. Likely: {'; '.join(causes)}. "
            f"Look at responses: megatron-jackpot report {self.config.run.folder}"
        )
