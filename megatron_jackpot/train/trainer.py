"""step(): the paper, in order."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jackpot.algorithm.diagnostics import diagnostics
from megatron_jackpot.algorithm.scores import Correction, Scores
from megatron_jackpot.config import Config
from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.data.packing import Packer
from megatron_jackpot.models.build import DTYPES
from megatron_jackpot.models.engine import MegatronModel, UpdateReport
from megatron_jackpot.monitor.token_log import TokenLog
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.parallel.reduce import make_sum_over, reduce_metrics
from megatron_jackpot.records import Batch, Rollout
from megatron_jackpot.rollout.collect import group_metrics
from megatron_jackpot.rollout.collector import Collector, Source, StopRun
from megatron_jackpot.run.watchdog import Watchdog
from megatron_jackpot.sync.stream import WeightStream
from megatron_jackpot.train.guard import Guard, RollBack
from megatron_jackpot.train.losses import TRAINED_GAP, actor_loss, policy_loss
from megatron_jackpot.train.methods import Methods
from megatron_jackpot.train.scoring import Scorer, slice_scores


class Push(Protocol):
    """How weights get to the servers, on the main rank."""

    def push(self, named_tensors: Any, version: int) -> Any: ...

    def release(self) -> None: ...

    def close(self) -> None: ...


class Trainer:
    """Policy, actor and everything a step needs. `source` exists on DP leaders, `sync` on the main rank."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        methods: Methods,
        policy: MegatronModel,
        actor: MegatronModel,
        *,
        loader: PromptLoader | None = None,
        source: Source | None = None,
        sync: Push | None = None,
        stop: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.config, self.mesh = config, mesh
        self.policy, self.actor = policy, actor
        self.loader, self.source, self.sync = loader, source, sync
        self.collector = Collector(mesh, config.rollout, source, stop)
        self.guard = Guard(config.guard)
        self.watchdog = Watchdog(config.run.folder, dist.get_rank(), config.run.phase_timeout_s)
        here = mesh.is_last_stage and mesh.tp_rank == 0 and mesh.dp_rank == 0
        self.tokens = TokenLog(config.run.folder, config.logging, here=here)
        self.methods = methods
        self.scorer = Scorer(
            policy,
            actor,
            temperature=config.rollout.temperature,
            top_k=config.rollout.top_k_logp,
            keep_head=self.methods.distill.needs == "logits",
        )
        self.packer = Packer(
            mesh,
            tokens=config.packing.tokens,
            enabled=config.packing.enabled,
            num_minibatches=config.algorithm.num_minibatches,
            vpp=config.parallel.vpp,
        )
        self.sum_over_batch = make_sum_over(mesh.dp_group)
        self.num_steps = 0
        """Finished steps; also the version of the actor's weights."""
        self.step_under_way = 1
        """What phases are named after; sync and save belong to a step that is finished."""
        self.num_probes = 0
        self.policy_moved = False
        """True once the policy was updated after the scoring pass of this step."""
        self.num_pushes = 0
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.rollout_sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.values: dict[str, float] = {}

    def step(self) -> dict[str, float]:
        """One rollout batch: collect, score, correct, update both models, sync. Returns metrics on the main
        rank."""
        self.sums, self.values = {}, {}
        self.step_under_way = self.num_steps + 1
        with self.timer("step"):
            with self.timer("rollout"):
                groups = self.collect()
            with self.timer("make_room"):
                self.make_room()
            self.learn(self.packer.pack(groups, self.config.rollout.top_k_logp))
            self.num_steps += 1
            with self.timer("sync"):
                self.push()
        return self.reduced_metrics()

    def learn(self, batch: Batch) -> None:
        """The paper's update on a packed batch."""
        batch = batch.to(self.mesh.device)
        self.policy_moved = False
        with self.timer("score"):
            old = self.scorer(
                batch,
                step=self.num_steps,
                actor_version=self.num_steps,
                exact_lam=self.methods.exact_lam,
            )
        for mini, scores in self.minibatches(batch, old):
            with self.timer("correct"):
                correction, num_policy, num_actor = self.correct(mini, scores)
            if num_actor == 0:
                self.values["batch/skipped"] = self.values.get("batch/skipped", 0) + 1
                continue
            with self.timer("update_actor"):
                # Before the policy moves: the teacher is what was scored.
                self.update_actor(mini, scores, num_actor)
            if num_policy > 0 and not self.guard.paused:
                with self.timer("update_policy"):
                    self.update_policy(mini, scores, correction, num_policy)

    def collect(self) -> list[list[Rollout]] | None:
        """The DP leader's groups for this step with their advantages, None on other ranks. Raises StopRun."""
        groups = self.collector.collect(self.loader, self.num_steps, recover=self.push)
        if groups is None:
            return None
        self.note_rollouts(groups)
        return self.methods.advantages_over_batch(groups, self.sum_over_batch, self.mesh.device)

    def refuse_stop(self) -> None:
        """Raises StopRun on every rank when any of them was asked to save and end."""
        if self.mesh.largest(int(self.collector.stop() is not None)):
            raise StopRun

    def minibatches(self, batch: Batch, old: Scores | None) -> Iterator[tuple[Batch, Scores | None]]:
        """Mini-batches with their scores: a slice, or for the target "current" a fresh pass of the policy."""
        tokens = batch.tokens_MT.shape[1]
        start = 0
        for index, mini in enumerate(batch.split()):
            stop = start + mini.num_microbatches * tokens
            scores = slice_scores(old, start, stop)
            if index > 0 and self.config.algorithm.target == "current":
                scores = self.scorer.retarget(scores, mini)
            yield mini, scores
            start = stop

    def correct(self, mini: Batch, scores: Scores | None) -> tuple[Correction | None, float, float]:
        """The correction and both global denominators; (None, N, N) off the last stage.

        Whether a mini-batch is trained on follows from the denominators, so every stage must know them before
        the next schedule starts.
        """
        correction = None
        counts = torch.zeros(6, dtype=torch.float64, device=self.mesh.device)
        if scores is not None:
            correction = self.methods.correction(scores, self.sum_over_batch)
            self.tokens.note(self.num_steps + 1, mini, scores, correction)
            gap = diagnostics(scores, correction)
            total = scores.mask_T.sum()
            accepted = correction.metrics.get("jackpot/acceptance_expected") or (
                (correction.keep_T & scores.mask_T).sum(),
                total,
            )
            counts = torch.stack(
                [x.double() for x in (correction.count, total, *accepted, *gap["kl/target_server"])]
            )
            counts = self.sum_over_batch(counts)
            self.add_sums(correction.metrics)
            self.add_sums(gap)
            self.add_sums(self.methods.steer(scores, gap["kl/target_server"], self.sum_over_batch))
            self.add_sums(staleness(mini, self.num_steps))
        num_policy, num_actor, accepted, of, kl, kl_count = self.mesh.from_last_stage(counts).tolist()
        if not (math.isfinite(num_policy) and math.isfinite(num_actor)):
            raise RollBack(f"step {self.num_steps}: denominators are not finite: {num_policy}, {num_actor}.")
        if num_actor:
            self.guard.watch(accepted / of if of else math.nan, kl / kl_count if kl_count else math.nan)
            self.values["guard/paused"] = float(self.guard.paused)
        return correction, num_policy, num_actor

    def update_actor(self, mini: Batch, scores: Scores | None, denominator: float) -> None:
        if not self.config.algorithm.train_actor:
            return
        loss: Any = None
        knobs = self.config.actor
        if self.guard.paused:
            knobs = knobs.model_copy(update={"rl_weight": 0.0})
        if scores is not None:
            loss = actor_loss(
                mini,
                scores,
                knobs,
                self.methods,
                denominator,
                self.scorer.vocab(self.actor),
                self.scorer.teacher(scores, mini),
            )
        self.note_update("actor", self.actor.update(mini, loss, partial(self.guard.note, "actor")))

    def update_policy(
        self, mini: Batch, scores: Scores | None, correction: Correction | None, denominator: float
    ) -> None:
        loss: Any = None
        if scores is not None and correction is not None:
            objective = self.methods.objective.prepare(scores, self.sum_over_batch)
            vocab = self.scorer.vocab(self.policy)
            loss = policy_loss(mini, scores, correction, denominator, objective, vocab)
        report = self.policy.update(mini, loss, partial(self.guard.note, "policy"))
        gap = report.sums.pop(TRAINED_GAP, None)
        self.note_update("policy", report)
        if gap is not None and not self.policy_moved:
            self.check_trained_gap(gap)
        self.policy_moved = True

    def check_trained_gap(self, gap: Tensor) -> None:
        """Refuse numerics in which training sees other log-probs than scoring did, of the same weights.

        Under delayed fp8 scaling the scales move between the two passes. Raises RuntimeError above
        precision.max_trained_gap.
        """
        self.add_sums({TRAINED_GAP: gap.unbind()})
        mean, largest = float(gap[0] / gap[1].clamp(min=1)), self.config.precision.max_trained_gap
        # NaN is for the guard.
        if mean > largest:
            raise RuntimeError(
                f"step {self.num_steps}: {TRAINED_GAP} = {mean:.4g} in the first mini-batch, above "
                f"precision.max_trained_gap = {largest}. Use another precision.fp8_recipe ('tensorwise', "
                "'blockwise'), "
                "or bf16."
            )

    def make_room(self) -> None:
        """After the rollout, where servers share the trainer's GPUs: their memory goes, optimizer state
        comes."""
        if self.config.servers.release_memory:
            limit_s = self.config.rollout.request_timeout_s * 2
            self.mesh.wait_for_leaders(f"rollout-{self.num_steps}-{self.num_pushes}", limit_s)
            if self.sync is not None:
                self.sync.release()
            self.mesh.barrier()
        for model in (self.policy, self.actor):
            model.reload()

    @contextmanager
    def room_to_save(self) -> Iterator[None]:
        """After a step: as `make_room` within, and a push ends it where it changed anything."""
        self.make_room()
        yield
        if self.config.servers.release_memory or self.config.parallel.offload_optimizer:
            self.push()

    def push(self) -> None:
        """The actor's weights to the servers, stamped with the number of finished steps."""
        self.num_pushes += 1
        sync, servers = self.config.sync, self.config.servers
        limit_s = servers.start_timeout_s + sync.timeout_s * 12
        if self.config.parallel.offload_optimizer:
            for model in (self.policy, self.actor):
                model.offload()
        weights = WeightStream(
            self.actor,
            f"export-{self.num_pushes}",
            dtype=servers.dtype and DTYPES[servers.dtype],
            fp8=servers.quantization is not None,
            timeout_s=limit_s,
        )
        if not self.mesh.is_main:
            weights.take_part()
        elif self.sync is not None:
            report = self.sync.push(weights, version=self.num_steps)
            self.values |= {
                "sync/version": float(self.num_steps),
                "sync/server_version": float(report.version),
                "sync/seconds": report.seconds,
                "sync/bytes": float(report.num_bytes),
            }
        if self.mesh.is_main:
            weights.finish()
        self.mesh.wait_for_leaders(f"sync-{self.num_steps}-{self.num_pushes}", limit_s)

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Adds the seconds of the block to time/<name>."""
        _finish_device_work()
        started = time.perf_counter()
        with self.watchdog.phase(f"{name} of step {self.step_under_way}"):
            yield
            _finish_device_work()
        key = f"time/{name}"
        self.values[key] = self.values.get(key, 0.0) + time.perf_counter() - started

    def note_rollouts(self, groups: list[list[Rollout]]) -> None:
        rollouts = [r for group in groups for r in group]
        tokens = float(sum(len(r.tokens) for r in rollouts))
        trained = float(sum(r.num_tokens for r in rollouts))
        pairs = {
            "train/tokens": (trained, 1 / self.mesh.dp),
            "rollout/tokens_per_s": (tokens, self.collector.seconds / self.mesh.dp),
            **group_metrics(groups),
            **self.collector.sums,
        }
        self.rollout_sums = {
            k: (torch.tensor(float(a)), torch.tensor(float(b))) for k, (a, b) in pairs.items()
        }

    def note_update(self, name: str, report: UpdateReport) -> None:
        skipped = f"guard/skipped_{name}"
        self.values[skipped] = self.values.get(skipped, 0.0) + float(not math.isfinite(report.grad_norm))
        one = torch.ones([], dtype=torch.float64, device=self.mesh.device)
        for key, total in report.sums.items():
            # A loss is a share of the whole already; a pair is a sum and its count.
            pair = {f"loss/{key}": (total, one / self.mesh.dp)} if total.dim() == 0 else {key: total.unbind()}
            self.add_sums(pair)
        self.values[f"grad_norm/{name}"] = report.grad_norm
        self.values[f"lr/{name}"] = report.lr

    def add_sums(self, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Sums and counts travel; the division happens once, in `reduced_metrics`."""
        for key, (total, count) in pairs.items():
            before = self.sums.get(key, (0.0, 0.0))
            self.sums[key] = (before[0] + total, before[1] + count)

    def reduced_metrics(self) -> dict[str, float]:
        """Every metric of the step on the main rank; {} elsewhere. Call it on every rank."""
        on_leaders = reduce_metrics(self.rollout_sums, self.mesh.dp_group) if self.mesh.is_leader else {}
        on_last = reduce_metrics(self.sums, self.mesh.dp_group) if self.mesh.is_last_stage else {}
        if on_last.get("weight/mean_square"):
            on_last["weight/ess"] = on_last["weight/mean"] ** 2 / on_last["weight/mean_square"]
        on_last = self.mesh.object_from_last_stage(on_last)
        if not self.mesh.is_main:
            return {}
        return {**on_leaders, **on_last, **self.values}


def staleness(mini: Batch, version: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight versions between the actor that was synced last and the one that wrote each token."""
    behind = (version - mini.weight_version_MT)[mini.mask_MT]
    return {"staleness/mean": (behind.sum().double(), mini.mask_MT.sum().double())}


def _finish_device_work() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
