"""The rollouts of a run, up to `rollout.ahead` steps before they are trained on: every prompt of a step once,
whatever happens to servers or to the run.

The main thread starts a step's batch and takes it, at points that no timing moves; requests and rewards go
on in the source's thread meanwhile. Step t trains the loader's t-th batch, whichever is finished first. Its
requests begin when step t - ahead does, with the weights of step t - ahead - 1 or newer ones, so that no
token is older than `ahead` when it is trained on.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent import futures
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Literal

import torch.distributed as dist

from megatron_jackpot.algorithm.allocators_base import Fixed
from megatron_jackpot.config import Rollouts
from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.parallel.exchange import Exchange
from megatron_jackpot.records import Rollout
from megatron_jackpot.rollout.allocation import Allocation
from megatron_jackpot.rollout.asked import Asked
from megatron_jackpot.rollout.collect import POLL_S, Losses, Unfinished
from megatron_jackpot.rollout.collected import Collected
from megatron_jackpot.rollout.finished_groups import Groups
from megatron_jackpot.rollout.outcome import (
    COMPLETE,
    FAILED,
    LOST,
    REFUSED,
    STOPPED,
    StopRun,
    agree,
    outcome_of,
)
from megatron_jackpot.rollout.pace import Pace
from megatron_jackpot.rollout.protocol import Source
from megatron_jackpot.run.interrupt import Stop
from megatron_jackpot.run.limits import END_LIMIT_S

log = logging.getLogger(__name__)

MAX_RECOVERIES = 3
"""How often a step's rollout may be rescued by giving the servers their weights again."""

Phase = Callable[[str], AbstractContextManager[None]]
"""Of the watchdog, by its name."""


