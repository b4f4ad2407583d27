"""step(): the paper, in order."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jackpot.algorithm.diagnostics import diagnostics, mean_over
from megatron_jackpot.config import Config
from megatron_jackpot.config.agreement import other_numbers
from megatron_jackpot.data.packing import Packer
from megatron_jackpot.models.engine import Loss
from megatron_jackpot.models.weight_ring import WeightRing
from megatron_jackpot.monitor.token_log import TokenLog
from megatron_jackpot.parallel.reduce import make_number_alike, make_sum_over
from megatron_jackpot.records import Aggregated, Batch, Correction, Rollout, Scores
from megatron_jackpot.rollout.collected import Collected, account
from megatron_jackpot.rollout.outcome import StopRun
from megatron_jackpot.rollout.pipeline import Pipeline
from megatron_jackpot.rollout.protocol import Source
from megatron_jackpot.run.interrupt import Stop, never
from megatron_jackpot.run.limits import behind
from megatron_jackpot.run.watchdog import Watchdog
from megatron_jackpot.train.curator import Trained
from megatron_jackpot.train.guard import RollBack
from megatron_jackpot.train.losses import TRAINED_GAP, actor_loss, policy_loss
from megatron_jackpot.train.pusher import Push, Pusher
from megatron_jackpot.train.reward_kl import with_kl_in_rewards
from megatron_jackpot.train.scoring import Scorer
from megatron_jackpot.train.state import TrainState
from megatron_jackpot.train.step_metrics import Agreed, StepMetrics, StepResult, staleness


class MiniBatch(NamedTuple):
    """One optimizer step's part of a batch."""

    batch: Batch
    microbatches: slice
    """Which of the step's micro-batches it holds."""
    scores: Scores | None
    """Of `batch`; None off the last pipeline stage."""


