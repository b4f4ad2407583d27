"""The tokens that a correction rejects most often, counted over a run's newest records.

Shapes: R trained tokens of a record, U different ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_jackpot.monitor.token_log import TokenRecord, load

MOST_REJECTED = 20
"""Tokens in the table of those that are rejected most often."""
MOST_RECORDS, MOST_COUNTED = 500, 2_000_000
"""Records that are counted: so many, or fewer that together have so many trained tokens."""


@dataclass(frozen=True)
class Decisions:
    """What became of a record's trained tokens."""

    token_R: np.ndarray
    """int32."""
    keep_R: np.ndarray
    """bool."""
    gap_R: np.ndarray
    """float32, log of p(policy) / p(server)."""


def decisions(record: TokenRecord) -> Decisions:
    trained_N = record.trained_N
    with np.errstate(invalid="ignore"):
        gap_R = record.target_logp_N[trained_N] - record.server_logp_N[trained_N]
    return Decisions(record.token_N[trained_N].astype(np.int32), record.keep_N[trained_N], gap_R)


class NewestDecisions:
    """Those of a run's newest records; of a file that is as it was they stay from one look to the next."""

    def __init__(self) -> None:
        self._held: dict[tuple[Path, int, int], Decisions] = {}

    def look(self, files: Sequence[Path]) -> list[Decisions]:
        """Of the last of `files`, which are in the order of their steps: at least of one.

        Raises ValueError as `load` does, OSError for a file that has gone.
        """
        held: dict[tuple[Path, int, int], Decisions] = {}
        counted = 0
        for path in reversed(files[-MOST_RECORDS:]):
            if counted >= MOST_COUNTED:
                break
            status = path.stat()
            key = (path, status.st_mtime_ns, status.st_size)
            held[key] = self._held.get(key) or decisions(load(path))
            counted += len(held[key].token_R)
        self._held = held
        return list(held.values())


@dataclass(frozen=True)
class Rejection:
    token: int
    seen: int
    rejected: int
    median_ratio: float
    """p(policy) / p(server), median of its occurrences."""


def most_rejected(counted: Sequence[Decisions], most: int = MOST_REJECTED) -> list[Rejection]:
    """The tokens with the most rejections, in that order; by id where they are equal."""
    keep_R = np.concatenate([one.keep_R for one in counted])
    gap_R = np.concatenate([one.gap_R for one in counted])
    token_U, place_R, seen_U = np.unique(
        np.concatenate([one.token_R for one in counted]), return_inverse=True, return_counts=True
    )
    rejected_U = np.bincount(place_R[~keep_R], minlength=len(token_U))
    order = [place for place in np.lexsort((token_U, -rejected_U))[:most] if rejected_U[place]]
    return [
        Rejection(
            token=int(token_U[place]),
            seen=int(seen_U[place]),
            rejected=int(rejected_U[place]),
            median_ratio=_median_ratio(gap_R[place_R == place]),
        )
        for place in order
    ]


def _median_ratio(gap_R: np.ndarray) -> float:
    return float(np.median(np.exp(np.fmin(50.0, gap_R.astype(np.float64)))))
