"""The rollout phase of a step: every prompt of the step exactly once, whatever happens to servers or to the
run."""

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch.distributed as dist

from megatron_jackpot.config import Rollouts
from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.records import Prompt, Rollout
from megatron_jackpot.rollout.collect import Interrupted, Unfinished
from megatron_jackpot.rollout.finished_groups import Groups

log = logging.getLogger(__name__)

MAX_RECOVERIES = 3
"""How often a step's rollout may be rescued by giving the servers their weights again."""
COMPLETE, LOST, STOPPED = range(3)
"""How asking the servers ended; the worst of all leaders counts."""

Metrics = dict[str, tuple[float, float]]
Stop = Callable[[], str | None]
"""Asked all the time during a rollout: a reason to interrupt it, or None."""


class Source(Protocol):
    """Where rollouts come from, on a DP leader."""

    def collect(
        self, epoch: int, prompts: list[Prompt], *, samples: int | None = None, stop: Stop = lambda: None
    ) -> tuple[list[list[Rollout]], Metrics]: ...

    def require_version(self, oldest: int) -> None: ...

    def close(self) -> None: ...


class StopRun(Exception):
    """A rollout was interrupted because the run is to save and end; raised on every rank alike."""


class Collector:
    """Asks the servers for a step's groups and keeps those that are finished until the whole step is there.

    `source` exists on DP leaders; the other ranks only wait and hear how it ended.
    """

    def __init__(self, mesh: Mesh, knobs: Rollouts, source: Source | None, stop: Stop) -> None:
        self.mesh, self.knobs, self.source, self.stop = mesh, knobs, source, stop
        self.kept: Groups = {}
        """Finished groups of an unfinished step: what a checkpoint saves of it."""
        self.sums: Metrics = {}
        self.seconds = 0.0
        self.asked: tuple[int, list[int]] = (0, [])
        """Epoch and prompt ids of this leader's last step."""
        self.lost: list[int] = []
        """Those of them that came back without a group."""

    def collect(
        self, loader: PromptLoader | None, num_steps: int, recover: Callable[[], None]
    ) -> list[list[Rollout]] | None:
        """This leader's groups after `num_steps` steps, in the loader's order; None on other ranks.

        Where too many were lost, `recover` (called on every rank) gives the servers their weights again, and
        the missing groups are asked for again. Raises StopRun when a leader was interrupted: the loader is
        back where the step began, and `kept` holds what was finished. Raises RuntimeError after
        MAX_RECOVERIES.
        """
        before = None if loader is None else loader.state_dict()
        prompts: list[Prompt] | None = None
        self.sums, self.seconds = {}, 0.0
        if self.mesh.is_leader and loader is not None:
            epoch, prompts = loader.next()
            self.asked = epoch, [prompt.id for prompt in prompts]
        limit_s = self.knobs.request_timeout_s * (self.knobs.retries + 2)
        for attempt in range(MAX_RECOVERIES + 1):
            outcome, error = COMPLETE, None
            if prompts is not None:
                outcome, error = self._ask(epoch, prompts, num_steps - self.knobs.max_staleness)
            self.mesh.wait_for_leaders(f"rollout-{num_steps}-{attempt}", limit_s)
            outcome = self.mesh.largest(outcome)
            if outcome == COMPLETE:
                return None if prompts is None else self._take(prompts)
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

    def account(self) -> dict[str, Any]:
        """What became of the last step's prompts over all leaders, which alone call it: epoch, trained,
        lost."""
        parts: list[Any] = [(self.asked, self.lost)]
        if self.mesh.dp > 1:
            parts *= self.mesh.dp
            dist.all_gather_object(parts, (self.asked, self.lost), group=self.mesh.dp_group)
        lost = sorted(prompt for _, lost in parts for prompt in lost)
        asked = sorted(prompt for (_, ids), _ in parts for prompt in ids)
        trained = [prompt for prompt in asked if prompt not in set(lost)]
        return {"epoch": self.asked[0], "trained": trained, "lost": lost}

    def _ask(self, epoch: int, prompts: list[Prompt], oldest: int) -> tuple[int, Unfinished | None]:
        """Fill `kept` with the groups it lacks: how that ended, and what went wrong."""
        assert self.source is not None
        self.source.require_version(oldest)
        missing = [prompt for prompt in prompts if prompt.id not in self.kept]
        started = time.perf_counter()
        outcome, error = COMPLETE, None
        try:
            groups, metrics = self.source.collect(epoch, missing, stop=self.stop)
        except Unfinished as unfinished:
            groups, metrics, error = unfinished.groups, unfinished.metrics, unfinished
            outcome = STOPPED if isinstance(unfinished, Interrupted) else LOST
        self.seconds += time.perf_counter() - started
        self.kept |= {group[0].prompt.id: group for group in groups}
        for key, (total, count) in metrics.items():
            so_far = self.sums.get(key, (0.0, 0.0))
            self.sums[key] = (so_far[0] + total, so_far[1] + count)
        return outcome, error

    def _take(self, prompts: list[Prompt]) -> list[list[Rollout]]:
        groups = [self.kept[prompt.id] for prompt in prompts if prompt.id in self.kept]
        self.lost = [prompt.id for prompt in prompts if prompt.id not in self.kept]
        self.kept = {}
        return groups
