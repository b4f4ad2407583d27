"""How asking servers ended, on one leader and on all: ranks learn of it together, and none waits for another
that has given up."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.parallel.reduce import raise_on_all_ranks
from megatron_jackpot.rewards.failures import RewardsFailing
from megatron_jackpot.rollout.collect import Interrupted, Unfinished
from megatron_jackpot.run.limits import behind

log = logging.getLogger(__name__)

COMPLETE, LOST, STOPPED, REFUSED, FAILED = range(5)
"""The worst of all leaders counts."""


class StopRun(Exception):
    """The run is to save and end; raised on every rank alike."""


def outcome_of(error: BaseException | None) -> int:
    """What ended the requests of one leader; None where nothing did."""
    if error is None:
        return COMPLETE
    if isinstance(error, Interrupted):
        return STOPPED
    if isinstance(error, Unfinished):
        return LOST
    return REFUSED if isinstance(error, RewardsFailing) else FAILED


def agree(mesh: Mesh, what: str, limit_s: float, outcome: int, error: BaseException | None) -> int:
    """The worst outcome, on every rank; leaders give up `what` after `limit_s` themselves.

    Raises what failed on the rank where it did, and RewardsFailing or OSError on the others. Reductions: 1
    over the world, and a gather where something failed.
    """
    mesh.wait_for_leaders(what, behind(limit_s))
    worst = mesh.largest(outcome)
    if worst < REFUSED:
        return worst
    mine = error if outcome == worst else None
    if worst == REFUSED and mine is None:
        mine = RewardsFailing("Rewards failed on another rank, whose log says how.")
    with raise_on_all_ranks():
        if mine is not None:
            raise mine
    raise AssertionError("unreachable: it failed somewhere")


@contextmanager
def asking(mesh: Mesh, what: str, limit_s: float) -> Iterator[None]:
    """Within, leaders ask servers, and other ranks do nothing. At its end all know how that went: raises
    StopRun on every rank where one was interrupted, and as `agree` where anything else was raised."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    outcome = outcome_of(error)
    if error is not None and outcome != STOPPED:
        # Whatever the others do now: this rank may give up waiting for them.
        log.error(f"{what}: {type(error).__name__}: {error}")
    # Groups that are lost here are asked for by nobody again.
    if agree(mesh, what, limit_s, FAILED if outcome == LOST else outcome, error) == STOPPED:
        raise StopRun
