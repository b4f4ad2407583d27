"""What a method of the user's own must do before it trains anything: a call on random scores, on the CPU.

Shapes: M micro-batches of T tokens, K the server's or the policy's top-k, V the vocabulary of the trial. The
scores are those of three random models over one small vocabulary; what a run hands over detached carries
gradient here, so that a weight or a teacher through which gradient would flow is found.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_jackpot.algorithm.advantages import GRPO, Advantage
from megatron_jackpot.algorithm.aggregation import Aggregation
from megatron_jackpot.algorithm.allocators_base import Allocator, Memory
from megatron_jackpot.algorithm.candidates import make_scores, union_of_candidates
from megatron_jackpot.algorithm.correction_base import CorrectionMethod
from megatron_jackpot.algorithm.distill import Distillation, distill_inputs
from megatron_jackpot.algorithm.importance import MaskedIS
from megatron_jackpot.algorithm.objectives_base import Objective, at_candidates, objective_inputs
from megatron_jackpot.algorithm.registry import check_choice, shown
from megatron_jackpot.algorithm.selectors_base import Group, Selection, Selector
from megatron_jackpot.data.packing import make_batch, pack_row, stack_rows
from megatron_jackpot.parallel.divergence import vocab_parallel_kl
from megatron_jackpot.parallel.reduce import make_number_alike, make_sum_over
from megatron_jackpot.parallel.vocab import vocab_parallel_logp_at
from megatron_jackpot.parallel.vocab_spec import VocabSpec
from megatron_jackpot.records import Aggregated, Correction, Direction, Metrics, Prompt, Rollout, Scores

V, T, K = 40, 64, 4
REWARDS = ([1.0, 0.0, 0.5, -1.0, 1.0], [1.0, 1.0, 1.0], [0.3])
"""Of groups that differ, that do not, and of one completion."""
MOST_ROLLOUTS = 10_000
"""Of one prompt in a trial, before a rule counts as endless."""
WIDE = (torch.float32, torch.float64)

sum_over_batch = make_sum_over(None)
number_alike = make_number_alike(None)


class Broken(Exception):
    """A rule that the method does not keep; the message goes on after the method's name."""


def try_out(method: object, name: str, where: str) -> None:
    """Raises ValueError naming `where`, the method, and the rule that its trial found broken or its error."""
    try:
        TRIALS[where.partition("[")[0]](method)
    except Broken as error:
        raise ValueError(f"{where}.name = '{name}': {error}") from error
    except Exception as error:
        raise ValueError(f"{where}.name = '{name}' fails on random scores.\n{shown()}") from error


def try_correction(method: CorrectionMethod) -> None:
    """keep, weight and count of two calls: shapes, dtypes, finite, constant, and the same both times."""
    if method.target_acceptance is not None and "lam" not in {item.name for item in fields(method)}:
        raise Broken("with target_acceptance it must have a field lam, which is steered. Add it.")
    scores = random_scores(exact=method.needs_exact_overlap)
    found, again = (method(scores, sum_over_batch) for _ in range(2))
    if not isinstance(found, Correction):
        raise Broken(f"must return a Correction, got {type(found).__name__}. End it with `corrected(...)`.")
    shape, mask_MT = scores.batch.mask_MT.shape, scores.batch.mask_MT
    _check("keep_MT", found.keep_MT, shape, (torch.bool,))
    _check("weight_MT", found.weight_MT, shape, (torch.float32,))
    _check("counted_MT", found.counted_MT, shape, (torch.float64,))
    _check_finite("accept_MT", found.accept_MT)
    if found.weight_MT.requires_grad or found.counted_MT.requires_grad:
        raise Broken("its weight_MT carries gradient, must be a constant. Put @torch.no_grad() on __call__.")
    if (found.keep_MT & ~mask_MT).any():
        raise Broken("keeps tokens outside batch.mask_MT, which no model scored. And keep_MT with the mask.")
    if (found.counted_MT < 0).any():
        raise Broken("its counted_MT is negative somewhere, must be what a token counts in N. Count masks.")
    _check_metrics({"kl": found.kl, **found.metrics})
    if not (torch.equal(found.keep_MT, again.keep_MT) and torch.equal(found.weight_MT, again.weight_MT)):
        raise Broken(
            "gives another result when it is called again: tensor-parallel ranks would disagree. Draw with "
            "megatron_jackpot.algorithm.obrs.counter_uniform."
        )


