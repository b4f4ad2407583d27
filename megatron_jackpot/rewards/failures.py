"""Rewards that are 0 because the machinery failed: counted, logged now and then, and bounded in share."""

import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)

MIN_FAILED = 20
"""Failures below which no share of them ends a run."""
MAX_SHOWN = 160
"""Characters of a response or a label in the log."""
KINDS = {"timed_out": "timed out", "crashed": "crashed"}


class RewardsFailing(RuntimeError):
    """More rewards failed than data.max_failed_rewards allows."""


class Failures:
    """Counts a pool's rewards by how they ended; a call or an evaluation starts with `begin`."""

    def __init__(self, reward: str, timeout_s: float, max_failed: float):
        self.reward, self.timeout_s, self.max_failed = reward, timeout_s, max_failed
        self.counters = {"scored": 0, **dict.fromkeys(KINDS, 0)}
        self._begun = dict(self.counters)

    def begin(self) -> dict[str, int]:
        """The share of failures counts from here. Returns the counters."""
        self._begun = dict(self.counters)
        return dict(self.counters)

    def add(self, kind: str, why: str, response_text: str, label: Any) -> None:
        """Count a failure, and say so for the first, second, fourth, eighth, ... of its kind.

        Raises RewardsFailing when MIN_FAILED of them, and more than the allowed share, failed since `begin`.
        """
        self.counters[kind] += 1
        number = self.counters[kind]
        if number & (number - 1) == 0:
            log.warning(
                f"data.reward = '{self.reward}' {KINDS[kind]}, reward 0 (the {number}. of this kind): {why}. "
                f"Label {shortened(label)}, response {shortened(response_text)}"
            )
        counts = {name: self.counters[name] - self._begun[name] for name in self.counters}
        failed, judged = sum(counts[name] for name in KINDS), sum(counts.values())
        if failed >= MIN_FAILED and failed > self.max_failed * judged:
            told = ", ".join(f"{counts[name]} {words}" for name, words in KINDS.items())
            raise RewardsFailing(
                f"{failed} of {judged} rewards failed ({told}), more than data.max_failed_rewards = "
                f"{self.max_failed:g} allows. The last: {why}. See data.reward_timeout_s "
                f"({self.timeout_s:g} s), data.reward_memory_gb and the log."
            )

    def sums(self, since: Mapping[str, int]) -> dict[str, tuple[float, float]]:
        """(sum, count) metrics of the rewards after `since`, what `begin` returned."""
        judged = sum(self.counters.values()) - sum(since.values())
        return {f"reward/{kind}": (float(self.counters[kind] - since[kind]), float(judged)) for kind in KINDS}


def shortened(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text) if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]!r}... ({len(text)} characters)"
