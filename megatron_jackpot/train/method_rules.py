"""Methods that do not go together, or not with the rest of the configuration."""

from collections.abc import Callable, Mapping

from megatron_jackpot.algorithm.advantages import GRPO, Advantage, DrGRPO, Reward
from megatron_jackpot.algorithm.aggregation import Aggregation, PromptMean
from megatron_jackpot.algorithm.allocators import Rescue
from megatron_jackpot.algorithm.allocators_base import Allocator
from megatron_jackpot.algorithm.correction_base import CorrectionMethod
from megatron_jackpot.algorithm.objectives_base import Objective
from megatron_jackpot.algorithm.objectives_regression import DMPO, AStarPO
from megatron_jackpot.algorithm.selectors import NonzeroStd
from megatron_jackpot.algorithm.selectors_base import Selector
from megatron_jackpot.config import Config
from megatron_jackpot.config.agreement import refuse_other_numbers


def disagreements(made: Mapping[str, object], config: Config) -> list[str]:
    """A line for each mistake; `made` are the methods that could be made, by the names of RULES."""
    mistakes = []
    for names, rule in RULES:
        if not made.keys() >= set(names):
            continue
        try:
            rule(*(made[name] for name in names), config)
        except ValueError as error:
            mistakes.append(str(error))
    return mistakes


def _exact(correction: CorrectionMethod, config: Config) -> None:
    if not correction.needs_exact_overlap:
        return
    moving = config.algorithm.target == "current" or correction.target_acceptance is not None
    if moving and config.algorithm.num_minibatches > 1:
        raise ValueError(
            f"algorithm.correction.z = 'exact' is scored once per step, algorithm.num_minibatches = "
            f"{config.algorithm.num_minibatches} with a moving target or lam needs it per mini-batch. "
            "Use z='topk' or num_minibatches=1."
        )
    for mistake in refuse_other_numbers(config, "algorithm.correction.z = 'exact'", "z='topk'"):
        raise ValueError(mistake)


def _corrected_once(correction: CorrectionMethod, objective: Objective, config: Config) -> None:
    algorithm = config.algorithm
    if objective.corrects and correction.corrects:
        raise ValueError(
            f"algorithm.objective.name = '{algorithm.objective.name}' accounts for the server's law by "
            f"itself, algorithm.correction.name = '{algorithm.correction.name}' would correct twice. Use "
            "correction none" + (", or objective anchor old." if hasattr(objective, "anchor") else ".")
        )


def _candidates(objective: Objective, config: Config) -> None:
    algorithm = config.algorithm
    moving = algorithm.target == "current" and algorithm.num_minibatches > 1
    if objective.needs_candidates and not objective.corrects and moving:
        raise ValueError(
            f"algorithm.objective.name = '{algorithm.objective.name}' compares with the policy at the start "
            "of the step at the candidates, which algorithm.target = 'current' scores anew with each of "
            f"algorithm.num_minibatches = {algorithm.num_minibatches}. Set algorithm.target to 'old'."
        )


def _counted(correction: CorrectionMethod, aggregation: Aggregation, config: Config) -> None:
    if aggregation.counts_all and correction.denominator != "all":
        raise ValueError(
            f"algorithm.aggregation.name = '{config.algorithm.aggregation.name}' knows no removed tokens, "
            f"algorithm.correction.denominator = '{correction.denominator}' leaves them out of N. Set "
            "algorithm.correction.denominator to 'all'."
        )


def _pruned(correction: CorrectionMethod, selector: Selector, config: Config) -> None:
    if selector.selects and selector.denominator == "full" and correction.denominator != "all":
        raise ValueError(
            f"algorithm.selector.denominator = 'full' of '{config.algorithm.selector.name}' counts rollouts "
            "that are not scored, of which nobody knows what algorithm.correction.denominator = "
            f"'{correction.denominator}' would leave out. Set algorithm.correction.denominator to 'all'."
        )


def _bounds(allocator: Allocator, config: Config) -> None:
    samples = config.rollout.samples_per_prompt
    least, most = allocator.bounds(samples)
    if not least <= samples <= most:
        raise ValueError(
            f"rollout.samples_per_prompt = {samples}: must lie in [{least}, {most}], what "
            f"rollout.allocator.name = '{config.rollout.allocator.name}' gives a prompt, as its budget is "
            "samples_per_prompt x prompts_per_step. Change it, or least and most."
        )
    if allocator.replaces and samples < 2:
        raise ValueError(
            f"rollout.samples_per_prompt = {samples}: must be >= 2 with rollout.allocator.name = "
            f"'{config.rollout.allocator.name}', as a group of one is never live. Use 8."
        )
    if isinstance(allocator, Rescue) and allocator.most <= samples:
        raise ValueError(
            f"rollout.allocator.most = {allocator.most}: must be > samples_per_prompt = {samples}, or "
            "no prompt ever gets more. Raise it, or use rollout.allocator 'fixed'."
        )