def try_aggregation(method: Aggregation) -> None:
    """keep, weight and count for a correction that removes some tokens."""
    scores = random_scores()
    correction = MaskedIS(cap=1.5)(scores, sum_over_batch)
    found = method(scores.batch, correction, sum_over_batch, number_alike)
    if not isinstance(found, Aggregated):
        raise Broken(f"must return an Aggregated, got {type(found).__name__}. Write `shares` alone.")
    shape = scores.batch.mask_MT.shape
    _check("keep_MT", found.keep_MT, shape, (torch.bool,))
    _check("weight_MT", found.weight_MT, shape, (torch.float32,))
    _check("count", found.count, (), (torch.float64,))
    if found.count < 0:
        raise Broken(f"count = {found.count.item():g}: must be >= 0, this rank's part of N. Count masks.")


def try_objective(method: Objective) -> None:
    """Surrogate, removed tokens and metrics of every micro-batch, and gradient into the live log-probs."""
    scores = random_scores()
    scores = replace(scores, reference_logp_MT=0.8 * scores.policy_logp_MT.detach())
    prepared = method.prepare(scores, sum_over_batch, number_alike)
    if not isinstance(prepared, Objective):
        raise Broken(f"prepare must return an Objective, got {type(prepared).__name__}. Return self.")
    old_MT = scores.policy_logp_MT.detach()
    for m in range(len(old_MT)):
        live_T = (old_MT[m] + 0.3 * _randn(T, seed=10 + m)).clamp(max=-1e-3).requires_grad_()
        candidates = at_candidates(scores, m, 0.9 * scores.candidate_target_logp_MTK[m] - 0.1)
        inputs = objective_inputs(
            live_T,
            old_MT[m],
            scores.batch,
            m,
            candidates=candidates if prepared.needs_candidates else None,
            reference_logp_T=0.8 * old_MT[m] if prepared.needs_reference else None,
        )
        surrogate_T = prepared.surrogate(inputs)
        _check("surrogate", surrogate_T, (T,), WIDE)
        if (surrogate_T.detach()[~inputs.valid_T] != 0).any():
            raise Broken(
                "its surrogate is not 0 outside t.valid_T. Multiply with what is 0 there, t.advantage_T."
            )
        _check_gradient(surrogate_T, live_T, "t.logp_T")
        _check("removed", prepared.removed(inputs), (T,), (torch.bool,))
        _check_metrics(prepared.metrics(inputs))


def try_advantage(method: Advantage) -> None:
    """Advantages of groups that differ, that do not, and of one completion; then over the batch, and of each
    token."""
    of_groups = []
    for rewards in REWARDS:
        of_groups.append(method(rewards))
        _check(f"advantages of rewards {rewards}", of_groups[-1], (len(rewards),), (torch.float32,))
    together_N = torch.cat(of_groups)
    reward_N = torch.tensor([reward for rewards in REWARDS for reward in rewards], dtype=torch.float64)
    made_N = method.over_batch(together_N, reward_N, sum_over_batch)
    _check("over_batch", made_N, together_N.shape, (torch.float32,))
    random = np.random.default_rng(0)
    rollouts = [_random_rollout(prompt, 0, random) for prompt in range(len(made_N))]
    tokens = method.per_token(made_N, rollouts)
    if tokens is None:
        return
    if len(tokens) != len(rollouts):
        raise Broken(
            f"per_token returns {len(tokens)} tensors, must be {len(rollouts)}. One for each rollout."
        )
    for rollout, own_R in zip(rollouts, tokens, strict=True):
        _check("a result of per_token", own_R, (len(rollout.tokens),), (torch.float32,))


def try_selector(method: Selector) -> None:
    """Which rollouts train, of groups that differ, that do not, and of one rollout; twice the same."""
    for rewards in REWARDS:
        found, again = (method(_random_group(rewards)) for _ in range(2))
        if not isinstance(found, Selection):
            raise Broken(f"must return a Selection, got {type(found).__name__}. Return chosen(index_S).")
        index_S, num = found.index_S, len(found.index_S)
        _check("index_S", index_S, (num,), (torch.int64,))
        _check("weight_S", found.weight_S, (num,), (torch.float64,))
        if found.advantage_S is not None:
            _check("advantage_S", found.advantage_S, (num,), (torch.float32,))
        if not set(index_S.tolist()) <= set(range(len(rewards))) or (index_S.diff() <= 0).any():
            raise Broken(f"index_S = {index_S.tolist()}: must ascend within the group. Sort it.")
        if (found.weight_S <= 0).any():
            raise Broken("weight_S must be > 0 everywhere. Leave a rollout out of index_S instead.")
        same = torch.equal(index_S, again.index_S) and torch.equal(found.weight_S, again.weight_S)
        if not same:
            raise Broken("gives another result when it is called again. Draw with group.draw_N.")


