"""The methods of a run, built from the configuration once, and the controllers that move two of their
settings."""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from megatron_jackpot.algorithm.advantages import ADVANTAGES, Advantage
from megatron_jackpot.algorithm.aggregation import AGGREGATIONS, Aggregation
from megatron_jackpot.algorithm.controllers import AdaptiveDistill, TargetAcceptance
from megatron_jackpot.algorithm.correction_base import CorrectionMethod
from megatron_jackpot.algorithm.corrections import make_correction
from megatron_jackpot.algorithm.distill import DISTILL, Distillation
from megatron_jackpot.algorithm.filters import Filter, filtered, make_filters
from megatron_jackpot.algorithm.lengths import SoftOverlong
from megatron_jackpot.algorithm.objectives import OBJECTIVES
from megatron_jackpot.algorithm.objectives_base import Objective
from megatron_jackpot.algorithm.obrs import log_ratio
from megatron_jackpot.algorithm.registry import Registry, build
from megatron_jackpot.algorithm.tokens import SumOverBatch
from megatron_jackpot.config import Actor, Config, Method
from megatron_jackpot.config.agreement import refuse_other_numbers
from megatron_jackpot.config.load import examine
from megatron_jackpot.records import Correction, Metrics, Pair, Rollout, Scores
from megatron_jackpot.train.own_methods import try_out

M = TypeVar("M")
Controller = TargetAcceptance | AdaptiveDistill


@dataclass
class ActorMethods:
    """How the actor learns, of a run that has one."""

    objective: Objective
    rl_weight: float
    tis_cap: float
    """Cap of the importance weight on the actor's own loss (Eq. 6)."""
    distill: Distillation
    distill_weight: float
    """lambda_distill of the next mini-batch."""
    adaptive: AdaptiveDistill | None = None
    """Steers distill_weight, on the last pipeline stage."""

    def steer(self, kl: Pair, sum_over_batch: SumOverBatch) -> Metrics:
        """As `Methods.steer`, of the distillation weight."""
        if self.adaptive is None:
            return {}
        total, count = sum_over_batch(torch.stack(kl)).tolist()
        self.distill_weight = self.adaptive.update(total / count if count else math.nan)
        one = torch.ones_like(kl[1])
        return {"actor/distill_weight": (one * self.distill_weight, one)}


