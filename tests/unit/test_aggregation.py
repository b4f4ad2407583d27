"""Aggregations against the papers' losses, written with loops in plain Python from their formulas, and the
same on any split of the batch."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from megatron_jackpot.algorithm.advantages import GRPO, DrGRPO
from megatron_jackpot.algorithm.aggregation import (
    AGGREGATIONS,
    ConstantLength,
    PromptMean,
    SequenceMean,
    TokenMean,
)
from megatron_jackpot.algorithm.corrections import IcePop, Jackpot, MaskedIS, NoCorrection, TokenIS
from megatron_jackpot.algorithm.objectives import GSPO, PPO
from megatron_jackpot.algorithm.objectives_base import objective_inputs
from tests.unit.flat import Tokens, batch_of, identity, on_ranks, places, scores_of
from tests.unit.test_corrections import T, make_scores, part

EVERY = [TokenMean(), SequenceMean(), ConstantLength(length=20), PromptMean()]
REWARDS = [[1.0, 0.0, 0.25, 1.0], [0.0, 0.5, 2.0, 0.0], [3.0, 1.0, 1.0, 1.0]]


def flat():
    """12 responses of 7 to 34 tokens of 4 prompts, those of a prompt in different micro-batches."""
    lengths = [7, 34, 25, 20, 31, 26, 15, 29, 21, 28, 33, 31]
    assert sum(lengths) == T
    segment_T = torch.repeat_interleave(torch.arange(12), torch.tensor(lengths))
    ids_T3 = torch.stack([segment_T * 0, 7 * (segment_T % 4), segment_T // 4], -1)
    position_T = torch.cat([torch.arange(n) for n in lengths])
    places = dict(segment_T=segment_T, rollout_id_T3=ids_T3, position_T=position_T)
    return replace(make_scores(seed=2), **places, microbatch_T=segment_T % 3)


def numbering(s):
    """Numbers of the prompts of the whole batch, as every rank knows them."""
    known = torch.unique(s.rollout_id_T3[:, :2], dim=0).tolist()
    known = [[-1, -1], *known]
    return lambda ids: (
        torch.tensor([known.index(row) for row in ids.flatten(0, -2).tolist()]).view(ids.shape[:-1]),
        len(known),
    )


def weighed(method, correction, s, sum_over_batch, number_alike):
    """(final weight [T], this rank's part of N)."""
    scores = scores_of(s)
    made = method(scores.batch, correction(scores, sum_over_batch), sum_over_batch, number_alike)
    row_T, column_T, _, _ = places(s)
    assert made.weight_MT.dtype == torch.float32 and not made.weight_MT[~made.keep_MT].any()
    return made.weight_MT[row_T, column_T], float(made.count)


CORRECTIONS = {
    "mis, all": MaskedIS(cap=1.2),
    "mis, kept": MaskedIS(cap=1.2, denominator="kept"),
    "drawn": Jackpot(),
    "expected": Jackpot(mask="expected"),
    "narrow": IcePop(low=0.97, high=1.03, denominator="kept"),
}


def reference(method, s, correction):
    """sum over tokens of weight x share / N with a surrogate of 1, 2, 3, ..., by the table of the docs."""
    scores = scores_of(s)
    found = correction(scores, identity)
    row_T, column_T, _, _ = places(s)
    counted = found.counted_MT[row_T, column_T].tolist()
    terms = (found.weight_MT[row_T, column_T] * torch.arange(T)).tolist()
    groups = {"TokenMean": [0] * T, "PromptMean": s.rollout_id_T3[:, 1].tolist()}
    owner = groups.get(type(method).__name__, s.segment_T.tolist())
    total, used = {}, {}
    for own, term, count in zip(owner, terms, counted, strict=True):
        total[own] = total.get(own, 0.0) + term
        used[own] = used.get(own, 0.0) + count
    alive = [own for own, count in used.items() if count > 0]
    size = {own: method.length if isinstance(method, ConstantLength) else used[own] for own in alive}
    return sum(total[own] / size[own] for own in alive) / len(alive)


DEFINED = [
    (method, kind) for method in EVERY for kind in CORRECTIONS if kind == "mis, all" or not method.counts_all
]


@pytest.mark.parametrize(
    ("method", "kind"), DEFINED, ids=lambda x: x if isinstance(x, str) else type(x).__name__
)
def test_each_aggregation_with_each_denominator_is_what_the_table_says(method, kind):
    s = flat()
    weight_T, count = weighed(method, CORRECTIONS[kind], s, identity, numbering(s))
    assert CORRECTIONS[kind](scores_of(s), identity).keep_MT.any()
    got = float((weight_T.double() * torch.arange(T)).sum()) / count
    assert got == pytest.approx(reference(method, s, CORRECTIONS[kind]), rel=1e-6)


@pytest.mark.parametrize("method", EVERY, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("kind", ["mis, kept", "drawn"])
def test_an_aggregation_is_the_same_on_any_split(method, kind):
    """Micro-batches go to three ranks, which cuts through every prompt."""
    s, correction = flat(), CORRECTIONS[kind]
    whole_T, count = weighed(method, correction, s, identity, numbering(s))
    index = [(s.microbatch_T == rank).nonzero()[:, 0] for rank in range(3)]
    call = partial(weighed, method, correction)
    split = on_ranks([part(s, i) for i in index], lambda mine, add: call(mine, add, numbering(s)))
    for i, (weight_T, _) in zip(index, split, strict=True):
        torch.testing.assert_close(weight_T, whole_T[i], rtol=1e-6, atol=0)
    assert sum(own for _, own in split) == pytest.approx(count, rel=1e-12)


@pytest.mark.parametrize("method", EVERY, ids=lambda m: type(m).__name__)
def test_pruned_rollouts_count_in_n_as_if_they_were_there(method):
    """Responses 3, 4 and 8 are left out of the batch: shares and N of the rest are those of the whole."""
    s, correction = flat(), MaskedIS(cap=1.2)
    whole_T, count = weighed(method, correction, s, identity, numbering(s))
    left_T = torch.isin(s.segment_T, torch.tensor([3, 4, 8]))
    lengths = [int((s.mask_T & (s.segment_T == own)).sum()) for own in (3, 4, 8)]
    pruned = torch.tensor([[0, 7 * (own % 4), n, 0] for own, n in zip((3, 4, 8), lengths, strict=True)])
    assert min(lengths) > 0
    scores = scores_of(part(s, (~left_T).nonzero()[:, 0]))
    rows = torch.tensor([[-1, -1, 0, 0]]).repeat(scores.batch.num_microbatches, 3, 1)
    rows[1] = pruned
    batch = replace(scores.batch, pruned_MP4=rows)
    made = method(batch, correction(scores, identity), identity, numbering(s))
    row_T, column_T, _, _ = places(part(s, (~left_T).nonzero()[:, 0]))
    torch.testing.assert_close(made.weight_MT[row_T, column_T], whole_T[~left_T], rtol=1e-6, atol=0)
    assert float(made.count) == pytest.approx(count, rel=1e-12)


def test_a_selection_s_weight_multiplies_what_the_correction_has_capped():
    scores = scores_of(flat())
    found = TokenIS(cap=1.1)(scores, identity)
    batch = replace(scores.batch, loss_weight_MT=torch.full_like(found.weight_MT, 10.0))
    made = TokenMean()(batch, found, identity, numbering(flat()))
    assert float(found.weight_MT.max()) == pytest.approx(1.1)
    torch.testing.assert_close(made.weight_MT, 10 * found.weight_MT)
    assert float(made.count) == int(scores.batch.mask_MT.sum())


def tiny():
    """Live and old log-probs and rewards of 3 prompts with 4 responses of 1 to 9 tokens each."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for prompt, rewards in enumerate(REWARDS):
        for sample, reward in enumerate(rewards):
            length = 1 + (5 * prompt + 3 * sample) % 9
            old = -3 * torch.rand(length, generator=generator, dtype=torch.float64) - 0.1
            live = (old + 0.3 * torch.randn(length, generator=generator, dtype=torch.float64)).clamp(
                max=-0.01
            )
            rows.append((prompt, reward, old.tolist(), live.tolist()))
    return rows


def ours(objective, method, advantage, rows):
    """(loss, its gradient in the live log-probs), the server being the old policy."""
    advantages = [a for rewards in REWARDS for a in advantage(rewards).tolist()]
    sizes = torch.tensor([len(old) for _, _, old, _ in rows])
    segment_T = torch.repeat_interleave(torch.arange(len(rows)), sizes)
    old_T, live_T = (torch.tensor([x for row in rows for x in row[i]]).double() for i in (2, 3))
    tokens = Tokens(
        old_logp_T=old_T,
        server_logp_T=old_T,
        advantage_T=torch.tensor(advantages, dtype=torch.float64)[segment_T],
        mask_T=torch.ones(len(old_T), dtype=torch.bool),
        segment_T=segment_T,
    )
    prompt_T = torch.tensor([row[0] for row in rows])[segment_T]
    return minimised(objective, method, tokens, live_T, prompt_T)


def minimised(objective, method, tokens, live_T, prompt_T):
    """(loss, its gradient in the live log-probs) without a correction."""
    ids_MT3 = torch.stack([prompt_T * 0, prompt_T, tokens.segment_T], -1)[None]
    batch = replace(batch_of(tokens), rollout_id_MT3=ids_MT3)
    none_MTK = torch.zeros(1, len(live_T), 0)
    scores = replace(
        scores_of(make_scores()),
        batch=batch,
        policy_logp_MT=tokens.old_logp_T[None],
        target_logp_MT=tokens.old_logp_T[None],
        candidate_target_logp_MTK=none_MTK,
        candidate_server_logp_MTK=none_MTK,
    )
    made = method(batch, NoCorrection()(scores, identity), identity, lambda ids: (ids[..., 1], 3))
    live_T.requires_grad_()
    surrogate_T = objective.surrogate(objective_inputs(live_T, tokens.old_logp_T, batch, 0))
    loss = -(made.weight_MT[0].double() * surrogate_T).sum() / made.count
    (gradient_T,) = torch.autograd.grad(loss, live_T)
    return loss.item(), gradient_T.tolist()


def clip(ratio, advantage, low, high):
    return min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def tokens_of(old, live, advantage, low=0.2, high=0.2):
    return [clip(math.exp(b - a), advantage, low, high) for a, b in zip(old, live, strict=True)]


def normalised(rewards, reward):
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return (reward - mean) / (std + 1e-6)


def published_grpo(rows):
    """2402.03300 Eq. 3 without the KL: mean over outputs of 1 / |o| sum over its tokens."""
    each = []
    for prompt, reward, old, live in rows:
        values = tokens_of(old, live, normalised(REWARDS[prompt], reward))
        each.append(sum(values) / len(values))
    return -sum(each) / len(each)


def published_dapo(rows):
    """2503.14476 Eq. 8: sum over all tokens / number of tokens, clip 0.2 and 0.28."""
    values = [
        value
        for prompt, reward, old, live in rows
        for value in tokens_of(old, live, normalised(REWARDS[prompt], reward), high=0.28)
    ]
    return -sum(values) / len(values)


def published_dr_grpo(rows):
    """2503.20783: mean over outputs of the sum over tokens / a constant (its code: the budget, 20)."""
    each = [
        sum(tokens_of(old, live, reward - sum(REWARDS[prompt]) / 4)) / 20
        for prompt, reward, old, live in rows
    ]
    return -sum(each) / len(each)


def published_gspo(rows):
    """2507.18071 Eq. 5: mean over outputs of the clipped length-normalised ratio of the whole output."""
    each = []
    for prompt, reward, old, live in rows:
        ratio = math.exp(sum(b - a for a, b in zip(old, live, strict=True)) / len(old))
        each.append(clip(ratio, normalised(REWARDS[prompt], reward), 0.1, 0.15))
    return -sum(each) / len(each)


def per_prompt(rows):
    """Mean over prompts of their token means."""
    each = []
    for wanted, rewards in enumerate(REWARDS):
        values = [
            value
            for prompt, reward, old, live in rows
            if prompt == wanted
            for value in tokens_of(old, live, normalised(rewards, reward))
        ]
        each.append(sum(values) / len(values))
    return -sum(each) / len(each)


@pytest.mark.parametrize(
    ("published", "objective", "method", "advantage"),
    [
        (published_grpo, PPO(clip_high=0.2), SequenceMean(), GRPO()),
        (published_dapo, PPO(), TokenMean(), GRPO()),
        (published_dr_grpo, PPO(clip_high=0.2), ConstantLength(length=20), DrGRPO()),
        (published_gspo, GSPO(clip_low=0.1, clip_high=0.15), SequenceMean(), GRPO()),
        (per_prompt, PPO(clip_high=0.2), PromptMean(), GRPO()),
    ],
)
def test_the_published_loss_and_its_gradient_come_out(published, objective, method, advantage):
    rows, step = tiny(), 1e-6
    loss, gradient = ours(objective, method, advantage, rows)
    # The weights are fp32, and responses nearly cancel.
    assert loss == pytest.approx(published(rows), rel=1e-5)
    place = 0
    for i, (prompt, reward, old, live) in enumerate(rows):
        for t in range(len(live)):
            moved = []
            for sign in (1, -1):
                changed = [x + sign * step * (u == t) for u, x in enumerate(live)]
                moved.append(published([*rows[:i], (prompt, reward, old, changed), *rows[i + 1 :]]))
            assert gradient[place] == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=1e-4, abs=1e-7)
            place += 1


def test_a_length_below_one_is_refused():
    with pytest.raises(ValueError, match="length = 0: must be >= 1. Use rollout.max_new_tokens"):
        ConstantLength(length=0)
    assert set(AGGREGATIONS) == {"token", "sequence", "constant", "prompt"}