class Pipeline:
    """Asks the servers for groups, steps ahead of training, and keeps those that are finished.

    `source` exists on DP leaders; the other ranks only wait and hear how it ended. The main thread alone
    calls it. Batches have a step, groups (epoch, prompt id): nothing of one step counts in another.
    """

    def __init__(
        self,
        mesh: Mesh,
        config: Rollouts,
        source: Source | None,
        stop: Stop,
        finished: Groups,
        *,
        limit_s: float,
        in_flight: Literal["retract", "wait"] = "retract",
        known_since: Callable[[], int] = lambda: 0,
        allocation: Allocation | None = None,
        phase: Phase = lambda what: nullcontext(),
    ) -> None:
        """`limit_s` is for one step's rollout; `in_flight` what a push does to responses under way;
        `known_since` the oldest version whose weights are still known, where they are to be scored; without
        an `allocation` every prompt gets the same; `phase` is told what is waited for."""
        self.mesh, self.config, self.source, self.stop, self.phase = mesh, config, source, stop, phase
        self.limit_s, self.in_flight, self.known_since = limit_s, in_flight, known_since
        self.finished = finished
        """Finished groups of steps that are not trained yet: what a checkpoint saves of them. Changed in
        place, by the source's thread too."""
        self.allocation = allocation or Allocation(Fixed(), config.samples_per_prompt)
        self.batches: deque[Asked] = deque()
        """Started and not taken, the oldest first."""
        together = self.allocation.allocator.replaces
        self._exchange: Exchange | None = None
        if source is not None and together and mesh.dp > 1:
            self._exchange = Exchange(mesh.own_store(), mesh.dp, mesh.dp_rank)
        self._attempt = 0
        """Counts, alike on every rank, what makes words of leaders to each other void."""
        self._interrupted: str | None = None
        self._pace = Pace()

    def start(self, step: int, loader: PromptLoader | None) -> None:
        """Begin to ask for the groups of `step`, on a leader; nothing where that was begun before."""
        if self.source is None or loader is None or any(batch.step == step for batch in self.batches):
            return
        begun = loader.num_begun > 0
        epoch, prompts = loader.next()
        plan = self.allocation.plan(step, loader.given)
        shared = (self.allocation, loader.further, self._exchange, self._attempt)
        batch = Asked(step, epoch, prompts, plan, *shared)
        self.batches.append(batch)
        if begun:
            missing = sum(batch.key(prompt) not in self.finished for prompt in batch.prompts)
            batch.add({"rollout/begun_anew": (missing, len(batch.prompts))})
        self._ask(batch)

    def take(self, step: int, loader: PromptLoader | None, recover: Callable[[], object]) -> Collected | None:
        """This leader's groups of `step`, the oldest that was started; None on other ranks.

        Where too many were lost, `recover` (called on every rank) gives the servers their weights again, and
        the missing groups are asked for again. Raises StopRun when a leader was interrupted: the loader's
        place is where the step began, and `finished` holds what was finished. What failed in a leader's
        thread is raised there, and RewardsFailing or OSError on the others; RuntimeError after
        MAX_RECOVERIES.
        """
        batch = self.batches[0] if self.batches else None
        assert batch is None or batch.step == step, f"step {batch.step} comes before {step}"
        started, error = time.perf_counter(), None
        for attempt in range(MAX_RECOVERIES + 1):
            with self.phase(f"wait for the rollouts of step {step}"):
                outcome, error = (COMPLETE, None) if batch is None else self._wait(batch)
                if batch is not None and self._exchange is not None and outcome != COMPLETE:
                    self._exchange.end(batch.batch, str(error))
                worst = agree(self.mesh, f"rollout-{step - 1}-{attempt}", self.limit_s, outcome, error)
            if worst == COMPLETE:
                return None if batch is None else self._taken(batch, loader, started)
            if worst == STOPPED:
                raise StopRun
            if error is not None:
                log.warning(f"step {step}: {error} Sending the weights again.")
            self._attempt += 1
            if batch is not None and self.allocation.allocator.replaces:
                # What one leader lost changes every leader's decisions.
                batch.attempt, batch.work = self._attempt, None
            recover()
            if self.mesh.largest(int(self.stop() is not None)):
                raise StopRun
        raise RuntimeError(
            f"step {step}: rollouts failed {MAX_RECOVERIES + 1} times. Last error here: {error}"
        ) from error

    def hold(self) -> None:
        """Before a push: begin no request; those that servers have are retracted by it, or, where that is
        asked for, awaited. A stop ends that wait. Raises TimeoutError, and what failed in the source."""
        if self.source is None:
            return
        self.source.thread.wait(self.source.hold(), END_LIMIT_S, "requests to be held before a push")
        if self.in_flight == "retract":
            return
        quiet = self.source.thread.submit(self.source.quiet())
        deadline = time.monotonic() + self.limit_s
        try:
            while not futures.wait([quiet], POLL_S).done and self.stop() is None:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"Waited {self.limit_s:g} s for the responses in flight before a push "
                        "(sync.in_flight = 'wait')."
                    )
        finally:
            left = quiet.cancel()
        if not left:
            quiet.result()  # Or what it failed of.

    def pushed(self, version: int, attempt: str) -> None:
        """Servers hold these weights, of this attempt of the run: requests begin again, and what was lost
        meanwhile is asked again."""
        if self.source is None:
            return
        begun = self.source.use(version, attempt)
        self.source.thread.wait(begun, END_LIMIT_S, "requests to begin after a push")
        for batch in self.batches:
            if batch.work is None or (batch.work.done() and ending(batch)[0] == LOST):
                self._ask(batch)

    def interrupt(self, reason: str) -> None:
        """End all requests; what is finished stays in `finished`. For a run that ends."""
        self._interrupted = reason
        under_way = [batch.work for batch in self.batches if batch.work is not None]
        if futures.wait(under_way, END_LIMIT_S).not_done:
            raise TimeoutError(f"Waited {END_LIMIT_S:g} s for requests to end: {reason}.")

    def drop(self) -> None:
        """Before an older checkpoint is loaded: what is in flight ends, on servers too, and is forgotten."""
        self.interrupt("the run goes back to a checkpoint")
        if self.source is not None:
            self.source.thread.wait(self.source.abort(), END_LIMIT_S, "servers to abort their requests")
        self.batches.clear()
        self.finished.clear()
        self._attempt += 1
        self._interrupted = None

    def _ask(self, batch: Asked) -> None:
        assert self.source is not None
        batch.work = self.source.thread.submit(self._collect(self.source, batch))

    async def _collect(self, source: Source, batch: Asked) -> Unfinished | None:
        """Fill `finished` with a batch's missing groups, in the source's thread; why some are not there."""
        unfinished, losses = None, Losses(0)

        def keep(group: list[Rollout]) -> None:
            key = batch.key(group[0].prompt)
            # Of a prompt that gets rounds, an earlier one's are there.
            self._pace.came(group, self.finished.get(key, []))
            self.finished[key] = group

        with self._pace.asking:
            try:
                for number in count():
                    asked = await batch.ask_for(number, self.finished, lambda: self._interrupted)
                    if asked is None:
                        break
                    epoch, prompts = asked
                    missing = batch.missing(prompts, self.finished)
                    options = batch.options(missing, self.finished)
                    losses.groups = len(batch.prompts) + len(batch.fetched)
                    _, sums = await source.collect(
                        epoch, missing, stop=lambda: self._interrupted, keep=keep, losses=losses, **options
                    )
                    batch.add(sums)
            except Unfinished as error:
                unfinished = error
                batch.add(error.metrics)
        return unfinished

    def _wait(self, batch: Asked) -> tuple[int, BaseException | None]:
        """Until a batch is there and young enough: how that ended, and what went wrong."""
        deadline = time.monotonic() + self.limit_s
        for _ in range(MAX_RECOVERIES + 1):
            assert batch.work is not None
            while not futures.wait([batch.work], POLL_S).done:
                if self._interrupted is None:
                    self._interrupted = self.stop()
                if time.monotonic() > deadline:
                    return FAILED, TimeoutError(
                        f"Waited {self.limit_s:g} s for the rollouts of step {batch.step} "
                        f"(run.phase_timeout_s){batch.waits_for and ', last for ' + batch.waits_for}."
                    )
            outcome, error = max(
                (ending(other) for other in self.batches if other.work and other.work.done()),
                key=lambda ending: ending[0] if ending[0] >= REFUSED else -1,
            )
            if outcome < REFUSED:
                outcome, error = ending(batch)
            if outcome != COMPLETE or not self._drop_stale(batch):
                return outcome, error
            if self.allocation.allocator.replaces:
                break
            self._ask(batch)
        return LOST, Unfinished(
            f"tokens older than rollout.max_staleness = {self.config.max_staleness}.", [], {}
        )

    def _drop_stale(self, batch: Asked) -> bool:
        """Forget groups whose tokens are too old for their step, or newer than it: whether there were any.

        A step's requests begin late enough, so this takes a fault: a checkpoint of a run with a larger
        `ahead`, a server that kept the weights of before a rollback, or a resume where weights of before it
        were to be scored.
        """
        newest = batch.step - 1
        oldest = max(newest - self.config.max_staleness, self.known_since())
        stale: list[list[Rollout]] = []
        for key in map(batch.key, (*batch.prompts, *batch.fetched)):
            spoken = [r.weight_version for r in self.finished.get(key, ()) if len(r.tokens)]
            if any(versions.min() < oldest or versions.max() > newest for versions in spoken):
                stale.append(self.finished.pop(key))
        rollouts = [rollout for group in stale for rollout in group]
        batch.add(
            {
                "rollout/stale_groups": (len(stale), 0),
                "rollout/stale_tokens": (sum(len(r.tokens) for r in rollouts), len(rollouts)),
            }
        )
        return bool(stale)

    def _taken(self, batch: Asked, loader: PromptLoader | None, started: float) -> Collected:
        assert loader is not None, "a batch came from it"
        loader.taken()
        self.batches.popleft()
        found = {p.id: self.finished.pop(batch.key(p), []) for p in (*batch.prompts, *batch.fetched)}
        # A checkpoint's are loaded on every leader; of another one's steps there is nothing to keep here.
        for key in [*self.finished]:
            if not any(other.owns(key) for other in self.batches):
                del self.finished[key]
        sampled = [group for group in found.values() if group]
        if self._exchange is not None:
            # Every leader has heard what there was to hear of it.
            self._exchange.forget({other.batch for other in self.batches})
        trained = sampled
        if self.allocation.allocator.replaces:
            committed = batch.committed()
            trained = [group for group in sampled if group[0].prompt.id in committed]
        self._observe(batch, batch.observed(found))
        batch.add({"rollout/stale_groups": (0, len(batch.prompts))})
        batch.add(batch.measured(sampled, trained))
        batch.add(self._pace.taken(started, self.mesh.dp))
        return Collected(
            groups=trained,
            sampled=sampled,
            sums=batch.sums,
            epoch=batch.epoch,
            trained=[prompt.id for prompt in batch.prompts if found[prompt.id]],
            lost=[prompt.id for prompt in batch.prompts if not found[prompt.id]],
            fetched=[prompt.id for prompt in batch.fetched],
            allocated=batch.allocated(found, {group[0].prompt.id for group in trained}),
        )

    def _observe(self, batch: Asked, mine: list[tuple[int, int, int]]) -> None:
        """Tell the allocator of all leaders' groups, the loader's in its order, then those that were fetched:
        every leader is here. Gathers of objects over dp: 1 where it remembers anything."""
        parts = [mine]
        if self.allocation.allocator.num_visits and self.mesh.dp > 1:
            parts = [mine] * self.mesh.dp
            dist.all_gather_object(parts, mine, group=self.mesh.dp_group)
        seen = {row[0]: row for part in parts for row in part}
        order = (*batch.plan, *batch.beside)
        self.allocation.observe(batch.step, [seen[number] for number in order if number in seen])


def ending(batch: Asked) -> tuple[int, BaseException | None]:
    """How asking for a step ended, once it has."""
    assert batch.work is not None
    error = batch.work.exception() or batch.work.result()
    return outcome_of(error), error