@dataclass
class Methods:
    """One of each kind. Raises ValueError from `from_config` for a method or setting that cannot work."""

    correction: CorrectionMethod
    filters: Sequence[Filter]
    objective: Objective
    advantage: Advantage
    aggregation: Aggregation
    overlong: SoftOverlong | None = None
    mask_truncated: bool = False
    actor: ActorMethods | None = None
    """None where the policy samples."""
    exact_lam: float | None = None
    """lam of a correction that needs Z over the whole vocabulary; None on every rank alike where none
    does."""
    acceptance: TargetAcceptance | None = None
    """Steers the correction's lam, on the last pipeline stage."""

    @classmethod
    def from_config(cls, config: Config) -> "Methods":
        made, mistakes = _make_methods(config)
        if mistakes:
            raise ValueError("\n".join(mistakes))
        correction, actor = made["correction"], None
        if config.actor is not None:
            actor = ActorMethods(
                objective=made["actor_objective"],
                rl_weight=config.actor.rl_weight,
                tis_cap=config.actor.tis_cap,
                distill=made["distill"],
                distill_weight=config.actor.distill_weight,
                adaptive=_steered_distillation(config.actor),
            )
        wanted = correction.target_acceptance
        return cls(
            correction=correction,
            filters=made["filters"],
            objective=made["objective"],
            advantage=made["advantage"],
            aggregation=made["aggregation"],
            overlong=made["overlong"],
            mask_truncated=config.algorithm.mask_truncated,
            actor=actor,
            exact_lam=correction.lam if correction.needs_exact_overlap else None,
            acceptance=None if wanted is None else TargetAcceptance(acceptance=wanted, lam=correction.lam),
        )

    @property
    def keeps_logits(self) -> bool:
        """Whether a distillation over the whole vocabulary asks for the policy's last hidden states."""
        return self.actor is not None and self.actor.distill.needs == "logits"

    def correct(self, scores: Scores, sum_over_batch: SumOverBatch) -> Correction:
        """The correction of a mini-batch with what the filters remove. Sums over the batch as the
        correction does."""
        found = self.correction(scores, sum_over_batch)
        return filtered(found, self.filters, scores, counts_all=self.correction.denominator == "all")

    def steer(self, scores: Scores, kl: Pair, sum_over_batch: SumOverBatch) -> Metrics:
        """Move lam and the distillation weight for the next mini-batch; what they are then, as metrics.

        `kl` is (sum, count) of KL(policy || server) on this rank. Sums over the batch once per controller.
        """
        if self.acceptance is not None:
            mask_MT, both = scores.batch.mask_MT, (scores.target_logp_MT, scores.batch.server_logp_MT)
            log_ratio_MT = log_ratio(*(torch.where(mask_MT, logp_MT, 0.0) for logp_MT in both))
            lam = self.acceptance.update(log_ratio_MT, mask_MT, sum_over_batch)
            self._use_lam(lam)
        return {} if self.actor is None else self.actor.steer(kl, sum_over_batch)

    def controllers(self) -> dict[str, Controller]:
        """name -> controller, those that the configuration asks for."""
        both = {"acceptance": self.acceptance, "adaptive": self.actor and self.actor.adaptive}
        return {name: controller for name, controller in both.items() if controller is not None}

    def load_controllers(self, states: Mapping[str, Mapping[str, float]]) -> None:
        """Continue where a checkpoint was taken; a controller that it does not know starts afresh."""
        for name, controller in self.controllers().items():
            if name in states:
                controller.load_state_dict(states[name])
        if self.acceptance is not None:
            self._use_lam(self.acceptance.lam)
        if self.actor is not None and self.actor.adaptive is not None:
            self.actor.distill_weight = self.actor.adaptive.weight

    def _use_lam(self, lam: float) -> None:
        self.correction = replace(self.correction, lam=lam)
        self.exact_lam = None if self.exact_lam is None else lam

    def with_advantages(
        self, groups: list[list[Rollout]], sum_over_batch: SumOverBatch, device: torch.device
    ) -> list[list[Rollout]]:
        """One DP leader's whole groups with their advantages, and no valid token where a response is not to
        train; every leader calls it, as some formulas look at the whole batch."""
        rewards = [[rollout.reward + self._punished(rollout) for rollout in group] for group in groups]
        of_groups = [self.advantage(own) for own in rewards]
        advantage_N = torch.cat([torch.empty(0), *of_groups]).to(device)
        rollouts = [rollout for group in groups for rollout in group]
        reward_N = torch.tensor([r for own in rewards for r in own], dtype=torch.float64, device=device)
        advantage_N = self.advantage.over_batch(advantage_N, reward_N, sum_over_batch)
        tokens = self.advantage.per_token(advantage_N, rollouts)
        values = iter(advantage_N.tolist() if tokens is None else [one.cpu().numpy() for one in tokens])
        return [[self._trained(rollout, next(values)) for rollout in group] for group in groups]

    def reward_metrics(self, groups: Sequence[Sequence[Rollout]]) -> dict[str, tuple[float, float]]:
        """(sum, count) of what is added to the rewards; none where nothing is."""
        if self.overlong is None:
            return {}
        punished = [self._punished(rollout) for group in groups for rollout in group]
        return {"reward/overlong": (sum(punished), len(punished))}

    def _punished(self, rollout: Rollout) -> float:
        return 0.0 if self.overlong is None else self.overlong(len(rollout.tokens))

    def _trained(self, rollout: Rollout, advantage: float | np.ndarray) -> Rollout:
        masked = self.mask_truncated and rollout.finish == "length"
        valid = np.zeros_like(rollout.valid) if masked else rollout.valid
        return replace(rollout, advantage=advantage, valid=valid)


def _build(chosen: Method, registry: Registry[M], where: str) -> M:
    return _tried(build(chosen.name, chosen.settings, registry, where), chosen, where)


def _overlong(config: Config) -> SoftOverlong | None:
    chosen = config.algorithm.overlong
    if chosen is None:
        return None
    try:
        return SoftOverlong(limit=config.rollout.max_new_tokens, **chosen.model_dump())
    except ValueError as error:
        raise ValueError(f"algorithm.overlong.{error}") from error


def _filters(chosen: Sequence[Method]) -> list[Filter]:
    where = "algorithm.filters"
    made = make_filters([(one.name, one.settings) for one in chosen], where)
    for index, (one, (_, method)) in enumerate(zip(chosen, made, strict=True)):
        _tried(method, one, f"{where}[{index}]")
    return made


def _tried(method: M, chosen: Method, where: str) -> M:
    """The method, tried out where it is one of the user's own."""
    if chosen.is_own:
        try_out(method, chosen.name, where)
    return method


def method_mistakes(config: Config) -> list[str]:
    """Everything that is wrong with the methods' settings and with methods that do not go together."""
    return _make_methods(config)[1]


