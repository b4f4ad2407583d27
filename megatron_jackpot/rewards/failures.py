"""Rewards that are 0 because the machinery failed: counted, logged now and then, and bounded in share."""

import logging
from typing import Any

log = logging.getLogger(__name__)

MIN_FAILED = 20
"""Failures below which no share of them ends a run."""
MAX_SHOWN = 160
"""Characters of a response or a label in the log."""
KINDS = {"timed_out": "timed out", "crashed": "crashed"}


class RewardsFailing(RuntimeError):
    """More rewards failed than data.max_failed_rewards allows."""


Counts = dict[str, int]
"""Rewards by how they ended: scored, timed_out, crashed."""


class Failures:
    """Counts a pool's rewards by how they ended, since its start and of each call."""

    def __init__(self, where: str, timeout_s: float, max_failed: float):
        """`where` is the setting that names the reward."""
        self.where, self.timeout_s, self.max_failed = where, timeout_s, max_failed
        self.counters = self.begin()
        """Since the start."""

    def begin(self) -> Counts:
        """For a call, of which several may be under way: a rollout batch, an evaluation."""
        return {"scored": 0, **dict.fromkeys(KINDS, 0)}

    def add_scored(self, counts: Counts) -> None:
        for counters in _both(self.counters, counts):
            counters["scored"] += 1

    def add(self, kind: str, why: str, response_text: str, label: Any, counts: Counts) -> None:
        """Count a failure, and say so for the first, second, fourth, eighth, ... of its kind.

        Raises RewardsFailing when MIN_FAILED of the call's, and more than the allowed share, failed.
        """
        for counters in _both(self.counters, counts):
            counters[kind] += 1
        number = self.counters[kind]
        if number & (number - 1) == 0:
            log.warning(
                f"{self.where} {KINDS[kind]}, reward 0 (the {number}. of this kind): {why}. "
                f"Label {shortened(label)}, response {shortened(response_text)}"
            )
        failed, judged = sum(counts[name] for name in KINDS), sum(counts.values())
        if failed >= MIN_FAILED and failed > self.max_failed * judged:
            told = ", ".join(f"{counts[name]} {words}" for name, words in KINDS.items())
            raise RewardsFailing(
                f"{failed} of {judged} rewards failed ({told}), more than data.max_failed_rewards = "
                f"{self.max_failed:g} allows. The last: {why}. See data.reward_timeout_s "
                f"({self.timeout_s:g} s), data.reward_memory_gb and the log."
            )


def _both(whole: Counts, counts: Counts) -> list[Counts]:
    return [whole] if counts is whole else [whole, counts]


def failure_sums(counts: Counts) -> dict[str, tuple[float, float]]:
    """(sum, count) metrics of a call's rewards."""
    judged = float(sum(counts.values()))
    return {f"reward/{kind}": (float(counts[kind]), judged) for kind in KINDS}


def shortened(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text) if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]!r}... ({len(text)} characters)"
