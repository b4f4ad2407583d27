"""Corrections and their metrics, against formulas in plain Python and against the laws of OBRS."""

import math
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise

import pytest
import torch

from megatron_jackpot.algorithm.corrections import (
    CORRECTIONS,
    Jackpot,
    NoCorrection,
    TokenIS,
    make_correction,
)
from megatron_jackpot.algorithm.divergence import (
    candidate_kl,
    candidate_kl_after,
    sampled_kl,
    sampled_tv,
)
from megatron_jackpot.algorithm.objectives import PPO
from megatron_jackpot.algorithm.objectives_base import objective_inputs
from megatron_jackpot.algorithm.obrs import counter_uniform
from tests.unit.flat import Flat, diagnose, on_ranks, run, scores_of

V, K, T = 40, 12, 300


def make_scores(seed=0, gap=0.7, dtype=torch.float32, num_candidates=K):
    """T tokens sampled from a server over V ids; target, old policy and actor are perturbations of it."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return torch.randn(T, V, generator=generator, dtype=torch.float64) * scale

    logits = noise(1.5)
    server, target, actor = (x.log_softmax(-1) for x in (logits, logits + noise(gap), logits + noise(0.02)))
    policy = (target + noise(0.2)).log_softmax(-1)
    token = torch.multinomial(server.exp(), 1, generator=generator)
    server_top, ids = server.topk(num_candidates, -1)
    at = {
        name: x.gather(-1, token)[:, 0].to(dtype)
        for name, x in dict(s=server, t=target, a=actor, p=policy).items()
    }
    index = torch.arange(T)
    ids[:, -2:], server_top[:, -2:] = (
        (-1, -math.inf) if num_candidates < V else (ids[:, -2:], server_top[:, -2:])
    )
    target_top = target.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -math.inf)
    return Flat(
        policy_logp_T=at["p"],
        target_logp_T=at["t"],
        actor_logp_T=at["a"],
        server_logp_T=at["s"],
        mask_T=index % 5 > 0,
        segment_T=index // 50,
        rollout_id_T3=torch.stack([index * 0, index // 50, index // 25 % 2], -1),
        position_T=index % 25,
        advantage_T=torch.randn(T, generator=generator),
        correct_T=index % 3 == 0,
        token_T=token[:, 0],
        microbatch_T=index // 100,
        candidate_ids_TK=ids,
        candidate_shared_TK=(ids >= 0) & (target_top >= target.topk(num_candidates, -1)[0][:, -1:].float()),
        candidate_target_logp_TK=target_top.to(dtype),
        candidate_server_logp_TK=server_top.to(dtype),
        step=3,
    )


def part(s, index):
    """The tokens of `s` at an index, as another rank or another packing would hold them."""
    return replace(
        s, **{name: value[index] for name, value in vars(s).items() if isinstance(value, torch.Tensor)}
    )


def mean(pair):
    return (pair[0] / pair[1]).item()


def reference(s, knobs):
    """keep, weight and N of Jackpot, token by token in Python floats."""
    c = Jackpot(**knobs)
    rows = []
    uniform = counter_uniform(c.seed, s.step, s.rollout_id_T3, s.position_T).tolist()
    for t in range(T):
        if not s.mask_T[t]:
            continue
        p, q, old = (math.exp(x[t].item()) for x in (s.target_logp_T, s.server_logp_T, s.policy_logp_T))
        pairs = zip(
            s.candidate_server_logp_TK[t].tolist(), s.candidate_target_logp_TK[t].tolist(), strict=True
        )
        z_k = sum(min(math.exp(a), math.exp(b) / c.lam) for a, b in pairs)
        accept = min(1.0, p / (c.lam * q))
        rows.append((t, p / q, old / p, accept, uniform[t] < accept, z_k))
    drawn = (c.kappa_from or c.mask) == "bernoulli"
    scale = sum(row[4] if drawn else row[3] for row in rows) / sum(row[5] for row in rows)
    keep, weight, count = [False] * T, [0.0] * T, 0.0
    for t, r, drift, accept, drawn, z_k in rows:
        z = min(scale * z_k, 1.0, 1 / c.lam) if c.z_correction == "kappa" else z_k
        after = min(z * max(c.lam, r), c.cap)
        rho = after if c.clip_order == "after_z" else c.lam * z * min(max(r / c.lam, 1.0), c.cap)
        rho *= 1.0 if c.policy_cap is None else min(drift, c.policy_cap)
        chance = float(drawn) if c.mask == "bernoulli" else accept
        keep[t], weight[t] = chance > 0, chance * rho
        count += chance if c.denominator == "accepted" else 1.0
    return torch.tensor(keep), torch.tensor(weight), count


@pytest.mark.parametrize("mask", ["bernoulli", "expected"])
@pytest.mark.parametrize("z_correction", ["none", "kappa"])
@pytest.mark.parametrize("clip_order", ["after_z", "before_z"])
@pytest.mark.parametrize(
    "more",
    [
        dict(),
        dict(lam=0.6, cap=1.2, policy_cap=1.05, denominator="all"),
        dict(lam=1.8, policy_cap=None, kappa_from="expected", seed=77),
    ],
)
def test_jackpot_is_the_formula_token_by_token(mask, z_correction, clip_order, more):
    s = make_scores()
    knobs = dict(mask=mask, z_correction=z_correction, clip_order=clip_order, **more)
    correction = run(Jackpot(**knobs), s)
    keep_T, weight_T, count = reference(s, knobs)
    assert torch.equal(correction.keep_T, keep_T)
    torch.testing.assert_close(correction.weight_T, weight_T, rtol=1e-5, atol=1e-6)
    assert correction.count.item() == pytest.approx(count, rel=1e-6)


def test_the_defaults_are_the_papers():
    c = Jackpot()
    assert (c.lam, c.cap, c.mask, c.z, c.z_correction, c.clip_order, c.denominator) == (
        *(1.0, 3.0),
        *("bernoulli", "topk", "kappa", "after_z", "accepted"),
    )
    s = make_scores()
    assert torch.equal(run(c, s).weight_T, run(Jackpot(kappa_from="bernoulli"), s).weight_T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("z_correction", ["none", "kappa"])
def test_plain_grpo_is_recovered_when_server_and_target_agree(dtype, z_correction):
    s = make_scores(dtype=dtype, num_candidates=V)
    s = replace(
        s,
        policy_logp_T=s.server_logp_T,
        target_logp_T=s.server_logp_T,
        candidate_target_logp_TK=s.candidate_server_logp_TK,
    )
    losses, grads = [], []
    for correction in (NoCorrection(), Jackpot(z_correction=z_correction)):
        logp_T = (s.server_logp_T + 0.3 * torch.sin(torch.arange(T))).requires_grad_()
        result = run(correction, s)
        assert torch.equal(result.keep_T, s.mask_T)  # nothing rejected
        scores = scores_of(replace(s, microbatch_T=torch.zeros(T, dtype=torch.int64)))
        inputs = objective_inputs(logp_T, scores.policy_logp_MT[0], scores.batch, 0)
        surrogate_T = PPO().surrogate(inputs)
        loss = -(torch.where(result.keep_T, result.weight_T * surrogate_T, 0.0)).sum() / result.count
        loss.backward()
        losses.append(loss.detach())
        grads.append(logp_T.grad)
        assert (result.weight_T[s.mask_T] - 1).abs().max() < 2e-6
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-7)


def test_expected_mask_is_the_mean_of_bernoulli_masks_over_seeds():
    s = make_scores()
    fixed = dict(kappa_from="expected", denominator="all")
    want = run(Jackpot(mask="expected", **fixed), s).weight_T
    drawn = torch.stack([run(Jackpot(seed=seed, **fixed), s).weight_T for seed in range(400)]).double()
    error = (drawn.mean(0) - want).abs()
    rho = drawn.max(0).values.clamp(min=1e-3)
    accept = (want / rho).clamp(0, 1)
    assert (accept[s.mask_T] < 0.9).any()
    assert (error / rho <= 5 * (accept * (1 - accept) / 400).sqrt() + 5 / 400).all()


def test_expected_mask_does_not_depend_on_the_seed():
    s = make_scores()
    first, second = (run(Jackpot(mask="expected", seed=seed), s) for seed in (0, 1))
    assert torch.equal(first.weight_T, second.weight_T) and torch.equal(first.count, second.count)


SPLITS = (
    [torch.arange(0, 100), torch.arange(100, 300)],
    [torch.arange(0, 300, 3), torch.arange(1, 300, 3), torch.arange(2, 300, 3)],
    [torch.arange(299, -1, -1)],
    [torch.arange(0, 300), torch.arange(0)],
)


@pytest.mark.parametrize("split", SPLITS, ids=["halves", "interleaved", "reversed", "one empty rank"])
@pytest.mark.parametrize(
    "correction", [Jackpot(), Jackpot(mask="expected", lam=0.7), TokenIS(), NoCorrection()]
)
def test_keep_weight_count_and_metrics_do_not_depend_on_the_split(split, correction):
    s = make_scores()
    whole = run(correction, s)
    results = on_ranks([part(s, index) for index in split], partial(run, correction))
    keep_T, weight_T = torch.zeros_like(whole.keep_T), torch.zeros_like(whole.weight_T)
    for index, result in zip(split, results, strict=True):
        keep_T[index], weight_T[index] = result.keep_T, result.weight_T
    assert torch.equal(keep_T, whole.keep_T)
    torch.testing.assert_close(weight_T, whole.weight_T, rtol=1e-6, atol=0)
    torch.testing.assert_close(sum(result.count for result in results), whole.count, rtol=1e-12, atol=0)
    for name, pair in whole.metrics.items():
        sums = [sum(result.metrics[name][i] for result in results) for i in (0, 1)]
        assert mean(sums) == pytest.approx(mean(pair), rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_mini_batch_without_a_valid_token_says_nothing(name: str):
    """Its metrics are counted beside those of others of the step."""
    method = make_correction(name, {"preset": "recommended"} if name == "jackpot" else {}, 0)
    if "batch_normalize" in {field.name for field in fields(method)}:
        method = replace(method, batch_normalize=True)
    s = make_scores()
    nothing = run(method, replace(s, mask_T=torch.zeros_like(s.mask_T)))
    told = {key: float(count) for key, (_, count) in nothing.metrics.items() if count}
    assert told.keys() <= {"jackpot/lam"}


def test_jackpot_metrics_are_what_they_say():
    s = make_scores()
    result = run(Jackpot(cap=1.1, policy_cap=1.02), s)
    m = {name: mean(pair) for name, pair in result.metrics.items()}
    mask = s.mask_T
    accept = (s.target_logp_T - s.server_logp_T).exp().clamp(max=1)[mask]
    z_k = torch.minimum(s.candidate_target_logp_TK, s.candidate_server_logp_TK).exp().sum(-1)[mask]
    z = (m["jackpot/kappa"] * z_k).clamp(max=1)
    assert m["jackpot/acceptance"] == pytest.approx((result.keep_T[mask]).float().mean().item())
    assert m["jackpot/acceptance_expected"] == pytest.approx(accept.mean().item(), rel=1e-5)
    assert m["jackpot/kappa"] == pytest.approx(m["jackpot/acceptance"] / z_k.mean().item(), rel=1e-5)
    assert m["jackpot/z_topk"] == pytest.approx(z_k.mean().item(), rel=1e-5)
    assert m["jackpot/z"] == pytest.approx(z.mean().item(), rel=1e-5)
    for name, level in (("p01", 0.01), ("p05", 0.05), ("p50", 0.5)):
        exact = torch.quantile(z, level, interpolation="higher").item()
        assert exact - 0.02 <= m[f"jackpot/z_{name}"] <= exact + 0.0011
    kept = result.keep_T
    rho = (s.target_logp_T - s.server_logp_T).exp().clamp(min=1)[mask] * z
    drift = (s.policy_logp_T - s.target_logp_T).exp()
    assert m["jackpot/cap_fraction"] == pytest.approx((rho[kept[mask]] > 1.1).float().mean().item())
    assert m["jackpot/policy_cap_fraction"] == pytest.approx((drift[kept] > 1.02).float().mean().item())
    assert 0 < m["jackpot/cap_fraction"] < 1 and m["jackpot/z_zero_fraction"] == 0


def test_tis_truncates_old_policy_over_server_and_none_weighs_nothing():
    s = make_scores()
    ratio = (s.policy_logp_T - s.server_logp_T).exp()
    tis = run(TokenIS(cap=1.5), s)
    torch.testing.assert_close(tis.weight_T, torch.where(s.mask_T, ratio.clamp(max=1.5), 0.0))
    want = (ratio[s.mask_T] > 1.5).float().mean().item()
    assert mean(tis.metrics["is/cap_fraction"]) == pytest.approx(want) and 0 < want < 1
    none = run(NoCorrection(), s)
    assert torch.equal(none.weight_T, s.mask_T.float())
    for result in (tis, none):
        assert torch.equal(result.keep_T, s.mask_T) and result.count == s.mask_T.sum()


def logps_of(s):
    """(name, log-probs) of what there is of them."""
    named = [(name, value) for name, value in vars(s).items() if name.endswith(("logp_T", "logp_TK"))]
    return [(name, value) for name, value in named if value is not None]


@pytest.mark.parametrize("correction", [NoCorrection(), TokenIS(), Jackpot(), Jackpot(mask="expected")])
def test_nothing_outside_the_mask_matters_not_even_nan(correction):
    s = make_scores()
    broken = {}
    for name, value in logps_of(s):
        broken[name] = value.clone()
        broken[name][~s.mask_T] = math.nan
    spoiled = replace(s, **broken)
    want, got = run(correction, s), run(correction, spoiled)
    assert torch.equal(got.weight_T, want.weight_T) and torch.equal(got.keep_T, want.keep_T)
    for name, pair in {**want.metrics, **diagnose(s, want)}.items():
        assert mean({**got.metrics, **diagnose(spoiled, got)}[name]) == pytest.approx(mean(pair)), name


@pytest.mark.parametrize("correction", [NoCorrection(), TokenIS(), Jackpot(), Jackpot(mask="expected")])
def test_a_token_the_policy_cannot_produce_is_dropped_but_counted(correction):
    s = make_scores()
    for name in ("policy_logp_T", "target_logp_T"):
        logp_T = getattr(s, name).clone()
        logp_T[1] = -math.inf
        s = replace(s, **{name: logp_T})
    result = run(correction, s)
    assert s.mask_T[1] and not result.keep_T[1] and result.weight_T.isfinite().all()
    assert all(math.isfinite(mean(pair)) for pair in diagnose(s, result).values())


@pytest.mark.parametrize("correction", [NoCorrection(), TokenIS(), Jackpot()])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_server_logp_inside_the_mask_that_is_not_finite_is_an_error(correction, value):
    s = make_scores()
    server_logp_T = s.server_logp_T.clone()
    server_logp_T[1] = value
    with pytest.raises(ValueError, match=f"server_logp = {value}: must be finite at a sampled token"):
        run(correction, replace(s, server_logp_T=server_logp_T))


@pytest.mark.parametrize("correction", [NoCorrection(), TokenIS(), Jackpot(), Jackpot(mask="expected")])
def test_corrections_carry_no_gradient(correction):
    s = make_scores()
    live = {name: v.requires_grad_() for name, v in logps_of(s)}
    result = run(correction, replace(s, **live))
    tensors = [result.weight_T, result.count, *(x for pair in result.metrics.values() for x in pair)]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_diagnostics_are_their_formulas():
    s = make_scores()
    result = run(Jackpot(), s)
    got = {name: mean(pair) for name, pair in diagnose(s, result).items()}
    mask = s.mask_T
    p, a, q, advantage = (
        x[mask].double() for x in (s.policy_logp_T, s.actor_logp_T, s.server_logp_T, s.advantage_T)
    )
    weight, keep = result.weight_T[mask].double(), result.keep_T[mask]
    want = {
        "kl/server_policy_k1": (q - p).mean(),
        "kl/server_policy_k3": ((p - q).exp() - 1 - (p - q)).mean(),
        "kl/server_actor_k1": (q - a).mean(),
        "kl/server_actor_k3": ((a - q).exp() - 1 - (a - q)).mean(),
        "policy/chi2": (p - q).exp().square().mean() - 1,
        "policy/log_ppl": -p.mean(),
        "actor/log_ppl": -a.mean(),
        "server/log_ppl": -q.mean(),
        "gap/policy_actor": (p - a).abs().mean(),
        "gap/policy_server": (p - q).abs().mean(),
        "gap/actor_server": (a - q).abs().mean(),
        "weight/mean": weight.mean(),
        "weight/mean_square": weight.square().mean(),
        "rejected/positive": (~keep)[advantage > 0].double().mean(),
        "rejected/negative": (~keep)[advantage < 0].double().mean(),
        "rejected/correct": (~keep)[s.correct_T[mask]].double().mean(),
        "rejected/wrong": (~keep)[~s.correct_T[mask]].double().mean(),
    }
    own = [(p - q)[s.segment_T[mask] == i] for i in s.segment_T.unique()]
    want["policy/chi2_sequence"] = torch.stack([x.sum().exp() ** 2 - 1 for x in own]).mean()
    want["policy/ppl_ratio"] = torch.stack([(-x.mean()).exp() for x in own]).mean()
    assert got.keys() == want.keys() | {"kl/target_server", "weight/max", "weight/min"}
    assert weight.max() <= got["weight/max"] <= weight.max() * 1.01
    assert weight[keep].min() * 0.99 <= got["weight/min"] <= weight[keep].min()
    for name, value in want.items():
        assert got[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name


def test_a_divergence_over_candidates_grows_from_the_binary_to_the_exact_one():
    """400 pairs of laws, candidates in the order of q: no violation of binary <= top-k <= exact."""
    generator, vocabulary = torch.Generator().manual_seed(0), 12
    q, p = (torch.randn(400, vocabulary, generator=generator).double().log_softmax(-1) for _ in range(2))
    sampled_T1 = q.exp().multinomial(1, generator=generator)
    logp_T, anchor_T = p.gather(-1, sampled_T1)[:, 0], q.gather(-1, sampled_T1)[:, 0]
    beside_TK = q.argsort(-1, descending=True)
    own_TK = beside_TK == sampled_T1
    at = [x.gather(-1, beside_TK).masked_fill(own_TK, -math.inf) for x in (p, q)]
    rest_p, rest_q = -logp_T.expm1(), -anchor_T.expm1()
    binary = {
        sampled_tv: (logp_T.exp() - anchor_T.exp()).abs(),
        sampled_kl: anchor_T.exp() * (anchor_T - logp_T) + rest_q * (rest_q / rest_p).log(),
    }
    exact = {
        sampled_tv: (p.exp() - q.exp()).abs().sum(-1) / 2,
        sampled_kl: (q.exp() * (q - p)).sum(-1),
    }
    for distance, full_T in exact.items():
        known = [distance(logp_T, anchor_T, at[0][:, :k], at[1][:, :k]) for k in range(vocabulary + 1)]
        torch.testing.assert_close(known[0], binary[distance])
        torch.testing.assert_close(known[-1], full_T)
        assert all((less <= more + 1e-9).all() for less, more in pairwise(known))
        assert (known[4] > known[0] + 1e-3).any() and (known[4] < full_T - 1e-3).any()


def test_candidate_kl_is_exact_over_all_ids_and_a_lower_bound_on_some():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 200, V, generator=generator, dtype=torch.float64) * 1.5).log_softmax(-1)
    full = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(candidate_kl(p, q), full, rtol=1e-6, atol=1e-5)
    some = candidate_kl(p[:, :15], q[:, :15])
    assert (some <= full + 1e-9).all() and (some >= -1e-9).all() and some.mean() > 0.3 * full.mean()
    unknown = q[:, :15].clone()
    unknown[:, 10:] = -math.inf  # policy-only candidates whose q is not known
    torch.testing.assert_close(candidate_kl(p[:, :15], unknown), candidate_kl(p[:, :10], q[:, :10]))
    for lam in (0.5, 1.0, 2.0):
        kept = torch.minimum(q, p - math.log(lam)).log_softmax(-1)
        after = candidate_kl_after(p, q, lam)
        torch.testing.assert_close(after, (p.exp() * (p - kept)).sum(-1), rtol=1e-6, atol=1e-5)
        assert (candidate_kl_after(p[:, :15], q[:, :15], lam) <= some + 1e-9).all()
