"""Every correction against a NumPy oracle written from the formulas, and the same on any split of the
batch."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from megatron_jackpot.algorithm.advantages import GRPO
from megatron_jackpot.algorithm.corrections import CORRECTIONS, make_correction
from megatron_jackpot.algorithm.objectives import PPO
from tests.unit.flat import Tokens, inputs_of, on_ranks, run
from tests.unit.test_corrections import make_scores, part

CASES = [
    ("none", {}),
    ("none", {"batch_normalize": True}),
    ("tis", {"cap": 1.3}),
    ("tis", {"cap": 1.3, "batch_normalize": True}),
    ("mis", {"cap": 1.3}),
    ("mis", {"cap": 1.3, "denominator": "kept", "batch_normalize": True}),
    ("icepop", {"low": 0.6, "high": 1.7}),
    ("seq_tis", {"cap": 4.0}),
    ("seq_mis", {"cap": 4.0}),
    ("tis", {"cap": 1.3, "low": 0.8}),
    ("seq_tis", {"cap": 4.0, "low": 0.9}),
    ("seq_mis", {"cap": 4.0, "low": 0.2}),
    ("geo_tis", {"cap": 1.05, "low": 0.97}),
    ("tis_current", {"cap": 1.3, "low": 0.8}),
    ("geo_rs", {"low": 0.9, "high": 1.05, "veto": None}),
    ("geo_rs", {"low": 0.5, "high": 1.5, "veto": 0.05, "cap": 2.0}),
    ("k_filter", {"kind": "k1", "level": "token", "high": 1.5}),
    ("k_filter", {"kind": "k1", "level": "seq_mean", "high": 1.1, "low": 0.95}),
    ("k_filter", {"kind": "k1", "level": "token", "high": 1.5, "low": 0}),
    ("k_filter", {"kind": "k1", "level": "seq_sum", "high": 20.0, "low": 0}),
    ("k_filter", {"kind": "k2", "level": "seq_mean", "high": 0.5}),
    ("k_filter", {"kind": "k3", "level": "seq_max", "high": 2.0, "cap": 1.5}),
    ("k_filter", {"kind": "k3", "level": "seq_sum", "high": 18.0}),
    ("k_filter", {"kind": "k3", "high": 0.3}),
    ("tis_current", {"cap": 1.3}),
    ("z_tis", {"cap": 1.3}),
    ("z_tis", {"z_correction": "tail", "lam": 0.7}),
    ("jackpot", {"z_correction": "tail", "mask": "expected"}),
    ("jackpot", {"candidates": "intersection", "mask": "expected", "lam": 1.4}),
    ("jackpot", {"candidates": "intersection", "z_correction": "tail", "mask": "expected"}),
    ("jackpot", {"kappa_over": "microbatch", "mask": "expected"}),
    ("jackpot", {"z_clamp": "none", "mask": "expected"}),
    ("jackpot", {"preset": "recommended"}),
    ("jackpot", {"z": "exact", "mask": "expected"}),
]


def scores():
    """Every rollout of `make_scores`, with an exact Z that only the test knows."""
    s = make_scores(seed=4)
    generator = torch.Generator().manual_seed(9)
    return replace(s, exact_overlap_T=torch.rand(len(s.mask_T), generator=generator))


def arrays(s):
    return {name: value.double().numpy() for name, value in vars(s).items() if torch.is_tensor(value)}


def per_sequence(values, a, reduce):
    """reduce(values of the valid tokens of a token's sequence) on each token."""
    out = np.zeros(len(values))
    for segment in np.unique(a["segment_T"]):
        inside = a["segment_T"] == segment
        out[inside] = reduce(values[inside & (a["mask_T"] > 0)])
    return out


def z_oracle(a, k, expected_only):
    lam, mask = k.get("lam", 1.0), a["mask_T"] > 0
    p, q = np.exp(a["target_logp_T"]), np.exp(a["server_logp_T"])
    accept = np.where(mask, np.minimum(1, p / (lam * q)), 0.0)
    if k.get("z") == "exact":
        return accept, np.where(mask, a["exact_overlap_T"], 0)
    use = a["candidate_server_logp_TK"] > -np.inf
    if k.get("candidates") == "intersection":
        use &= a["candidate_shared_TK"] > 0
    pk, qk = (np.where(use, np.exp(a[f"candidate_{n}_logp_TK"]), 0.0) for n in ("target", "server"))
    z_k = np.where(mask, np.minimum(qk, pk / lam).sum(-1), 0)
    limit = min(1, 1 / lam)
    assert expected_only
    if k.get("z_correction") == "tail":
        bound = np.minimum(np.maximum(1 - qk.sum(-1), 0), np.maximum(1 - pk.sum(-1), 0) / lam)
        inside = ((a["candidate_ids_TK"] == a["token_T"][:, None]) & use).any(-1)
        eta = np.clip(accept[mask & ~inside].sum() / bound[mask].sum(), 0, 1)
        return accept, np.minimum(z_k + eta * bound, limit)
    kappa = np.ones(len(mask))
    groups = a["microbatch_T"] if k.get("kappa_over") == "microbatch" else np.zeros(len(mask))
    for g in np.unique(groups):
        inside = mask & (groups == g)
        kappa[groups == g] = accept[inside].sum() / z_k[inside].sum()
    return accept, kappa * z_k if k.get("z_clamp") == "none" else np.minimum(kappa * z_k, limit)


def oracle(name, k, s):
    """(keep, weight, count) in fp64, by the formulas of the docstrings, token by token."""
    a = arrays(s)
    mask = a["mask_T"] > 0
    log_rho = np.where(mask, np.clip(a["policy_logp_T"] - a["server_logp_T"], -20, 20), 0)
    possible = mask & (a["policy_logp_T"] > -np.inf) & (a["target_logp_T"] > -np.inf)
    rho, keep, cap = np.exp(log_rho), possible.copy(), k.get("cap")
    if name in ("z_tis", "jackpot"):
        lam, cap = k.get("lam", 1.0), k.get("cap", 3.0)
        accept, z = z_oracle(a, k, expected_only=True)
        r = np.exp(np.where(mask, a["target_logp_T"] - a["server_logp_T"], 0))
        if name == "z_tis":
            return possible, np.where(possible, np.minimum(z * r, cap), 0), mask.sum()
        drift = np.exp(np.subtract(a["policy_logp_T"], a["target_logp_T"], where=possible, out=0 * z))
        weight = accept * np.minimum(z * np.maximum(lam, r), cap) * np.minimum(drift, 1.28)
        every = k.get("preset") == "recommended"
        return accept > 0, weight, mask.sum() if every else accept.sum()
    weight, low = np.ones(len(rho)), k.get("low", 0.0)
    if name == "tis":
        weight = np.clip(rho, low, cap)
    elif name == "tis_current":
        weight = np.clip(np.exp(np.where(mask, a["target_logp_T"] - a["server_logp_T"], 0)), low, cap)
    elif name == "geo_tis":
        weight = np.clip(np.exp(per_sequence(log_rho, a, np.mean)), low, cap)
    elif name == "mis":
        weight, keep = rho, keep & (rho <= cap)
    elif name == "icepop":
        weight, keep = rho, keep & (rho >= k["low"]) & (rho <= k["high"])
    elif name in ("seq_tis", "seq_mis"):
        product = np.exp(per_sequence(log_rho, a, np.sum))
        weight = np.clip(product, low, cap) if name == "seq_tis" else product
        keep = keep if name == "seq_tis" else keep & (product <= cap) & (product >= low)
    elif name == "geo_rs":
        geometric = np.exp(per_sequence(log_rho, a, np.mean))
        keep = keep & (geometric >= k["low"]) & (geometric <= k["high"])
        if k["veto"] is not None:
            keep &= per_sequence(rho, a, np.min) >= k["veto"]
        weight = np.minimum(rho, cap) if cap else weight
    elif name == "k_filter":
        value = {"k1": -log_rho, "k2": log_rho**2 / 2, "k3": rho - 1 - log_rho}[k["kind"]]
        level = k.get("level", "token")
        if level != "token":
            value = per_sequence(value, a, {"sum": np.sum, "mean": np.mean, "max": np.max}[level[4:]])
        if k["kind"] == "k1":
            keep = keep & (np.exp(-value) <= k["high"]) & (np.exp(-value) >= k.get("low", 1 / k["high"]))
        else:
            keep = keep & (value <= k["high"])
        weight = np.minimum(rho, cap) if cap else weight
    weight = np.where(keep, weight, 0)
    if k.get("batch_normalize"):
        weight = weight / weight[mask].mean()
    return keep, weight, keep.sum() if k.get("denominator") == "kept" else mask.sum()


def test_every_correction_has_a_case():
    assert {name for name, _ in CASES} == set(CORRECTIONS)


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_a_correction_is_its_formula(name, knobs):
    s = scores()
    method = make_correction(name, knobs, 0)
    got = run(method, s)
    if knobs.get("preset") == "recommended":
        knobs = knobs | {"z_correction": "tail"}
    keep, weight, count = oracle(name, knobs, s)
    assert torch.equal(got.keep_T, torch.from_numpy(keep))
    torch.testing.assert_close(got.weight_T.double(), torch.from_numpy(weight), rtol=2e-5, atol=1e-6)
    assert got.count.item() == pytest.approx(count, rel=1e-6)
    assert not got.weight_T.requires_grad
    if knobs not in ({}, {"batch_normalize": True}) and "exact" not in knobs.values():
        # The case can fail: its knobs change something on this batch.
        plain = oracle("tis", {"cap": math.inf}, s)[1]
        assert np.abs(weight - plain).max() > 0.05


@pytest.mark.parametrize(
    ("name", "level"),
    [
        *(("tis", None), ("icepop", None), ("tis_current", None)),
        *(("seq_tis", np.sum), ("seq_mis", np.sum), ("geo_tis", np.mean)),
    ],
)
def test_the_share_below_the_lower_bound_is_counted_as_the_formula_says(name, level):
    """Of all tokens, by the ratio of the token or of its response; the bound lies between two of them."""
    s = scores()
    a, mask = arrays(s), s.mask_T.numpy()
    model = a["target_logp_T" if name == "tis_current" else "policy_logp_T"]
    log_ratio = model - a["server_logp_T"]
    ratio = np.exp(log_ratio if level is None else per_sequence(log_ratio, a, level))[mask]
    known = np.unique(ratio)
    low = known[len(known) // 3 : len(known) // 3 + 2].mean().item()
    total, count = run(make_correction(name, {"low": low}, 0), s).metrics["is/low_fraction"]
    assert (total, count) == ((ratio < low).sum(), mask.sum()) and 0.2 < total / count < 0.6
    if name != "icepop":  # whose bound is never off
        assert "is/low_fraction" not in run(make_correction(name, {}, 0), s).metrics


def with_policy(s, tokens, value):
    """The policy and the target give some sampled tokens this log-prob."""
    names = ("policy_logp_T", "target_logp_T")
    return replace(s, **{name: getattr(s, name).index_fill(0, tokens, value) for name in names})


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_a_token_of_probability_0_is_the_limit_of_small_ones(name, knobs):
    """It has no gradient itself; the other tokens of its response hear of it as of one of log p = -60."""
    s = scores()
    first_T = torch.tensor([int((s.mask_T & (s.segment_T == i)).nonzero()[0]) for i in (1, 4)])
    method = make_correction(name, knobs, 0)
    zero, tiny = (run(method, with_policy(s, first_T, value)) for value in (-math.inf, -60.0))
    others_T = torch.ones_like(s.mask_T).index_fill(0, first_T, False)
    assert torch.equal(zero.keep_T[others_T], tiny.keep_T[others_T])
    if not knobs.get("batch_normalize"):
        torch.testing.assert_close(zero.weight_T[others_T], tiny.weight_T[others_T])
    assert not zero.keep_T[first_T].any() and (zero.weight_T[first_T] == 0).all()
    if knobs.get("preset") == "recommended":
        knobs = knobs | {"z_correction": "tail"}
    keep, weight, count = oracle(name, knobs, with_policy(s, first_T, -math.inf))
    assert torch.equal(zero.keep_T, torch.from_numpy(keep))
    torch.testing.assert_close(zero.weight_T.double(), torch.from_numpy(weight), rtol=2e-5, atol=1e-6)
    assert zero.count.item() == pytest.approx(count, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("geo_rs", {"low": 0.01, "high": 100.0}),
        ("geo_rs", {"low": 0.9, "high": 1.1, "veto": None}),
        ("k_filter", {"kind": "k2", "level": "seq_max", "high": 20.0}),
        ("k_filter", {"kind": "k3", "level": "seq_sum", "high": 18.0}),
        ("k_filter", {"kind": "k1", "level": "seq_mean", "high": 1.1}),
        ("seq_tis", {}),
        ("seq_mis", {}),
    ],
)
def test_a_response_with_an_impossible_token_is_removed_or_weighs_next_to_nothing(name, knobs):
    s = scores()
    own_T = s.mask_T & (s.segment_T == 1)
    # Server and policy agree elsewhere: the token alone decides.
    agreed = replace(s, server_logp_T=torch.where(own_T, s.policy_logp_T, s.server_logp_T))
    method = make_correction(name, knobs, 0)
    assert run(method, agreed).weight_T[own_T].min() > 0.9
    assert run(method, with_policy(agreed, own_T.nonzero()[:1, 0], -math.inf)).weight_T[own_T].max() < 1e-6


def test_a_filter_that_could_not_reject_is_refused():
    """The largest k1 of a response is its least ratio: a large one would never be removed."""
    with pytest.raises(ValueError, match="level = 'seq_max': must not be used with kind = 'k1'.*Use level"):
        make_correction("k_filter", {"kind": "k1", "level": "seq_max"}, 0)


@pytest.mark.parametrize(("name", "knobs"), CASES + [("jackpot", {"preset": "reference"})])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_correction_is_the_same_on_any_split(name, knobs, ranks):
    """Whole micro-batches go to ranks; with two ranks in reversed order of tokens, as another packing has
    them."""
    s = scores()
    method = make_correction(name, knobs, 0)
    whole = run(method, s)
    owner_T = s.microbatch_T % ranks
    index = [(owner_T == rank).nonzero()[:, 0] for rank in range(ranks)]
    index = [i.flip(0) for i in index] if ranks == 2 else index
    split = on_ranks([part(s, i) for i in index], partial(run, method))
    for i, mine in zip(index, split, strict=True):
        assert torch.equal(mine.keep_T, whole.keep_T[i])
        torch.testing.assert_close(mine.weight_T, whole.weight_T[i], rtol=1e-6, atol=1e-7)
    assert sum(mine.count for mine in split).item() == pytest.approx(whole.count.item(), rel=1e-12)


@pytest.mark.parametrize("name", list(CORRECTIONS))
def test_a_non_finite_log_prob_of_the_server_is_refused_and_outside_the_mask_ignored(name):
    s = scores()
    inside, outside = int(s.mask_T.nonzero()[3]), int((~s.mask_T).nonzero()[3])
    broken = s.server_logp_T.clone()
    broken[outside] = math.nan
    want = run(make_correction(name, {}, 0), s)
    got = run(make_correction(name, {}, 0), replace(s, server_logp_T=broken))
    assert torch.equal(got.weight_T, want.weight_T) and torch.isfinite(got.weight_T).all()
    broken[inside] = -math.inf
    with pytest.raises(ValueError, match="server_logp = .*must be finite"):
        run(make_correction(name, {}, 0), replace(s, server_logp_T=broken))


def test_group_baselines_are_those_of_every_response_rejected_or_not():
    """Advantages come from the rewards of the whole group; rejecting all tokens of a response moves none of
    them."""
    s = scores()
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    advantage_S = GRPO()(rewards)
    s = replace(s, advantage_T=advantage_S[s.segment_T])
    gone_T = s.mask_T & (s.segment_T == 0)
    rejecting = replace(s, target_logp_T=torch.where(gone_T, -60.0, s.target_logp_T))
    method = make_correction("jackpot", {"z_correction": "none", "policy_cap": None}, 0)
    kept, without = run(method, s), run(method, rejecting)
    assert kept.keep_T[gone_T].any() and not without.keep_T[gone_T].any()
    others_T = s.mask_T & ~gone_T
    tokens = Tokens(
        old_logp_T=s.policy_logp_T,
        server_logp_T=s.server_logp_T,
        advantage_T=rejecting.advantage_T,
        mask_T=s.mask_T,
        segment_T=s.segment_T,
    )
    surrogate_T = PPO().surrogate(inputs_of(s.policy_logp_T, tokens))
    torch.testing.assert_close(surrogate_T[others_T], advantage_S[s.segment_T][others_T])
    alone_S = GRPO()(rewards[1:])
    assert (alone_S - advantage_S[1:]).abs().max() > 0.1  # a baseline after rejection would be another one
    assert torch.equal(kept.weight_T[others_T], without.weight_T[others_T])