def _make_methods(config: Config) -> tuple[dict[str, Any], list[str]]:
    """Field of Methods -> method, without those that could not be made; and why, a line for each mistake."""
    algorithm, actor = config.algorithm, config.actor
    chosen = algorithm.correction
    makers: dict[str, Callable[[], Any]] = {
        "correction": lambda: _tried(
            make_correction(chosen.name, chosen.settings, config.run.seed), chosen, "algorithm.correction"
        ),
        "filters": lambda: _filters(algorithm.filters),
        "objective": lambda: _build(algorithm.objective, OBJECTIVES, "algorithm.objective"),
        "advantage": lambda: _build(algorithm.advantage, ADVANTAGES, "algorithm.advantage"),
        "overlong": lambda: _overlong(config),
        "aggregation": lambda: _build(algorithm.aggregation, AGGREGATIONS, "algorithm.aggregation"),
    }
    together: list[Callable[[], object]] = []
    if actor is not None:
        makers |= {
            "actor_objective": lambda: _build(actor.objective, OBJECTIVES, "actor.objective"),
            "distill": lambda: _build(actor.distill, DISTILL, "actor.distill"),
        }
        together.append(lambda: _steered_distillation(actor))
    made: dict[str, Any] = {}
    mistakes: list[str] = []
    for name, make in makers.items():
        try:
            made[name] = make()
        except ValueError as error:
            mistakes.append(str(error))
    if "correction" in made and made["correction"].needs_exact_overlap:
        together.append(lambda: _check_exact(made["correction"], config))
    if {"correction", "objective"} <= made.keys():
        together.append(lambda: _check_corrected_once(made["correction"], made["objective"], config))
    if {"correction", "aggregation"} <= made.keys():
        together.append(lambda: _check_counted(made["correction"], made["aggregation"], config))
    if actor is not None and "actor_objective" in made:
        together.append(lambda: _check_actor_objective(made["actor_objective"], actor))
    for check in together:
        try:
            check()
        except ValueError as error:
            mistakes.append(str(error))
    return made, mistakes


def _steered_distillation(actor: Actor) -> AdaptiveDistill | None:
    if actor.distill_target_kl is None:
        return None
    try:
        return AdaptiveDistill(kl=actor.distill_target_kl, weight=actor.distill_weight)
    except ValueError as error:
        raise ValueError(f"actor.distill_target_kl with actor.distill_weight: {error}") from error


def _check_exact(correction: CorrectionMethod, config: Config) -> None:
    moving = config.algorithm.target == "current" or correction.target_acceptance is not None
    if moving and config.algorithm.num_minibatches > 1:
        raise ValueError(
            f"algorithm.correction.z = 'exact' is scored once per step, algorithm.num_minibatches = "
            f"{config.algorithm.num_minibatches} with a moving target or lam needs it per mini-batch. "
            "Use z='topk' or num_minibatches=1."
        )
    for mistake in refuse_other_numbers(config, "algorithm.correction.z = 'exact'", "z='topk'"):
        raise ValueError(mistake)


def _check_corrected_once(correction: CorrectionMethod, objective: Objective, config: Config) -> None:
    algorithm = config.algorithm
    if objective.corrects and correction.corrects:
        raise ValueError(
            f"algorithm.objective.name = '{algorithm.objective.name}' carries its own ratio to the server, "
            f"algorithm.correction.name = '{algorithm.correction.name}' would correct twice. Use correction "
            "none" + (", or objective anchor old." if hasattr(objective, "anchor") else ".")
        )


def _check_counted(correction: CorrectionMethod, aggregation: Aggregation, config: Config) -> None:
    if aggregation.counts_all and correction.denominator != "all":
        raise ValueError(
            f"algorithm.aggregation.name = '{config.algorithm.aggregation.name}' knows no removed tokens, "
            f"algorithm.correction.denominator = '{correction.denominator}' leaves them out of N. Set "
            "algorithm.correction.denominator to 'all'."
        )


def _check_actor_objective(objective: Objective, actor: Actor) -> None:
    if objective.corrects:
        raise ValueError(
            f"actor.objective.name = '{actor.objective.name}' carries its own ratio to the server, and the "
            "actor's "
            "loss is weighted by actor.tis_cap's already. Use ppo, gspo, cispo, opsm or reinforce."
        )
    if type(objective).prepare is not Objective.prepare:
        raise ValueError(
            f"actor.objective.name = '{actor.objective.name}' asks for numbers of the whole mini-batch, "
            "which are taken for the policy alone. Use ppo, gspo, cispo, opsm or reinforce."
        )


if __name__ == "__main__":  # The launcher's checks, in a child: the launcher itself loads no torch.
    examined, _ = examine(json.load(sys.stdin))  # What sections ask of each other is told already.
    json.dump([] if examined is None else method_mistakes(examined), sys.stdout)
