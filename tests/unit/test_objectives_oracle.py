"""Every objective against a NumPy oracle written from docs/objectives.md, and the same on any split of the
batch.

An oracle is f(live, frozen): log-probs with a gradient and those under a stop-gradient, so that central
differences in `live` alone give the gradient that the method asks for.
"""

import numpy as np
import pytest
import torch

from megatron_jackpot.algorithm.objectives import OBJECTIVES
from megatron_jackpot.algorithm.obrs import counter_uniform
from megatron_jackpot.algorithm.registry import build
from tests.unit.flat import inputs_of, number_alone, on_ranks
from tests.unit.test_objectives import (
    CLIMBERS,
    LENGTHS,
    make_tokens,
    part,
    prepared,
    scores_of,
    surrogate_and_grad,
)


def clip(r, a, low, high, dual=1e300):
    value = np.minimum(r * a, np.clip(r, low, high) * a)
    return np.where(a < 0, np.maximum(value, dual * a), value)


def rollouts(d):
    """Positions of the masked tokens of each rollout, in order."""
    return [np.flatnonzero(d["mask"] & (d["segment"] == i)) for i in np.unique(d["segment"][d["mask"]])]


def ppo(live, frozen, d, low=0.2, high=0.28, dual=1e300):
    return clip(np.exp(live - d["old"]), d["a"], 1 - low, 1 + high, dual)


def decoupled(live, frozen, d, cap=5.0):
    return np.minimum(np.exp(d["old"] - d["q"]), cap) * ppo(live, frozen, d, high=0.2)


def opsm(live, frozen, d, delta=1e-4, anchor="old"):
    value = ppo(live, frozen, d)
    for own in rollouts(d):
        if d["a"][own[0]] < 0 and np.mean(d[anchor][own] - frozen[own]) > delta:
            value[own] = 0
    return value


def sapo(live, frozen, d, positive=1.0, negative=1.05):
    tau = np.where(d["a"] > 0, positive, negative)
    return 4 / tau / (1 + np.exp(-tau * (np.exp(live - d["old"]) - 1))) * d["a"]


def gmpo(live, frozen, d, low=0.4, high=0.4):
    """The published form has one term a rollout, |i| times its derivative is what each token asks for."""
    value = np.zeros(len(live))
    for own in rollouts(d):

        def clipped(x, own=own):
            log_s, a = x[own] - d["old"][own], d["a"][own]
            return np.where(a < 0, np.maximum(log_s, -low), np.minimum(log_s, high))

        ratio = np.prod(np.exp(clipped(frozen))) ** (1 / len(own))
        value[own] = ratio * np.exp(clipped(live) - clipped(frozen)) * d["a"][own]
    return value


def covariance(frozen, d):
    mask = d["mask"]
    return np.where(mask, (frozen - frozen[mask].mean()) * (d["a"] - d["a"][mask].mean()), -np.inf)


def clip_cov(live, frozen, d, share=2e-4, low=1.0, high=5.0):
    cov = covariance(frozen, d)
    inside = (cov > low) & (cov < high)
    uniform = counter_uniform(1 << 32, 3, torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1).long()).item()
    # Every token of these tests has one key: all inside are drawn, or none.
    drawn = inside & (uniform < share * d["mask"].sum() / max(inside.sum(), 1))
    return np.where(drawn, 0, ppo(live, frozen, d))


def kl_cov(live, frozen, d, share=2e-3, coef=1.0):
    cov = covariance(frozen, d)
    most = max(1, int(share * d["mask"].sum()))
    held = cov >= np.sort(cov)[-most]  # Equal ones, of log-probs at their bound, go together.
    return np.exp(live - d["old"]) * d["a"] - coef * held * np.abs(live - d["old"])


def cispo(live, frozen, d, low=0.0, high=5.0):
    return np.clip(np.exp(frozen - d["old"]), low, high) * d["a"] * live


def reinforce(live, frozen, d):
    return d["a"] * live


def gspo(live, frozen, d, low=3e-4, high=4e-4):
    value = np.zeros(len(live))
    for own in rollouts(d):
        s = np.exp(np.mean(frozen[own] - d["old"][own]))
        value[own] = clip(s * np.exp(live[own] - frozen[own]), d["a"][own], 1 - low, 1 + high)
    return value


