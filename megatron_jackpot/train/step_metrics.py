"""What one step measures, made anew for each step, and what it returns."""

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.profiler import record_function

from megatron_jackpot.algorithm.diagnostics import means_over
from megatron_jackpot.algorithm.reward_parts import PART_METRIC
from megatron_jackpot.models.engine import UpdateReport
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.parallel.reduce import reduce_metrics, with_all_names
from megatron_jackpot.records import Batch, Metrics
from megatron_jackpot.rollout.collect import group_metrics
from megatron_jackpot.rollout.collected import Collected
from megatron_jackpot.run.watchdog import Watchdog
from megatron_jackpot.train.curator import Trained
from megatron_jackpot.train.samples import Wrong, wrong_rollouts

AGE = "staleness/age_"
"""Sums of tokens by age, which no run reports as they are."""


@dataclass(frozen=True)
class StepResult:
    """A finished step."""

    step: int
    """Its number, from 1."""
    metrics: dict[str, float]
    """On the main rank; empty elsewhere."""
    account: dict[str, Any] | None
    """What became of the step's prompts (rollout/collected.py: account), on DP leaders."""
    wrong: list[Wrong]
    """A few rollouts that missed their answer, on DP leaders."""


class Agreed(NamedTuple):
    """What every rank must know of a mini-batch before the next schedule starts, summed over all of it."""

    num_policy: float
    """N of the policy's loss."""
    num_valid: float
    """Valid tokens that train."""
    num_actor: float
    """N of the actor's and of added terms: these, and those of pruned rollouts that count."""
    num_positive: float
    """Of correct rollouts among the latter."""
    acceptance: float
    """Mean expected acceptance; NaN where no token is valid."""
    kl: float
    """Mean KL(target || server) over the candidates; NaN where no token is valid."""


@dataclass
class StepMetrics:
    """Sums over tokens, which travel, and numbers of this rank, which do not."""

    step: int
    """The step under way, from 1: what its phases are named after."""
    watchdog: Watchdog
    sums: Metrics = field(default_factory=dict)
    """On the last pipeline stage."""
    rollout_sums: Metrics = field(default_factory=dict)
    """On DP leaders."""
    values: dict[str, float] = field(default_factory=dict)
    wrong: list[Wrong] = field(default_factory=list)
    """Of this leader's rollouts."""

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Adds the seconds of the block to time/<name>; the block is a phase of the watchdog and of a
        trace."""
        _finish_device_work()
        started = time.perf_counter()
        with self.watchdog.phase(f"{name} of step {self.step}"), record_function(name):
            yield
            _finish_device_work()
        self.count(f"time/{name}", time.perf_counter() - started)

    def count(self, name: str, more: float = 1.0) -> None:
        """Add to a number of this rank."""
        self.values[name] = self.values.get(name, 0.0) + more

    def add(self, pairs: Metrics) -> None:
        """Sums and counts travel; the division happens once, in `reduced`."""
        for key, (total, count) in pairs.items():
            before = self.sums.get(key)
            # Nothing is added to nothing: on a GPU that would be two launches for each metric.
            self.sums[key] = (total, count) if before is None else (before[0] + total, before[1] + count)

    def note_rollouts(self, collected: Collected, trained: Trained, dp: int) -> None:
        """What a leader's rollouts were, and what of them trains; `dp` leaders share the step."""
        self.wrong = wrong_rollouts(collected.sampled)
        learned = float(sum(r.num_tokens for group in trained.groups for r in group))
        pairs: Mapping[str, tuple[float, float]] = {
            "train/tokens": (learned, 1 / dp),
            **group_metrics(collected.sampled),
            **collected.sums,
            **trained.sums,
        }
        for name, (total, count) in pairs.items():
            self.rollout_sums[name] = (torch.tensor(float(total)), torch.tensor(float(count)))

    def note_update(self, name: str, report: UpdateReport, mesh: Mesh) -> None:
        """One optimizer step of a model."""
        self.count(f"guard/skipped_{name}", float(not math.isfinite(report.grad_norm)))
        one = torch.ones([], dtype=torch.float64, device=mesh.device)
        for key, total in report.sums.items():
            # A loss is a share of the whole already; a pair is a sum and its count.
            if total.dim() == 0:
                self.add({f"loss/{key}": (total, one / mesh.dp)})
            else:
                self.add({key: (total[0], total[1])})
        self.values[f"grad_norm/{name}"] = report.grad_norm
        self.values[f"lr/{name}"] = report.lr

    def reduced(self, mesh: Mesh) -> dict[str, float]:
        """Every metric of the step on the main rank; {} elsewhere. Call it on every rank."""
        on_leaders: dict[str, float] = {}
        if mesh.is_leader:
            pairs = with_all_names(self.rollout_sums, PART_METRIC, mesh.dp_group)
            on_leaders = reduce_metrics(pairs, mesh.dp_group)
        on_last = reduce_metrics(self.sums, mesh.dp_group) if mesh.is_last_stage else {}
        if on_last.get("weight/mean_square"):
            on_last["weight/ess"] = on_last["weight/mean"] ** 2 / on_last["weight/mean_square"]
        if on_leaders.get("select/weight_square"):
            on_leaders["select/ess"] = on_leaders["select/weight"] ** 2 / on_leaders["select/weight_square"]
        on_last |= _quantiles_of_age({key: on_last.pop(key) for key in [*on_last] if key.startswith(AGE)})
        on_last = mesh.object_from_last_stage(on_last)
        return {**on_leaders, **on_last, **self.values} if mesh.is_main else {}


def staleness(batch: Batch, version: int, largest: int) -> Metrics:
    """Versions between the weights that were synced last and those that wrote each token: their mean, and the
    share of each from 0 to `largest`, of which `reduced` makes quantiles."""
    behind_MT = version - batch.weight_version_MT
    shares = {f"{AGE}{age}": behind_MT == age for age in range(largest + 1)}
    return means_over({"staleness/mean": behind_MT, **shares}, batch.mask_MT)


def _quantiles_of_age(shares: Mapping[str, float]) -> dict[str, float]:
    """The 99% quantile and the largest of the tokens' ages; {} where no token was trained on."""
    ages = sorted((int(key.removeprefix(AGE)), share) for key, share in shares.items() if share > 0)
    if not ages:
        return {}
    below = itertools.accumulate(share for _, share in ages)
    reached = [age for (age, _), share in zip(ages, below, strict=True) if share >= 0.99]
    return {"staleness/quantile99": float(reached[0]), "staleness/max": float(ages[-1][0])}


def _finish_device_work() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
