"""The rollout phase of a step: every prompt of the step exactly once, whatever happens to servers or to the
run."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.distributed as dist

from megatron_jackpot.config import Rollouts
from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.records import Prompt, Rollout
from megatron_jackpot.rollout.collect import Interrupted, Sums, Unfinished
from megatron_jackpot.rollout.finished_groups import Groups

log = logging.getLogger(__name__)

MAX_RECOVERIES = 3
"""How often a step's rollout may be rescued by giving the servers their weights again."""
COMPLETE, LOST, STOPPED = range(3)
"""How asking the servers ended; the worst of all leaders counts."""

Stop = Callable[[], str | None]
"""Asked all the time during a rollout: a reason to interrupt it, or None."""


class Source(Protocol):
    """Where rollouts come from, on a DP leader."""

    def collect(
        self, epoch: int, prompts: list[Prompt], *, samples: int | None = None, stop: Stop = lambda: None
    ) -> tuple[list[list[Rollout]], Sums]: ...

    def require_version(self, oldest: int) -> None: ...

    def close(self) -> None: ...


class StopRun(Exception):
    """A rollout was interrupted because the run is to save and end; raised on every rank alike."""


@dataclass(frozen=True, kw_only=True)
class Collected:
    """One leader's groups of a step, in the loader's order, and what it took to get them."""

    groups: list[list[Rollout]]
    sums: Sums
    """Of all requests, repeated ones included."""
    seconds: float
    """Spent asking the servers."""
    epoch: int
    trained: list[int]
    """Ids of the prompts that came back with a group."""
    lost: list[int]
    """Ids of those that did not."""


class Collector:
    """Asks the servers for a step's groups and keeps those that are finished until the whole step is there.

    `source` exists on DP leaders; the other ranks only wait and hear how it ended.
    """

    def __init__(
        self, mesh: Mesh, config: Rollouts, source: Source | None, stop: Stop, finished: Groups
    ) -> None:
        self.mesh, self.config, self.source, self.stop = mesh, config, source, stop
        self.finished = finished
        """Finished groups of an unfinished step: what a checkpoint saves of it. Changed in place."""

    def collect(
        self, loader: PromptLoader | None, num_steps: int, recover: Callable[[], object]
    ) -> Collected | None:
        """This leader's groups after `num_steps` steps; None on other ranks.

        Where too many were lost, `recover` (called on every rank) gives the servers their weights again, and
        the missing groups are asked for again. Raises StopRun when a leader was interrupted: the loader is
        back where the step began, and `finished` holds what was finished. Raises RuntimeError after
        MAX_RECOVERIES.
        """
        before = None if loader is None else loader.state_dict()
        request: _Request | None = None
        if self.mesh.is_leader and loader is not None:
            request = _Request(*loader.next())
        limit_s = self.config.request_timeout_s * (self.config.retries + 2)
        error: Unfinished | None = None
        for attempt in range(MAX_RECOVERIES + 1):
            outcome, error = COMPLETE, None
            if request is not None:
                outcome, error = self._ask(request, num_steps - self.config.max_staleness)
            self.mesh.wait_for_leaders(f"rollout-{num_steps}-{attempt}", limit_s)
            outcome = self.mesh.largest(outcome)
            if outcome == COMPLETE:
                return None if request is None else self._take(request)
            if outcome == STOPPED:
                if loader is not None and before is not None:
                    loader.load_state_dict(before)
                raise StopRun
            if error is not None:
                log.warning(f"step {num_steps + 1}: {error} Sending the weights again.")
            recover()
        raise RuntimeError(
            f"step {num_steps + 1}: rollouts failed {MAX_RECOVERIES + 1} times. Last error here: {error}"
        ) from error

    def _ask(self, request: "_Request", oldest: int) -> tuple[int, Unfinished | None]:
        """Fill `finished` with the groups it lacks: how that ended, and what went wrong."""
        assert self.source is not None
        self.source.require_version(oldest)
        missing = [prompt for prompt in request.prompts if prompt.id not in self.finished]
        started = time.perf_counter()
        outcome, error = COMPLETE, None
        try:
            groups, sums = self.source.collect(request.epoch, missing, stop=self.stop)
        except Unfinished as unfinished:
            groups, sums, error = unfinished.groups, unfinished.metrics, unfinished
            outcome = STOPPED if isinstance(unfinished, Interrupted) else LOST
        request.seconds += time.perf_counter() - started
        self.finished |= {group[0].prompt.id: group for group in groups}
        for key, (total, count) in sums.items():
            so_far = request.sums.get(key, (0.0, 0.0))
            request.sums[key] = (so_far[0] + total, so_far[1] + count)
        return outcome, error

    def _take(self, request: "_Request") -> Collected:
        ids = [prompt.id for prompt in request.prompts]
        collected = Collected(
            groups=[self.finished[number] for number in ids if number in self.finished],
            sums=request.sums,
            seconds=request.seconds,
            epoch=request.epoch,
            trained=[number for number in ids if number in self.finished],
            lost=[number for number in ids if number not in self.finished],
        )
        self.finished.clear()
        return collected


@dataclass
class _Request:
    """What a leader asks for in a step, and what that took so far."""

    epoch: int
    prompts: list[Prompt]
    sums: Sums = field(default_factory=dict)
    seconds: float = 0.0


def account(mesh: Mesh, collected: Collected) -> dict[str, Any]:
    """What became of a step's prompts over all leaders, which alone call it: epoch, trained, lost."""
    parts: list[Any] = [(collected.trained, collected.lost)]
    if mesh.dp > 1:
        parts *= mesh.dp
        dist.all_gather_object(parts, (collected.trained, collected.lost), group=mesh.dp_group)
    trained, lost = (sorted(number for part in parts for number in part[i]) for i in (0, 1))
    return {"epoch": collected.epoch, "trained": trained, "lost": lost}