def topr(live, frozen, d, level="sequence", anchor="q"):
    taper = np.ones(len(live))
    for own in rollouts(d):
        logs = frozen[own] - d[anchor][own]
        taper[own] = np.minimum(np.exp(logs.sum() if level == "sequence" else logs), 1)
    return np.where(d["a"] < 0, taper, 1) * d["a"] * live


def minpro(live, frozen, d, cap=5.0, anchor="q", most=np.inf):
    weight = np.zeros(len(live))
    for own in rollouts(d):
        r = np.exp(frozen[own] - d[anchor][own])
        for t in range(len(own)):
            weight[own[t]] = min(r[t] * min(min(r[:t]) if t else 1.0, most), cap)
    return weight * d["a"] * live


def dppo_tv(live, frozen, d, low=0.15, high=0.15, cap=20.0, anchor="q", kl=0.0):
    rise = np.exp(frozen) - np.exp(d[anchor])
    keep = np.where(d["a"] > 0, rise <= high, rise >= -low)
    pull = kl * (live - d[anchor]) ** 2
    return keep * np.minimum(np.exp(frozen - d[anchor]), cap) * d["a"] * live - pull


def dppo_kl(live, frozen, d, low=0.05, high=0.05, cap=20.0, anchor="q"):
    p, q = np.exp(frozen), np.exp(d[anchor])
    kl = q * np.log(q / p) + (1 - q) * np.log((1 - q + 1e-8) / (1 - p + 1e-8))
    keep = np.where(d["a"] > 0, (kl <= high) | (p <= q), (kl <= low) | (p >= q))
    return keep * np.minimum(p / q, cap) * d["a"] * live


def over_candidates(frozen, d, anchor):
    """(p, q) of each token over itself, its candidates and the rest."""
    for t, (logp, anchor_logp) in enumerate(zip(frozen, d[anchor], strict=True)):
        at = d["candidates"][t][d["candidates"][t, :, 0] > -np.inf]
        both = ((logp, at[:, 0]), (anchor_logp, at[:, dict(old=1, q=2)[anchor]]))
        known = [np.exp(np.append(one, rest)) for one, rest in both]
        yield [np.append(one, max(1 - one.sum(), 1e-6)) for one in known]


def topk(live, frozen, d, low, high, kind, anchor="q"):
    distance = [
        np.abs(p - q).sum() / 2 if kind == "tv" else (q * np.log(q / p)).sum()
        for p, q in over_candidates(frozen, d, anchor)
    ]
    over, under = np.array(distance) > high, np.array(distance) > low
    gone = np.where(d["a"] > 0, over & (frozen > d[anchor]), under & (frozen < d[anchor]))
    return ~gone * np.minimum(np.exp(frozen - d[anchor]), 20) * d["a"] * live


def bapo(
    live,
    frozen,
    d,
    share=0.4,
    lows=(0.6, 0.9, 0.02),
    highs=(1.2, 3.0, 0.05),
    dual=1e300,
    order="both",
    q=True,
):
    r, a = np.exp(frozen - d["q"])[d["mask"]], d["a"][d["mask"]]
    a = a * np.exp(d["q"][d["mask"]]) if q else a

    def enough(low, high):
        gain = sum(min(x, high) * y for x, y in zip(r, a, strict=True) if y >= 0)
        pain = sum(max(x, low) * -y for x, y in zip(r, a, strict=True) if y < 0)
        return gain / (gain + pain) >= share

    low, high = lows[0], highs[0]
    while order == "both" and not enough(low, high) and low < lows[1] - 1e-9:
        low, high = min(low + lows[2], lows[1]), min(high + highs[2], highs[1])
    for turn in dict(low="lh", high="hl").get(order, ""):
        while turn == "l" and not enough(low, high) and low < lows[1] - 1e-9:
            low = min(low + lows[2], lows[1])
        while turn == "h" and not enough(low, high) and high < highs[1] - 1e-9:
            high = min(high + highs[2], highs[1])
    return clip(np.exp(live - d["q"]), d["a"], low, high, dual)


def m2po(live, frozen, d, budget=0.04, scope="outward"):
    log_r = frozen - d["q"]
    outward = ((d["a"] > 0) & (log_r > 0)) | ((d["a"] < 0) & (log_r < 0)) | (scope == "all")
    kept = list(np.flatnonzero(d["mask"] & outward))
    keep = np.ones(len(live), bool)
    while kept and np.mean(log_r[kept] ** 2) > budget:
        worst = max(kept, key=lambda t: abs(log_r[t]))
        kept.remove(worst)
        keep[worst] = False
    return keep * np.exp(live - d["q"]) * d["a"]