class Trainer:
    """The models and everything a step needs. `source` exists on DP leaders, `sync` on the main rank."""

    def __init__(
        self,
        config: Config,
        state: TrainState,
        *,
        source: Source | None = None,
        sync: Push | None = None,
        stop: Stop = never,
    ) -> None:
        mesh = state.mesh
        self.config, self.state, self.mesh = config, state, mesh
        self.policy, self.actor = state.policy, state.actor
        self.methods, self.guard = state.methods, state.guard
        self.source, self.sync, self.stop = source, sync, stop
        age = config.rollout.max_staleness
        asked = config.rollout.top_k_logp == 0 or state.methods.exact_lam is not None
        self.ring = WeightRing(state.served, age + 1) if asked and age else None
        """What older tokens were sampled with, where q is taken from scores."""
        self.watchdog = Watchdog(config.run.folder, dist.get_rank(), config.run.phase_timeout_s)
        self.pipeline = Pipeline(
            mesh,
            config.rollout,
            source,
            stop,
            state.finished_groups,
            limit_s=config.run.phase_timeout_s,
            in_flight=config.sync.in_flight,
            allocation=state.methods.allocation,
            known_since=lambda: self.ring.versions[0] if self.ring is not None and self.ring.versions else 0,
            phase=self.watchdog.phase,
        )
        shared = (config, state, self.pipeline, self.watchdog)
        self.pusher = Pusher(*shared, sync=sync, ring=self.ring)
        here = mesh.is_last_stage and mesh.tp_rank == 0 and mesh.dp_rank == 0
        self.tokens = TokenLog(config.run.folder, config.logging, here=here)
        self.scorer = Scorer(
            state.policy,
            state.actor,
            temperature=config.rollout.temperature,
            top_k=config.num_candidates,
            keep_head=state.methods.keeps_logits,
            reference=state.reference,
            ring=self.ring,
            servers_alike=not other_numbers(config),
        )
        self.packer = Packer(
            mesh,
            tokens=config.packing.size,
            enabled=config.packing.enabled,
            num_minibatches=config.algorithm.num_minibatches,
            vpp=config.parallel.vpp,
            window=config.packing.window,
        )
        self.sum_over_batch = make_sum_over(mesh.dp_group)
        self.number_alike = make_number_alike(mesh.dp_group)

    def step(self) -> StepResult:
        """One rollout batch: collect it, begin a later one, score, correct, update every model, sync."""
        measured = self.measurements()
        with measured.timer("step"):
            with measured.timer("rollout"):
                collected = self.collect()
                trained = self.curate(collected)
            with measured.timer("make_room"):
                self.make_room()
            self.learn(self.packed(trained), measured, None if collected is None else collected.groups)
            self.state.finish_step()
            with measured.timer("sync"):
                measured.values |= self.push()
        if collected is not None and trained is not None:
            measured.note_rollouts(collected, trained, self.mesh.dp)
        return StepResult(
            step=measured.step,
            metrics=measured.reduced(self.mesh),
            account=None if collected is None else account(self.mesh, collected),
            wrong=measured.wrong,
        )

    def learn(self, batch: Batch, measured: StepMetrics, groups: list[list[Rollout]] | None = None) -> None:
        """The paper's update on a batch packed of a leader's `groups`, which a KL in the rewards asks for."""
        with measured.timer("score"):
            old = self.scorer(
                batch,
                step=self.state.num_steps,
                served_version=self.state.num_steps,
                exact_lam=self.methods.exact_lam,
            )
            if self.methods.terms.in_reward:
                shared = (self.state.num_steps, self.methods, self.mesh, self.sum_over_batch, self.packer)
                batch, old, more = with_kl_in_rewards(batch, old, groups, *shared)
                measured.add(more)
        policy_moved = False
        for mini in self.minibatches(batch, old):
            with measured.timer("correct"):
                correction = self.correct(mini.scores)
                aggregated = self.aggregate(mini.scores, correction)
                self.measure(mini.scores, correction, aggregated, measured)
                agreed = self.agree(mini.scores, correction, aggregated)
                self.watch(agreed, measured)
            if agreed.num_valid == 0:
                measured.count("batch/skipped")
                continue
            if self.actor is not None:
                with measured.timer("update_actor"):
                    # Before the policy moves: the teacher is what was scored.
                    self.update_actor(mini, agreed.num_actor, measured)
            if agreed.num_policy > 0 and not self.guard.paused:
                with measured.timer("update_policy"):
                    self.update_policy(mini, aggregated, agreed, measured, first=not policy_moved)
                policy_moved = True

    def measurements(self) -> StepMetrics:
        """A new account of the step that comes next."""
        return StepMetrics(self.state.num_steps + 1, self.watchdog)

    def collect(self) -> Collected | None:
        """The DP leader's groups for this step, None on other ranks; those of `rollout.ahead` more steps are
        begun. Raises StopRun."""
        step, loader = self.state.num_steps + 1, self.state.loader
        for later in range(step, max(step, min(step + self.config.rollout.ahead, self.config.run.steps)) + 1):
            self.pipeline.start(later, loader)
        return self.pipeline.take(step, loader, recover=partial(self.push, mend=True))

    def curate(self, collected: Collected | None) -> Trained | None:
        """What of a leader's groups trains, with advantages and weights; every leader calls it."""
        if collected is None:
            return None
        key = (self.state.num_steps, self.sum_over_batch, self.mesh.device)
        return self.methods.curator(collected.groups, *key)

    def packed(self, trained: Trained | None) -> Batch:
        """On every rank; None but on leaders."""
        groups, pruned = (None, None) if trained is None else (trained.groups, trained.pruned)
        return self.packer.pack(groups, self.config.rollout.top_k_logp, pruned)

    def refuse_stop(self) -> None:
        """Raises StopRun on every rank when any of them was asked to save and end."""
        if self.mesh.largest(int(self.stop() is not None)):
            raise StopRun

    def minibatches(self, batch: Batch, old: Scores | None) -> Iterator[MiniBatch]:
        """With their scores: a slice, or for the target "current" a fresh pass of the policy."""
        for index, rows in enumerate(batch.minibatches()):
            scores = None if old is None else old.rows(rows.start, rows.stop)
            mini = batch.rows(rows.start, rows.stop) if scores is None else scores.batch
            if index > 0 and self.config.algorithm.target == "current":
                scores = self.scorer.retarget(scores, mini)
            yield MiniBatch(mini, rows, scores)

    def correct(self, scores: Scores | None) -> Correction | None:
        """The correction of a mini-batch; None off the last stage."""
        return None if scores is None else self.methods.correct(scores, self.sum_over_batch)

    def measure(
        self,
        scores: Scores | None,
        correction: Correction | None,
        aggregated: Aggregated | None,
        measured: StepMetrics,
    ) -> None:
        """Metrics and the token log of a mini-batch, and the controllers' move for the next one."""
        if scores is None or correction is None or aggregated is None:
            return
        self.tokens.note(measured.step, scores, correction)
        measured.add(correction.metrics)
        measured.add(diagnostics(scores, correction, self.sum_over_batch))
        measured.add(self.methods.steer(scores, correction.kl, aggregated, self.sum_over_batch))
        measured.add(staleness(scores.batch, self.state.num_steps, self.config.rollout.max_staleness))

    def aggregate(self, scores: Scores | None, correction: Correction | None) -> Aggregated | None:
        """The loss's weights and part of N of a mini-batch; None off the last stage."""
        if scores is None or correction is None:
            return None
        numbered = (self.sum_over_batch, self.number_alike)
        return self.methods.aggregation(scores.batch, correction, *numbered)

    def agree(
        self, scores: Scores | None, correction: Correction | None, aggregated: Aggregated | None
    ) -> Agreed:
        """The denominators and the guard's numbers, the same on every rank.

        Whether a mini-batch is trained on follows from the denominators, so every stage must know them before
        the next schedule starts. Reductions: 1 over dp; broadcasts: 1 over pp.
        """
        counts = torch.zeros(8, dtype=torch.float64, device=self.mesh.device)
        if scores is not None and correction is not None and aggregated is not None:
            mask_MT = scores.batch.mask_MT
            accepted = mean_over(correction.accept_MT, mask_MT)
            pruned, pruned_right = scores.batch.pruned_MP4[..., 2:].sum((0, 1))
            right = (mask_MT & scores.batch.correct_MT).sum() + pruned_right
            num_valid = mask_MT.sum()
            mine = (aggregated.count, num_valid, num_valid + pruned, right, *accepted, *correction.kl)
            counts = self.sum_over_batch(torch.stack([number.double() for number in mine]))
        num_policy, num_valid, num_actor, num_positive, *pairs = self.mesh.from_last_stage(counts).tolist()
        accepted, of, kl, kl_count = pairs
        return Agreed(
            num_policy=num_policy,
            num_valid=num_valid,
            num_actor=num_actor,
            num_positive=num_positive,
            acceptance=accepted / of if of else math.nan,
            kl=kl / kl_count if kl_count else math.nan,
        )

    def watch(self, agreed: Agreed, measured: StepMetrics) -> None:
        """Whether the policy may move. Raises RollBack, on every rank, for denominators that are not
        finite."""
        if not (math.isfinite(agreed.num_policy) and math.isfinite(agreed.num_valid)):
            raise RollBack(
                f"step {self.state.num_steps}: denominators are not finite: {agreed.num_policy}, "
                f"{agreed.num_valid}."
            )
        if agreed.num_valid:
            self.guard.watch(agreed.acceptance, agreed.kl)
            measured.values["guard/paused"] = float(self.guard.paused)

    def update_actor(self, mini: MiniBatch, denominator: float, measured: StepMetrics) -> None:
        if not self.config.algorithm.train_actor:
            return
        actor, methods = self.actor, self.methods.actor
        assert actor is not None and methods is not None, "only where there is an actor"
        loss: Loss | None = None
        if mini.scores is not None:
            loss = actor_loss(
                mini.scores,
                methods,
                denominator,
                self.scorer.vocab(actor),
                self.scorer.teacher(mini.microbatches),
                rl_weight=0.0 if self.guard.paused else methods.rl_weight,
            )
        report = actor.update(mini.batch, loss, partial(self.guard.may_step, "actor"))
        measured.note_update("actor", report, self.mesh)

    def update_policy(
        self,
        mini: MiniBatch,
        aggregated: Aggregated | None,
        agreed: Agreed,
        measured: StepMetrics,
        *,
        first: bool,
    ) -> None:
        """`first`: the policy has not moved since it was scored."""
        loss: Loss | None = None
        if mini.scores is not None and aggregated is not None:
            objective = self.methods.objective.prepare(mini.scores, self.sum_over_batch, self.number_alike)
            vocab = self.scorer.vocab(self.policy)
            terms = self.methods.terms.weights(agreed.num_actor, agreed.num_positive)
            loss = policy_loss(mini.scores, aggregated, agreed.num_policy, objective, vocab, terms)
        report = self.policy.update(mini.batch, loss, partial(self.guard.may_step, "policy"))
        gap = report.sums.pop(TRAINED_GAP, None)
        measured.note_update("policy", report, self.mesh)
        if gap is not None and first:
            measured.add({TRAINED_GAP: (gap[0], gap[1])})
            self.check_trained_gap(gap)

    def check_trained_gap(self, gap: Tensor) -> None:
        """Refuse numerics in which training sees other log-probs than scoring did, of the same weights.

        Under delayed fp8 scaling the scales move between the two passes. Raises RuntimeError above
        precision.max_trained_gap, and for NaN.
        """
        mean, largest = float(gap[0] / gap[1].clamp(min=1)), self.config.precision.max_trained_gap
        if not 0 <= mean <= largest:
            raise RuntimeError(
                f"step {self.state.num_steps}: {TRAINED_GAP} = {mean:.4g} in the first mini-batch, above "
                f"precision.max_trained_gap = {largest}. Use another precision.fp8_recipe ('tensorwise', "
                "'blockwise'), or bf16."
            )

    def make_room(self) -> None:
        """After the rollout: servers that lend the trainer memory do so, and optimizer state comes."""
        if self.config.servers.release_memory:
            phase_s = self.config.run.phase_timeout_s
            self.mesh.wait_for_leaders(f"room-{self.state.num_steps}", behind(phase_s))
            if self.sync is not None:
                self.sync.release()
            self.mesh.barrier()
        for model in self.state.models.values():
            model.reload()

    @contextmanager
    def room_to_save(self) -> Iterator[None]:
        """After a step: as `make_room` within. Servers that lent their memory get their weights again."""
        self.make_room()
        yield
        if self.config.servers.release_memory:
            self.push()
        elif self.config.parallel.offload_optimizer:
            for model in self.state.models.values():
                model.offload()

    def push(self, *, mend: bool = False) -> dict[str, float]:
        """The served model's weights to the servers, as `Pusher` does it."""
        return self.pusher(mend=mend)