def _random_group(rewards: Sequence[float]) -> Group:
    reward_N = torch.tensor(rewards, dtype=torch.float64)
    return Group(
        reward_N=reward_N,
        correct_N=reward_N >= 1,
        advantage_N=GRPO()(reward_N),
        num_tokens_N=torch.arange(len(rewards)) + 5,
        draw_N=torch.arange(len(rewards)).double() * 0.37 % 1,
    )


def try_allocator(method: Allocator) -> None:
    """A plan of six prompts that holds the budget, rounds that end, verdicts, numbers of further prompts, and
    groups that are there."""
    ids, samples, memory = list(range(6)), 8, Memory()
    method.observe([(number, number, 8) for number in ids[:4]], memory)
    plan = method.plan(ids, samples, memory)
    if len(plan) != len(ids) or not all(isinstance(n, int) and n >= 1 for n in plan):
        raise Broken(f"plan = {plan}: must be an int >= 1 for each prompt. Return one.")
    if sum(plan) != samples * len(ids):
        raise Broken(
            f"plan = {plan} adds up to {sum(plan)}, must be {samples * len(ids)}. Share out the rest."
        )
    for verdict in (False, True):
        verdicts = [verdict] * samples
        while (more := method.more(verdicts)) > 0:
            verdicts += [verdict] * more
            if len(verdicts) > MOST_ROLLOUTS:
                raise Broken(f"more never returns 0 where all are {verdict}. Set it a limit.")
    for rewards in REWARDS:
        verdict = method.live(rewards, [reward >= 1 for reward in rewards])
        if not isinstance(verdict, bool | np.bool_):
            raise Broken(f"live = {verdict!r} of rewards {rewards}: must be a bool. Return one.")
    for num_live in range(len(ids) + 1):
        try:
            further = method.fetch(len(ids), num_live, 1)
        except RuntimeError:
            # As dynamic_sampling's `fail`: that the run ends is its decision.
            continue
        if not isinstance(further, int) or further < 0:
            raise Broken(
                f"fetch = {further!r} where {num_live} of {len(ids)} groups are live: must be an int >= 0. "
                "Return 0 to end the step."
            )
    kept = method.commit([True, False, True, True], 3)
    if not set(kept) <= {0, 1, 2, 3} or kept != sorted(set(kept)):
        raise Broken(f"commit = {kept}: must ascend within the groups. Sort it.")


def try_distillation(method: Distillation) -> None:
    """Loss per token, and gradient into the actor's log-probs alone."""
    check_choice("needs", method.needs, ("sampled", "candidates", "logits"))
    scores, vocab = random_scores(), VocabSpec(V, None)
    for m, labels_T in enumerate(scores.batch.labels_MT):
        actor_TV, policy_TV = (_randn(T, V, seed=seed + m) for seed in (20, 30))
        ids_TK = labels_T[:, None]
        if method.needs == "candidates":
            ids_TK = torch.cat([ids_TK, scores.candidate_ids_MTK[m]], dim=-1)
        actor_logp_TK = vocab_parallel_logp_at(actor_TV.requires_grad_(), ids_TK, vocab)

        def kl(direction: Direction, actor_TV: Tensor = actor_TV, policy_TV: Tensor = policy_TV) -> Tensor:
            if method.needs != "logits":
                raise Broken(f"calls t.kl, needs = '{method.needs}'. Declare needs = 'logits'.")
            return vocab_parallel_kl(actor_TV, policy_TV, vocab, direction=direction)

        loss_T = method(distill_inputs(actor_logp_TK, scores, m, kl))
        _check_form("its loss", loss_T, (T,), WIDE)
        counted_T = torch.where(scores.batch.mask_MT[m], loss_T, 0.0)
        _check_finite("its loss", counted_T)
        _check_gradient(counted_T, actor_TV, "the actor's log-probs")
        teacher = (scores.policy_logp_MT, scores.candidate_target_logp_MTK)
        reached = torch.autograd.grad(counted_T.sum(), teacher, retain_graph=True, allow_unused=True)
        if any(grad is not None and (grad != 0).any() for grad in reached):
            raise Broken(
                "sends gradient into the policy's log-probs, must be the actor's alone. Detach them."
            )


TRIALS: dict[str, Callable[[Any], None]] = {
    "algorithm.correction": try_correction,
    "algorithm.filters": try_correction,
    "algorithm.objective": try_objective,
    "algorithm.advantage": try_advantage,
    "algorithm.selector": try_selector,
    "algorithm.aggregation": try_aggregation,
    "rollout.allocator": try_allocator,
    "actor.objective": try_objective,
    "actor.distill": try_distillation,
}
"""Place in the configuration, without its index -> the trial of what is chosen there."""