CASES = [
    ("ppo", {}, ppo, {}),
    (
        "ppo",
        {"dual_clip": 1.5, "clip_high": 0.1, "clip_low": 0.4},
        ppo,
        {"dual": 1.5, "low": 0.4, "high": 0.1},
    ),
    ("decoupled_ppo", {}, decoupled, {}),
    ("decoupled_ppo", {"cap": 1.1}, decoupled, {"cap": 1.1}),
    ("opsm", {}, opsm, {}),
    ("opsm", {"delta": 0.05}, opsm, {"delta": 0.05}),
    ("opsm", {"delta": 0.05, "anchor": "server"}, opsm, {"delta": 0.05, "anchor": "q"}),
    ("sapo", {}, sapo, {}),
    ("sapo", {"tau_positive": 2.0, "tau_negative": 5.0}, sapo, {"positive": 2.0, "negative": 5.0}),
    ("gmpo", {}, gmpo, {}),
    ("gmpo", {"clip_low": 0.1, "clip_high": 0.2}, gmpo, {"low": 0.1, "high": 0.2}),
    ("clip_cov", {}, clip_cov, {}),
    ("clip_cov", {"share": 0.9, "cov_low": 0.3}, clip_cov, {"share": 0.9, "low": 0.3}),
    ("kl_cov", {}, kl_cov, {}),
    ("kl_cov", {"share": 0.2, "coef": 0.3}, kl_cov, {"share": 0.2, "coef": 0.3}),
    ("cispo", {}, cispo, {}),
    ("cispo", {"clip_low": 0.2, "clip_high": 0.3}, cispo, {"low": 0.8, "high": 1.3}),
    ("reinforce", {}, reinforce, {}),
    ("gspo", {}, gspo, {}),
    ("gspo", {"clip_low": 0.1, "clip_high": 0.05}, gspo, {"low": 0.1, "high": 0.05}),
    ("topr", {}, topr, {}),
    ("topr", {"level": "token", "anchor": "old"}, topr, {"level": "token", "anchor": "old"}),
    ("minpro", {}, minpro, {}),
    ("minpro", {"cap": 1.0, "anchor": "old"}, minpro, {"cap": 1.0, "anchor": "old"}),
    ("minpro", {"prefix_at_most_one": True}, minpro, {"most": 1.0}),
    ("dppo_tv", {}, dppo_tv, {}),
    (
        "dppo_tv",
        {"delta_low": 0.02, "delta_high": 0.05, "cap": 1.2, "anchor": "old"},
        dppo_tv,
        {"low": 0.02, "high": 0.05, "cap": 1.2, "anchor": "old"},
    ),
    ("dppo_tv", {"kl_coef": 0.3}, dppo_tv, {"kl": 0.3}),
    ("dppo_kl", {}, dppo_kl, {}),
    (
        "dppo_kl",
        {"delta_low": 0.001, "delta_high": 0.02, "anchor": "old"},
        dppo_kl,
        {"low": 0.001, "high": 0.02, "anchor": "old"},
    ),
    ("dppo_tv", {"approximation": "topk"}, topk, {"low": 0.15, "high": 0.15, "kind": "tv"}),
    (
        "dppo_tv",
        {"approximation": "topk", "anchor": "old", "delta_low": 0.3, "delta_high": 0.05},
        topk,
        {"low": 0.3, "high": 0.05, "kind": "tv", "anchor": "old"},
    ),
    ("dppo_kl", {"approximation": "topk"}, topk, {"low": 0.05, "high": 0.05, "kind": "kl"}),
    ("bapo", {}, bapo, {}),
    ("bapo", {"positive_share": 0.57}, bapo, {"share": 0.57}),
    (
        "bapo",
        {"positive_share": 0.57, "order": "low_first", "weighted": False},
        bapo,
        {"share": 0.57, "order": "low", "q": False},
    ),
    ("bapo", {"positive_share": 0.55, "order": "high_first"}, bapo, {"share": 0.55, "order": "high"}),
    ("bapo", {"positive_share": 0.99, "dual_clip": 3.5}, bapo, {"share": 0.99, "dual": 3.5}),
    (
        "bapo",
        {"positive_share": 0.21, "low_start": 0.1, "low_end": 1.0, "high_start": 1.0, "high_step": 0.01},
        bapo,
        {"share": 0.21, "lows": (0.1, 1.0, 0.02), "highs": (1.0, 3.0, 0.01)},
    ),
    ("m2po", {}, m2po, {}),
    ("m2po", {"scope": "all", "budget": 0.1}, m2po, {"scope": "all", "budget": 0.1}),
    ("m2po", {"budget": 50.0}, m2po, {"budget": 50.0}),
]
every_case = pytest.mark.parametrize(
    ("name", "knobs", "oracle", "words"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES]
)