def _prompt_weight(aggregation: Aggregation, config: Config) -> None:
    if config.algorithm.prompt_weight == "equal" and isinstance(aggregation, PromptMean):
        raise ValueError(
            "algorithm.prompt_weight = 'equal' weighs prompts by their number of rollouts, which "
            "algorithm.aggregation.name = 'prompt' has done already. Set algorithm.prompt_weight to 'sample'."
        )


def _actor_objective(objective: Objective, config: Config) -> None:
    actor = config.actor
    assert actor is not None, "it has an objective only where there is one"
    if objective.corrects:
        raise ValueError(
            f"actor.objective.name = '{actor.objective.name}' accounts for the server's law by itself, and "
            "the actor's loss is weighted by actor.tis_cap's already. Use ppo, gspo, cispo, opsm or "
            "reinforce."
        )
    if objective.needs_candidates:
        raise ValueError(
            f"actor.objective.name = '{actor.objective.name}' looks at the candidates, at which the actor at "
            "the start of the step is not scored. Use approximation binary."
        )
    if type(objective).prepare is not Objective.prepare:
        raise ValueError(
            f"actor.objective.name = '{actor.objective.name}' asks for numbers of the whole mini-batch, "
            "which are taken for the policy alone. Use ppo, gspo, cispo, opsm or reinforce."
        )


def _reference(objective: Objective, config: Config) -> None:
    section, name = config.policy.reference, config.algorithm.objective.name
    if objective.needs_reference and section is None:
        raise ValueError(
            f"algorithm.objective.name = '{name}' compares with a frozen model, but policy.reference is "
            "null. Set policy.reference={} for the policy at the start, or policy.reference.hf=FOLDER."
        )
    if section is not None and section.refresh_every is not None and isinstance(objective, AStarPO):
        raise ValueError(
            f"algorithm.objective.name = '{name}' has values of one reference, but "
            f"policy.reference.refresh_every = {section.refresh_every} changes it. Set it to null."
        )
    if section is not None and config.algorithm.reference_kl is None and not objective.needs_reference:
        raise ValueError(
            f"policy.reference = {section.model_dump(mode='json')} is scored in every step, but "
            "algorithm.reference_kl is null: nothing would use it. Set algorithm.reference_kl.weight=1e-3 "
            "or policy.reference=null."
        )


def _fitted_rewards(objective: Objective, advantage: Advantage, selector: Selector, config: Config) -> None:
    """What a regression reads as a reward is one, in the units of its settings."""
    algorithm = config.algorithm
    if not isinstance(objective, DMPO | AStarPO):
        return
    name, where = algorithm.objective.name, f"algorithm.advantage.name = '{algorithm.advantage.name}'"
    centred = isinstance(advantage, DrGRPO) or (isinstance(advantage, GRPO) and advantage.std == "none")
    if not isinstance(advantage, Reward) and not (isinstance(objective, DMPO) and centred):
        raise ValueError(
            f"{where} is in other units than the rewards, which algorithm.objective.name = '{name}' fits. "
            "Use advantage reward" + (", or dr_grpo." if isinstance(objective, DMPO) else ".")
        )
    if isinstance(objective, DMPO) and selector.selects and not isinstance(selector, NonzeroStd):
        raise ValueError(
            f"algorithm.selector.name = '{algorithm.selector.name}' takes rollouts out of their groups, over "
            f"which algorithm.objective.name = '{name}' normalises. Use selector all or nonzero_std."
        )
    changed = algorithm.reference_kl is not None and algorithm.reference_kl.place == "reward"
    if isinstance(objective, AStarPO) and (changed or algorithm.overlong is not None):
        what = "reference_kl.place = 'reward'" if changed else "overlong"
        raise ValueError(
            f"algorithm.{what} changes the rewards, which algorithm.objective.values is made of without it. "
            "Set it to null."
        )


RULES: tuple[tuple[tuple[str, ...], Callable[..., None]], ...] = (
    (("correction",), _exact),
    (("correction", "objective"), _corrected_once),
    (("correction", "aggregation"), _counted),
    (("correction", "selector"), _pruned),
    (("objective",), _candidates),
    (("objective",), _reference),
    (("objective", "advantage", "selector"), _fitted_rewards),
    (("allocator",), _bounds),
    (("aggregation",), _prompt_weight),
    (("actor_objective",), _actor_objective),
)
"""Methods -> what must hold of them; a rule raises ValueError."""