def random_scores(*, exact: bool = False) -> Scores:
    """Two micro-batches of random rollouts under three random models; the policy's log-probs carry gradient.

    `exact` adds Z over the whole vocabulary at lam 1.
    """
    random = np.random.default_rng(0)
    rollouts = [_random_rollout(prompt, sample, random) for prompt in range(3) for sample in range(2)]
    rows = [pack_row(rollouts[i : i + 3], T, K, first_segment=i) for i in (0, 3)]
    batch = make_batch(stack_rows(rows))
    policy_MTV, actor_MTV = (_randn(len(rows), T, V, seed=seed).log_softmax(-1) for seed in (1, 2))
    labels_MT1, server_ids_MTK = batch.labels_MT[..., None], batch.topk_ids_MTK
    topk_logp_MTK, topk_ids_MTK = policy_MTV.topk(K)
    policy = dict(
        logp=policy_MTV.gather(-1, labels_MT1)[..., 0].requires_grad_(),
        server_ids_logp=policy_MTV.gather(-1, server_ids_MTK.clamp(min=0)).requires_grad_(),
        topk_logp=topk_logp_MTK.requires_grad_(),
        topk_ids=topk_ids_MTK,
        entropy=-(policy_MTV.exp() * policy_MTV).sum(-1),
    )
    ids_MTC = union_of_candidates(server_ids_MTK, topk_ids_MTK)
    actor = dict(
        logp=actor_MTV.gather(-1, labels_MT1)[..., 0],
        topk_logp=actor_MTV.gather(-1, ids_MTC[..., K:].clamp(min=0)),
    )
    if exact:
        actor["exact_overlap"] = torch.minimum(policy_MTV, actor_MTV).exp().sum(-1)
    return make_scores(batch, ids_MTC, policy, actor, versions=(0,), step=0)


def _random_rollout(prompt: int, sample: int, random: np.random.Generator) -> Rollout:
    """5 to 12 tokens of one random distribution each; the second one of some could not be scored."""
    length = int(random.integers(5, 13))
    logits_RV = random.normal(size=(length, V)).astype(np.float32)
    logp_RV = logits_RV - np.log(np.exp(logits_RV).sum(-1, keepdims=True))
    # The largest of log p plus Gumbel noise is a draw from p.
    tokens = (logp_RV + random.gumbel(size=logp_RV.shape)).argmax(-1)
    topk_ids = np.argsort(-logp_RV, axis=-1)[:, :K]
    valid = np.ones(length, np.bool_)
    valid[1] = sample == 0
    return Rollout(
        prompt=Prompt(prompt, (1, 2, 3), None),
        epoch=0,
        sample=sample,
        tokens=tokens.astype(np.int32),
        server_logp=np.take_along_axis(logp_RV, tokens[:, None], -1)[:, 0],
        topk_ids=topk_ids.astype(np.int32),
        topk_logp=np.take_along_axis(logp_RV, topk_ids, -1),
        valid=valid,
        weight_version=np.zeros(length, np.int32),
        finish="stop",
        reward=float(sample),
        correct=sample == 1,
        advantage=[0.7, -0.7][sample],
    )


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _check(what: str, value: object, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    _check_finite(what, _check_form(what, value, shape, dtypes))


def _check_form(what: str, value: object, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(shape) or value.dtype not in dtypes:
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise Broken(f"{what} is {found}, must be a tensor {wanted} {list(shape)}. Return one.")
    return value


def _check_finite(what: str, value: Tensor) -> None:
    if not value.isfinite().all():
        raise Broken(f"{what} holds NaN or infinity, must be finite. Clamp log-ratios (obrs.log_ratio does).")


def _check_metrics(metrics: Metrics) -> None:
    for name, pair in metrics.items():
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise Broken(f"metric '{name}' must be a pair (sum, count). Use diagnostics.mean_over.")
        for part in pair:
            _check(f"metric '{name}'", part, (), WIDE)


def _check_gradient(value_T: Tensor, leaf: Tensor, into: str) -> None:
    """Of the sum of what counts, as in the loss: finite everywhere and not 0 everywhere."""
    if not value_T.requires_grad:
        raise Broken(f"has no gradient into {into}: it would train nothing. Build it from them undetached.")
    (grad,) = torch.autograd.grad(value_T.sum(), leaf, retain_graph=True, allow_unused=True)
    if grad is None or not (grad != 0).any():
        raise Broken(f"has no gradient into {into}: it would train nothing. Build it from them undetached.")
    if not grad.isfinite().all():
        raise Broken(
            f"has a gradient into {into} that is not finite. Replace what is infinite before you multiply."
        )