def arrays(tokens):
    return {
        "old": tokens.old_logp_T.numpy(),
        "q": tokens.server_logp_T.numpy(),
        "a": tokens.advantage_T.numpy(),
        "mask": tokens.mask_T.numpy(),
        "candidates": tokens.candidates_TK3.numpy(),
        "segment": tokens.segment_T.numpy(),
    }


@every_case
@pytest.mark.parametrize("seed", range(4))
def test_surrogate_and_gradient_are_the_oracles(name, knobs, oracle, words, seed):
    logp_T, tokens = make_tokens(seed=seed, gap=0.15 + 0.25 * seed)
    d, frozen = arrays(tokens), logp_T.numpy()
    objective = prepared(build(name, knobs, OBJECTIVES, "objective"), logp_T, tokens)
    value_T, grad_T = surrogate_and_grad(objective, logp_T, tokens)
    want = np.where(d["mask"], oracle(frozen.copy(), frozen, d, **words), 0)
    np.testing.assert_allclose(value_T.numpy(), want, rtol=1e-9, atol=1e-12)
    step = 1e-6
    up, down = (oracle(frozen + sign * step, frozen, d, **words) for sign in (1, -1))
    want = np.where(d["mask"], (up - down) / (2 * step), 0)
    np.testing.assert_allclose(grad_T.numpy(), want, rtol=1e-5, atol=1e-7)


def test_the_oracle_cases_cover_every_objective():
    assert {case[0] for case in CASES} == set(CLIMBERS)


def rank_parts(tokens, groups):
    """Indices of the tokens of each group of rollouts, whole rollouts in the group's order."""
    where = [(tokens.segment_T == i).nonzero()[:, 0] for i in range(len(LENGTHS))]
    return [torch.cat([where[i] for i in group]) for group in groups]


SPLITS = {
    "halves": [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]],
    "interleaved": [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]],
    "reversed": [[9, 8, 7], [6, 5, 4, 3, 2, 1, 0]],
    "one each": [[i] for i in range(10)],
    "one is padding": [list(range(10)), []],
}


@every_case
@pytest.mark.parametrize("groups", SPLITS.values(), ids=SPLITS.keys())
def test_surrogates_and_metrics_do_not_depend_on_the_split(name, knobs, oracle, words, groups):
    logp_T, tokens = make_tokens(seed=1)
    objective = build(name, knobs, OBJECTIVES, "objective")
    whole = prepared(objective, logp_T, tokens)
    want_T, want_grad_T = surrogate_and_grad(whole, logp_T, tokens)
    padding = (tokens.segment_T < 0).nonzero()[:, 0]
    groups = [group or None for group in groups]
    index = [padding if group is None else rank_parts(tokens, [group])[0] for group in groups]
    ranks = [scores_of(logp_T[i], part(tokens, i)) for i in index]
    made = on_ranks(
        ranks, lambda scores, sum_over_batch: objective.prepare(scores, sum_over_batch, number_alone)
    )
    sums = {}
    for i, own in zip(index, made, strict=True):
        assert own == whole
        value_T, grad_T = surrogate_and_grad(own, logp_T[i], part(tokens, i))
        torch.testing.assert_close(value_T, want_T[i])
        torch.testing.assert_close(grad_T, want_grad_T[i])
        for key, pair in own.metrics(inputs_of(logp_T[i], part(tokens, i))).items():
            sums[key] = sums.get(key, 0) + torch.stack(pair)
    for key, pair in whole.metrics(inputs_of(logp_T, tokens)).items():
        torch.testing.assert_close(sums[key][0] / sums[key][1], pair[0] / pair[1])
