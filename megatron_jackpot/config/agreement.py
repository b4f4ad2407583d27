"""What the sections of the configuration ask of each other, check by check."""

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from megatron_jackpot.config.base import Check

if TYPE_CHECKING:
    from megatron_jackpot.config.schema import Config

LONGEST_RECOMPUTED = 256
"""Tokens of an answer above which recomputing it is no way any more: the cost grows with their square."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _cp(c: "Config") -> Iterator[str]:
    if c.parallel.cp != 1:
        yield f"parallel.cp = {c.parallel.cp}: packed context parallelism is missing. Set parallel.cp=1."


def _vpp(c: "Config") -> Iterator[str]:
    if c.parallel.vpp is not None and c.parallel.pp == 1:
        yield f"parallel.vpp = {c.parallel.vpp} needs parallel.pp > 1, got 1. Set parallel.vpp=null."


def _sequence_parallel(c: "Config") -> Iterator[str]:
    if c.parallel.sequence_parallel and c.parallel.tp == 1:
        yield "parallel.sequence_parallel = true needs parallel.tp > 1, got 1. Set it to false."


def _distributed_optimizer(c: "Config") -> Iterator[str]:
    if c.parallel.distributed_optimizer:
        return
    if c.parallel.overlap_param_gather:
        yield "parallel.overlap_param_gather = true needs parallel.distributed_optimizer=true."
    if c.precision.fp8_param:
        yield (
            "precision.fp8_param = true needs parallel.distributed_optimizer=true: Megatron's other "
            "optimizer does not know fp8 parameters."
        )


def _fp8_recipe(c: "Config") -> Iterator[str]:
    if c.precision.first_last_layers_bf16 and c.precision.fp8_recipe == "delayed":
        yield (
            "precision.first_last_layers_bf16 = true does not go with precision.fp8_recipe = 'delayed'. "
            "Use 'tensorwise' or 'blockwise'."
        )


def _quantization(c: "Config") -> Iterator[str]:
    if c.servers.quantization is not None and c.server_dtype != "bfloat16":
        yield (
            f"servers.quantization = '{c.servers.quantization}' needs servers.dtype='bfloat16' for what is "
            f"not quantised, got '{c.server_dtype}'. Set servers.dtype=bfloat16."
        )


def _offload(c: "Config") -> Iterator[str]:
    if c.parallel.offload_optimizer and c.precision.dtype != "bfloat16":
        yield (
            "parallel.offload_optimizer = true needs precision.dtype='bfloat16', got 'float32': there the "
            "optimizer's parameters are the model's own. Set it to false."
        )


def _ipc(c: "Config") -> Iterator[str]:
    if c.sync.method != "ipc":
        return
    strangers = [url for url in c.servers.urls if urlsplit(url).hostname not in LOOPBACK]
    if strangers:
        yield (
            "sync.method = 'ipc' needs servers on this node at a loopback address, but servers.urls has "
            f"{strangers[0]}. Set sync.method=broadcast."
        )
    if c.cluster.nodes > 1:
        yield (
            f"sync.method = 'ipc' reaches servers of one node, but cluster.nodes = {c.cluster.nodes}. "
            "Set sync.method=broadcast."
        )


def _urls(c: "Config") -> Iterator[str]:
    for url in c.servers.urls:
        try:
            parts = urlsplit(url)
            fits = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 0) >= 0
            rest = parts.path or parts.query or parts.fragment or parts.username
        except ValueError:
            fits, rest = False, ""
        if not fits or rest:
            yield (
                f"servers.urls has '{url}': must be http://HOST:PORT and no more, an IPv6 address in "
                "brackets. Write it so."
            )


def _packing(c: "Config") -> Iterator[str]:
    if c.packing.tokens == "auto":
        if c.servers.release_memory:
            yield (
                "packing.tokens = auto counts a GPU's memory as the trainer's own, but "
                "servers.release_memory = true. Set packing.tokens to a number."
            )
        return
    for section, limit in new_tokens(c).items():
        longest = c.data.max_prompt_tokens + limit
        if longest > c.packing.tokens:
            yield (
                f"packing.tokens = {c.packing.tokens} is smaller than data.max_prompt_tokens + "
                f"{section}.max_new_tokens = {longest}: a sequence must fit one micro-batch. Raise "
                "packing.tokens."
            )


def _learning_rates(c: "Config") -> Iterator[str]:
    for name, section in c.models.items():
        lr, min_lr = section.optimizer.lr, section.optimizer.min_lr
        if min_lr > lr:
            yield (
                f"{name}.optimizer.min_lr = {min_lr:g}, where a decay ends, is above {name}.optimizer.lr = "
                f"{lr:g}, where it begins. Lower min_lr, or raise lr."
            )


def _minibatches(c: "Config") -> Iterator[str]:
    n = c.algorithm.num_minibatches
    if c.rollout.prompts_per_step % n:
        yield (
            f"algorithm.num_minibatches = {n} does not divide rollout.prompts_per_step = "
            f"{c.rollout.prompts_per_step}. Change one of them."
        )


def _source(c: "Config") -> Iterator[str]:
    data = c.data
    if data.source == "jsonl" and data.path is None:
        yield "data.source = 'jsonl' needs data.path. Set data.path=FILE."
    if data.source == "reasoning_gym" and not data.tasks:
        yield "data.source = 'reasoning_gym' needs data.tasks, for example {chain_sum: {}}."
    if data.source == "jsonl" and c.evaluation.size and data.heldout_path is None:
        yield (
            f"evaluation.size = {c.evaluation.size} with data.source = 'jsonl' needs data.heldout_path. "
            "Set it, or evaluation.size=0."
        )
    if data.template is not None and "{question}" not in data.template:
        yield f"data.template = {data.template!r} does not contain {{question}}. Put it where the text goes."
    if data.template is not None and data.template_args:
        yield (
            f"data.template_args = {data.template_args} are the chat template's, but data.template is set. "
            "Remove one of them."
        )


def _one_model(c: "Config") -> Iterator[str]:
    if c.rollout.model == "policy" and c.actor is not None:
        yield (
            f"rollout.model = 'policy' leaves nothing to do for the actor of actor.hf = {c.actor.hf}. Set "
            "actor=null, or rollout.model=actor."
        )
    if c.actor is not None:
        return
    if c.rollout.model == "actor":
        yield (
            "rollout.model = 'actor' needs an actor, but actor is null. Set actor.hf=FOLDER, or "
            "rollout.model=policy."
        )
    if not c.algorithm.train_actor:
        yield "algorithm.train_actor = false freezes an actor, but actor is null. Set it to true."
    bounds = {"acceptance_floor": c.guard.acceptance_floor, "kl_ceiling": c.guard.kl_ceiling}
    for name, bound in bounds.items():
        if bound is not None:
            yield (
                f"guard.{name} = {bound} pauses the policy until the actor has followed it, but actor is "
                f"null: the pause would not end. Set guard.{name}=null."
            )


def _reference(c: "Config") -> Iterator[str]:
    kl = c.algorithm.reference_kl
    if kl is not None and c.policy.reference is None:
        yield (
            f"algorithm.reference_kl = {kl.model_dump(mode='json')} needs a model to stay near, but "
            "policy.reference is null. Set policy.reference={} for the policy at the start, or "
            "policy.reference.hf=FOLDER."
        )
    if c.policy.reference is not None and c.policy.reference.refresh_every and c.precision.fp8_param:
        yield "policy.reference.refresh_every takes weights that are no fp8. Set precision.fp8_param=false."
    if kl is not None and kl.place == "reward" and kl.estimator == "unbiased":
        yield (
            "algorithm.reference_kl.estimator = 'unbiased' is a form of the loss, but place = 'reward'. Set "
            "estimator=k1, or place=loss."
        )
    selector = c.algorithm.selector.name
    if kl is not None and kl.place == "reward" and selector != "all":
        yield (
            "algorithm.reference_kl.place = 'reward' is known after scoring, but algorithm.selector.name = "
            f"'{selector}' chooses by the rewards before it. Set place=loss, or selector=all."
        )


def _rewards(c: "Config") -> Iterator[str]:
    rewards = c.data.rewards
    for name in rewards:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            yield f"data.rewards has '{name}': letters, digits, '_' and '-' make a metric. Rename it."
    if c.algorithm.reward_parts == "singly" and len(rewards) < 2:
        yield (
            "algorithm.reward_parts = 'singly' needs several rewards, but data.rewards has "
            f"{len(rewards)}. Set algorithm.reward_parts=jointly."
        )


def _evaluation(c: "Config") -> Iterator[str]:
    e = c.evaluation
    for name in e.sets:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            yield f"evaluation.sets has '{name}': letters, digits, '_' and '-' make a metric. Rename it."
    if e.samples > 1 and e.temperature == 0:
        yield (
            f"evaluation.samples = {e.samples} needs evaluation.temperature > 0, got 0: greedy answers are "
            "all the same. Set evaluation.temperature=1."
        )
    if c.actor is None or not e.wanted or e.policy == "off":
        return
    if e.max_new_tokens > LONGEST_RECOMPUTED:
        yield (
            f"evaluation.max_new_tokens = {e.max_new_tokens} with evaluation.policy = 'recompute': for each "
            f"token the whole answer is computed anew, at most {LONGEST_RECOMPUTED} tokens. Lower it, or set "
            "evaluation.policy=off and judge checkpoints with `megatron-jackpot evaluate RUN`, which starts "
            "servers of the policy."
        )
    if e.temperature > 0:
        yield (
            f"evaluation.temperature = {e.temperature:g} with evaluation.policy = 'recompute', whose answers "
            "are greedy: the two models' accuracies would not compare. Set evaluation.temperature=0 and "
            "samples=1, or evaluation.policy=off and `megatron-jackpot evaluate RUN` for the policy."
        )


def _keep_best(c: "Config") -> Iterator[str]:
    run, every = c.run, c.evaluation.every
    if run.keep_best is None:
        return
    if run.save_every is None:
        yield f"run.keep_best = '{run.keep_best}' needs checkpoints to choose from. Set run.save_every."
        return
    if not run.keep_best.removeprefix("-").startswith("eval/"):
        return
    if not c.evaluation.wanted:
        yield f"run.keep_best = '{run.keep_best}', but nothing is evaluated. Set evaluation.size or sets."
    elif (first := math.lcm(run.save_every, every)) > run.steps:
        yield (
            f"run.keep_best = '{run.keep_best}' compares the checkpoints of steps that are evaluated, but "
            f"run.save_every = {run.save_every} and evaluation.every = {every} meet at step {first} first, "
            f"of {run.steps}. Set run.save_every={every}."
        )


def _ahead(c: "Config") -> Iterator[str]:
    ahead = c.rollout.ahead
    if c.rollout.max_staleness < ahead:
        yield (
            f"rollout.max_staleness = {c.rollout.max_staleness} is below rollout.ahead = {ahead}, which "
            f"makes tokens that old. Set rollout.max_staleness={ahead}, or lower ahead."
        )
    if ahead and c.servers.release_memory:
        yield (
            f"rollout.ahead = {ahead} has servers sample while the trainer learns, but "
            "servers.release_memory takes their memory then. Set one of them to 0 or false."
        )


def other_numbers(c: "Config") -> list[tuple[str, str]]:
    """(setting, remedy): why servers sample by other probabilities than the trainer gives the same weights,
    beyond what kernels differ by; nothing where q can be taken from its scores."""
    formats = {"servers.quantization": c.servers.quantization, "precision.fp8": c.precision.fp8}
    found = [(f"{name} = {value!r}", f"{name}=null") for name, value in formats.items() if value is not None]
    if c.server_dtype != c.precision.dtype:
        found.append((f"servers.dtype = {c.server_dtype!r}", "servers.dtype=null"))
    return found


def refuse_other_numbers(c: "Config", what: str, instead: str) -> Iterator[str]:
    """The mistake of a setting that takes q from scores where servers compute with other numbers."""
    reasons = other_numbers(c)
    if reasons:
        yield (
            f"{what} takes q from the trainer's scores, but servers compute with other numbers: "
            f"{', '.join(setting for setting, _ in reasons)}. Set "
            f"{', '.join(remedy for _, remedy in reasons)}, or {instead}."
        )


def _top_k_logp(c: "Config") -> Iterator[str]:
    if c.rollout.top_k_logp == 0:
        yield from refuse_other_numbers(c, "rollout.top_k_logp = 0", "rollout.top_k_logp=20")


def new_tokens(config: "Config") -> dict[str, int]:
    """Section -> the longest response that it asks for."""
    limits = {"rollout": config.rollout.max_new_tokens}
    if config.evaluation.wanted:
        limits["evaluation"] = config.evaluation.max_new_tokens
    return limits


AGREEMENT: tuple[Check["Config"], ...] = (
    Check("parallel.cp", "is 1: packed context parallelism is not supported", "set it to 1", _cp),
    Check("parallel.vpp", "goes with parallel.pp > 1", "set it to null", _vpp),
    Check("parallel.sequence_parallel", "goes with parallel.tp > 1", "set it to false", _sequence_parallel),
    Check(
        "parallel.overlap_param_gather, precision.fp8_param",
        "go with the distributed optimizer",
        "set parallel.distributed_optimizer=true",
        _distributed_optimizer,
    ),
    Check(
        "precision.first_last_layers_bf16",
        "does not go with the delayed recipe",
        "take another recipe",
        _fp8_recipe,
    ),
    Check("servers.quantization", "goes with bfloat16 servers", "set servers.dtype=bfloat16", _quantization),
    Check("parallel.offload_optimizer", "goes with bfloat16 training", "set it to false", _offload),
    Check("servers.urls", "are http://HOST:PORT, and no more", "write them so", _urls),
    Check("sync.method", "ipc reaches servers of this node alone", "set sync.method=broadcast", _ipc),
    Check(
        "rollout.model, actor",
        "are actor and a section, or policy and null; without an actor there is none to freeze, and no pause "
        "of the policy, which the actor's distillation would end",
        "set actor=null, rollout.model, algorithm.train_actor=true, guard.acceptance_floor=null, "
        "guard.kl_ceiling=null",
        _one_model,
    ),
    Check(
        "policy.reference, algorithm.reference_kl",
        "a KL has a reference; the form 'unbiased' is one of the loss; refresh_every takes no fp8 weights",
        "set both; estimator=k1 in the reward; precision.fp8_param=false",
        _reference,
    ),
    Check(
        "rollout.ahead",
        "is not above rollout.max_staleness, and 0 where servers lend their memory",
        "raise rollout.max_staleness, set servers.release_memory=false, or lower it",
        _ahead,
    ),
    Check(
        "rollout.top_k_logp",
        "is above 0 where servers sample with other numbers than the trainer scores: servers.quantization, "
        "precision.fp8, another servers.dtype",
        "set those to null, or rollout.top_k_logp=20",
        _top_k_logp,
    ),
    Check(
        "packing.tokens",
        "holds the longest prompt with the longest response, of rollouts and of evaluation; auto goes "
        "without servers.release_memory",
        "raise it, or lower data.max_prompt_tokens or max_new_tokens; set a number",
        _packing,
    ),
    Check(
        "evaluation.samples, evaluation.temperature, evaluation.max_new_tokens",
        "several answers are drawn at a temperature above 0; a policy that no server holds is recomputed, "
        "greedily and up to 256 tokens",
        "set evaluation.temperature, or evaluation.policy=off and use `megatron-jackpot evaluate RUN`",
        _evaluation,
    ),
    Check(
        "run.keep_best",
        "has checkpoints to choose from; of an evaluation, some whose step is evaluated",
        "set run.save_every to evaluation.every or a multiple of it",
        _keep_best,
    ),
    Check(
        "policy.optimizer.min_lr, actor.optimizer.min_lr",
        "is not above the same optimizer's lr",
        "lower it, or raise lr",
        _learning_rates,
    ),
    Check(
        "algorithm.num_minibatches", "divides rollout.prompts_per_step", "change one of them", _minibatches
    ),
    Check(
        "data.rewards, algorithm.reward_parts",
        "have names that make metrics; singly goes with several",
        "rename, or set jointly",
        _rewards,
    ),
    Check(
        "data.source, data.template",
        "have what they need: data.path and data.heldout_path, or data.tasks; {question}",
        "set it",
        _source,
    ),
)
