"""The methods of a run, built from the configuration once, and the controllers that move some of
their settings."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from megatron_jackpot.algorithm.advantages import ADVANTAGES
from megatron_jackpot.algorithm.aggregation import AGGREGATIONS, Aggregation
from megatron_jackpot.algorithm.allocators import ALLOCATORS
from megatron_jackpot.algorithm.controllers import SteeredWeight, TargetAcceptance
from megatron_jackpot.algorithm.correction_base import CorrectionMethod
from megatron_jackpot.algorithm.corrections import make_correction
from megatron_jackpot.algorithm.distill import DISTILL, Distillation
from megatron_jackpot.algorithm.filters import Filter, filtered, make_filters
from megatron_jackpot.algorithm.lengths import SoftOverlong
from megatron_jackpot.algorithm.objectives import OBJECTIVES
from megatron_jackpot.algorithm.objectives_base import Objective
from megatron_jackpot.algorithm.obrs import log_ratio
from megatron_jackpot.algorithm.registry import Registry, build
from megatron_jackpot.algorithm.reward_parts import RewardParts
from megatron_jackpot.algorithm.selectors import SELECTORS
from megatron_jackpot.algorithm.tokens import SumOverBatch
from megatron_jackpot.config import Actor, Config, Method
from megatron_jackpot.config.load import examine
from megatron_jackpot.records import Aggregated, Correction, Metrics, Pair, Scores
from megatron_jackpot.rollout.allocation import Allocation
from megatron_jackpot.train.curator import Curator
from megatron_jackpot.train.method_rules import disagreements
from megatron_jackpot.train.own_methods import try_out
from megatron_jackpot.train.terms import Terms, move, number

M = TypeVar("M")
Controller = TargetAcceptance | SteeredWeight


@dataclass
class ActorMethods:
    """How the actor learns, of a run that has one."""

    objective: Objective
    rl_weight: float
    tis_cap: float
    """Cap of the importance weight on the actor's own loss (Eq. 6)."""
    distill: Distillation
    distill_weight: float
    """lambda_distill of the next update."""
    adaptive: SteeredWeight | None = None
    """Steers distill_weight, on the last pipeline stage."""

    def steer(self, kl: Pair, sum_over_batch: SumOverBatch) -> Metrics:
        """As `Methods.steer`, of the distillation weight."""
        if self.adaptive is None:
            return {}
        self.distill_weight = move(self.adaptive, kl, sum_over_batch)
        return {"actor/distill_weight": number(self.distill_weight, kl)}


@dataclass
class Methods:
    """One of each kind. Raises ValueError from `from_config` for a method or setting that cannot work."""

    correction: CorrectionMethod
    filters: Sequence[Filter]
    objective: Objective
    curator: Curator
    allocation: Allocation
    aggregation: Aggregation
    terms: Terms
    """What is added to the policy's loss."""
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
                adaptive=made["adaptive"],
            )
        wanted = correction.target_acceptance
        return cls(
            correction=correction,
            filters=made["filters"],
            objective=made["objective"],
            curator=Curator(
                advantage=made["advantage"],
                selector=made["selector"],
                seed=config.run.seed,
                prompt_weight=config.algorithm.prompt_weight,
                overlong=made["overlong"],
                mask_truncated=config.algorithm.mask_truncated,
                parts=RewardParts(
                    weights={name: part.weight for name, part in config.data.rewards.items()},
                    singly=config.algorithm.reward_parts == "singly",
                ),
            ),
            allocation=Allocation(made["allocator"], config.rollout.samples_per_prompt),
            aggregation=made["aggregation"],
            terms=made["terms"],
            actor=actor,
            exact_lam=correction.lam if correction.needs_exact_overlap else None,
            acceptance=None if wanted is None else TargetAcceptance(acceptance=wanted, lam=correction.lam),
        )

    @property
    def keeps_logits(self) -> bool:
        """Whether a distillation over the whole vocabulary asks for the policy's last hidden states."""
        return self.actor is not None and self.actor.distill.needs == "logits"

    def correct(self, scores: Scores, sum_over_batch: SumOverBatch) -> Correction:
        """The correction of a mini-batch with what the filters remove. Sums over the batch as they do."""
        found = self.correction(scores, sum_over_batch)
        counts_all = self.correction.denominator == "all"
        return filtered(found, self.filters, scores, sum_over_batch, counts_all=counts_all)

    def steer(
        self, scores: Scores, kl: Pair, aggregated: Aggregated, sum_over_batch: SumOverBatch
    ) -> Metrics:
        """Move lam for the next mini-batch, and the weights that are steered for this one's update, which
        comes after; what they are then, as metrics.

        `kl` is (sum, count) of KL(policy || server) on this rank. Sums over the batch once per controller.
        """
        if self.acceptance is not None:
            mask_MT, both = scores.batch.mask_MT, (scores.target_logp_MT, scores.batch.server_logp_MT)
            log_ratio_MT = log_ratio(*(torch.where(mask_MT, logp_MT, 0.0) for logp_MT in both))
            lam = self.acceptance.update(log_ratio_MT, mask_MT, sum_over_batch)
            self._use_lam(lam)
        added = self.terms.steer(scores, aggregated, sum_over_batch)
        return added if self.actor is None else added | self.actor.steer(kl, sum_over_batch)

    def controllers(self) -> dict[str, Controller]:
        """name -> controller, those that the configuration asks for."""
        known = {"acceptance": self.acceptance, "adaptive": self.actor and self.actor.adaptive}
        known |= self.terms.controllers()
        return {name: controller for name, controller in known.items() if controller is not None}

    def load_controllers(self, states: Mapping[str, Mapping[str, float]]) -> None:
        """Continue where a checkpoint was taken; a controller that it does not know starts afresh."""
        for name, controller in self.controllers().items():
            if name in states:
                controller.load_state_dict(states[name])
        if self.acceptance is not None:
            self._use_lam(self.acceptance.lam)
        if self.actor is not None and self.actor.adaptive is not None:
            self.actor.distill_weight = self.actor.adaptive.weight
        self.terms.use_controllers()

    def _use_lam(self, lam: float) -> None:
        self.correction = replace(self.correction, lam=lam)
        self.exact_lam = None if self.exact_lam is None else lam


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
        "selector": lambda: _build(algorithm.selector, SELECTORS, "algorithm.selector"),
        "allocator": lambda: _build(config.rollout.allocator, ALLOCATORS, "rollout.allocator"),
        "overlong": lambda: _overlong(config),
        "terms": lambda: Terms.from_config(config),
        "aggregation": lambda: _build(algorithm.aggregation, AGGREGATIONS, "algorithm.aggregation"),
    }
    if actor is not None:
        makers |= {
            "actor_objective": lambda: _build(actor.objective, OBJECTIVES, "actor.objective"),
            "distill": lambda: _build(actor.distill, DISTILL, "actor.distill"),
            "adaptive": lambda: _steered_distillation(actor),
        }
    made: dict[str, Any] = {}
    mistakes: list[str] = []
    for name, make in makers.items():
        try:
            made[name] = make()
        except ValueError as error:
            mistakes.append(str(error))
    return made, mistakes + disagreements(made, config)


def _steered_distillation(actor: Actor) -> SteeredWeight | None:
    if actor.distill_target_kl is None:
        return None
    try:
        return SteeredWeight(wanted=actor.distill_target_kl, weight=actor.distill_weight)
    except ValueError as error:
        raise ValueError(f"actor.distill_target_kl with actor.distill_weight: {error}") from error


if __name__ == "__main__":  # The launcher's checks, in a child: the launcher itself loads no torch.
    examined, _ = examine(json.load(sys.stdin))  # What sections ask of each other is told already.
    json.dump([] if examined is None else method_mistakes(examined), sys.stdout)
