"""Laws that hold for every objective, PPO's formula and gradient, and the mistakes of a configuration."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_jackpot.algorithm.objectives import OBJECTIVES, OPSM, PPO, SAPO, DecoupledPPO
from megatron_jackpot.algorithm.objectives_covariance import KLCov
from megatron_jackpot.algorithm.objectives_masked import BAPO, DPPOKL, DPPOTV, M2PO
from megatron_jackpot.algorithm.objectives_regression import Regression
from megatron_jackpot.algorithm.objectives_sequence import GMPO, GSPO, TOPR, MinPRO
from megatron_jackpot.algorithm.registry import build
from megatron_jackpot.records import Scores
from tests.unit.flat import Tokens, batch_of, identity, inputs_of, number_alone

VARIANTS = [PPO(), PPO(clip_low=0.4, clip_high=0.7), PPO(dual_clip=3.0), PPO(clip_low=0.0, clip_high=0.0)]
LENGTHS = [7, 12, 1, 20, 9, 5, 16, 3, 30, 11]
GARBAGE = [math.nan, math.inf, -math.inf, 1e30]


def make_tokens(seed=0, gap=0.4, padding=6):
    """(live log-probs, tokens) of packed rollouts with prompts, holes in the mask and padding, float64."""
    generator = torch.Generator().manual_seed(seed)

    def noise(num):
        return torch.randn(num, generator=generator, dtype=torch.float64)

    segment_T = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)] + [torch.full((padding,), -1)])
    num = len(segment_T)
    advantage = noise(len(LENGTHS))
    advantage[4] = 0.0
    server_T = -torch.rand(num, generator=generator, dtype=torch.float64) * 3 - 1e-3
    old_T = (server_T + gap * noise(num)).clamp(max=-1e-4)
    logp_T = (old_T + gap * noise(num)).clamp(max=-1e-4)
    mask_T = (segment_T >= 0) & (torch.rand(num, generator=generator) > 0.15)
    at_candidates = [shared_out(one_T, noise(num * 3).view(num, 3)) for one_T in (logp_T, old_T, server_T)]
    tokens = Tokens(
        old_logp_T=old_T,
        server_logp_T=server_T,
        advantage_T=torch.where(segment_T >= 0, advantage[segment_T], 0.0),
        mask_T=mask_T,
        segment_T=segment_T,
        candidates_TK3=torch.stack(at_candidates, -1),
    )
    return logp_T, tokens


def shared_out(logp_T, score_TC):
    """log-probs at two candidates of what the sampled token leaves; a third of the second ones is padding."""
    left_T = (-torch.expm1(logp_T)).log()
    at_TK = (left_T[:, None] + score_TC.log_softmax(-1))[:, :2]
    at_TK[::3, 1] = -math.inf
    return at_TK


def scores_of(logp_T, tokens):
    """What `prepare` sees when the target is the live policy; what it must not look at is None."""
    models = dict(policy_logp_MT=tokens.old_logp_T[None], target_logp_MT=logp_T[None])
    known = dict(batch=batch_of(tokens), **models, step=3)
    names = [name for name, item in Scores.__dataclass_fields__.items() if name != "exact_overlap_MT"]
    return Scores(**{name: known.get(name) for name in names})


def part(record, index):
    chosen = {name: x[index] for name, x in vars(record).items() if isinstance(x, torch.Tensor)}
    return replace(record, **chosen)


def prepared(objective, logp_T, tokens):
    return objective.prepare(scores_of(logp_T, tokens), identity, number_alone)


def surrogate_and_grad(objective, logp_T, tokens):
    live_T = logp_T.clone().requires_grad_()
    value_T = objective.surrogate(inputs_of(live_T, tokens))
    value_T.sum().backward()
    return value_T.detach(), live_T.grad


CLIMBERS = [name for name, kind in OBJECTIVES.items() if not issubclass(kind, Regression)]
"""What ends at a policy gradient; the others have laws of their own: test_objectives_regression.py."""
EVERY = [build(name, {}, OBJECTIVES, "objective") for name in CLIMBERS]
EVERY += [
    *VARIANTS[1:3],
    DecoupledPPO(cap=1.1),
    OPSM(delta=0.05),
    GSPO(clip_low=0.03, clip_high=0.04),
    TOPR(level="token"),
    MinPRO(anchor="old"),
    OPSM(delta=0.05, anchor="server"),
    SAPO(tau_positive=2.0, tau_negative=3.0),
    GMPO(clip_low=0.05, clip_high=0.1),
    KLCov(share=0.1),
    BAPO(positive_share=0.9),
    M2PO(scope="all"),
    DPPOTV(approximation="topk"),
    DPPOKL(approximation="topk", anchor="old", delta_low=0.01, delta_high=0.01),
]
every_objective = pytest.mark.parametrize("objective", EVERY, ids=repr)


def surrogate(c, logp, old, a):
    s = math.exp(logp - old)
    value = min(s * a, min(max(s, 1 - c.clip_low), 1 + c.clip_high) * a)
    return max(value, c.dual_clip * a) if c.dual_clip is not None and a < 0 else value


@pytest.mark.parametrize("objective", VARIANTS)
def test_ppo_is_its_formula_token_by_token(objective):
    logp_T, tokens = make_tokens(gap=1.0)
    rows = zip(logp_T.tolist(), tokens.old_logp_T.tolist(), tokens.advantage_T.tolist(), strict=True)
    want_T = torch.tensor([surrogate(objective, *row) for row in rows], dtype=torch.float64)
    want_T = torch.where(tokens.mask_T, want_T, 0.0)
    torch.testing.assert_close(objective.surrogate(inputs_of(logp_T, tokens)), want_T)


@pytest.mark.parametrize("objective", VARIANTS[:3])
def test_ppos_gradient_agrees_with_finite_differences(objective):
    logp_T, tokens = make_tokens(gap=1.0)
    _, grad_T = surrogate_and_grad(objective, logp_T, tokens)
    step = 1e-6
    up_T, down_T = (objective.surrogate(inputs_of(logp_T + sign * step, tokens)) for sign in (1, -1))
    torch.testing.assert_close(grad_T, (up_T - down_T) / (2 * step), rtol=1e-5, atol=1e-8)


@every_objective
def test_the_gradient_reaches_the_live_policy_only(objective):
    logp_T, tokens = make_tokens()
    objective = prepared(objective, logp_T, tokens)
    constants = (tokens.old_logp_T, tokens.server_logp_T, tokens.advantage_T)
    for constant in constants:
        constant.requires_grad_()
    _, grad_T = surrogate_and_grad(objective, logp_T, tokens)
    assert grad_T.abs().sum() > 0
    assert all(constant.grad is None for constant in constants)


@every_objective
def test_on_policy_every_objective_is_the_policy_gradient(objective):
    _, tokens = make_tokens()
    tokens = replace(tokens, old_logp_T=tokens.server_logp_T)
    logp_T = tokens.server_logp_T.clone()
    _, grad_T = surrogate_and_grad(prepared(objective, logp_T, tokens), logp_T, tokens)
    torch.testing.assert_close(grad_T, torch.where(tokens.mask_T, tokens.advantage_T, 0.0))


@every_objective
@pytest.mark.parametrize("garbage", GARBAGE)
def test_nothing_outside_the_mask_is_seen(objective, garbage):
    logp_T, tokens = make_tokens()
    objective = prepared(objective, logp_T, tokens)
    want_T, want_grad_T = surrogate_and_grad(objective, logp_T, tokens)
    outside_T = ~tokens.mask_T

    def spoiled(value_T):
        return torch.where(outside_T, garbage, value_T)

    dirty = replace(
        tokens,
        old_logp_T=spoiled(tokens.old_logp_T),
        server_logp_T=spoiled(tokens.server_logp_T),
        advantage_T=spoiled(tokens.advantage_T),
        candidates_TK3=torch.where(outside_T[:, None, None], garbage, tokens.candidates_TK3),
    )
    value_T, grad_T = surrogate_and_grad(objective, spoiled(logp_T), dirty)
    assert torch.equal(value_T, want_T) and torch.equal(grad_T, want_grad_T)
    assert (value_T[outside_T] == 0).all() and (grad_T[outside_T] == 0).all()
    clean = objective.metrics(inputs_of(logp_T, tokens))
    for name, pair in objective.metrics(inputs_of(spoiled(logp_T), dirty)).items():
        assert torch.equal(torch.stack(pair), torch.stack(clean[name])), name
    again = prepared(objective, spoiled(logp_T), dirty)
    assert again == objective


@every_objective
@pytest.mark.parametrize("both", [True, False], ids=["old and live", "live"])
def test_a_probability_of_0_tells_a_rollouts_other_tokens_what_a_tiny_one_does(objective, both):
    logp_T, tokens = make_tokens()
    index = tokens.mask_T.nonzero()[5]
    others_T = torch.ones_like(tokens.mask_T).index_fill(0, index, False)

    def with_logp(value):
        live_T, old_T = (x.index_fill(0, index, value) for x in (logp_T, tokens.old_logp_T))
        return live_T, replace(tokens, old_logp_T=old_T) if both else tokens

    tiny, zero = with_logp(-60.0), with_logp(-math.inf)
    objective = prepared(objective, *tiny)
    assert prepared(objective, *zero) == objective
    for got_T, want_T in zip(
        surrogate_and_grad(objective, *zero), surrogate_and_grad(objective, *tiny), strict=True
    ):
        assert torch.equal(got_T[others_T], want_T[others_T])
        assert got_T[index] == 0


@pytest.mark.parametrize("objective", [TOPR(), MinPRO(), GSPO(clip_low=1.0), OPSM(delta=0.5)], ids=repr)
def test_what_looks_at_a_rollout_sees_a_probability_of_0(objective):
    """Left out of the rollout, the token would change nothing for the others."""
    logp_T, tokens = make_tokens(seed=1)
    index = (tokens.mask_T & (tokens.segment_T == 3)).nonzero()[0]
    tokens = replace(tokens, advantage_T=-torch.ones_like(tokens.advantage_T))
    without = replace(tokens, mask_T=tokens.mask_T.index_fill(0, index, False))
    own_T = without.mask_T & (tokens.segment_T == 3)
    left_out_T = objective.surrogate(inputs_of(logp_T, without))
    zero_T = objective.surrogate(inputs_of(logp_T.index_fill(0, index, -math.inf), tokens))
    assert (zero_T[own_T] != left_out_T[own_T]).all()


def test_a_nan_of_the_model_inside_the_mask_is_not_hidden():
    logp_T, tokens = make_tokens()
    logp_T[tokens.mask_T.nonzero()[3]] = math.nan
    assert PPO().surrogate(inputs_of(logp_T, tokens)).isnan().any()
    with pytest.raises(ValueError, match="target_logp = nan"):
        prepared(M2PO(), logp_T, tokens)


@every_objective
def test_clip_fraction_is_the_share_of_tokens_without_gradient(objective):
    logp_T, tokens = make_tokens(gap=0.8)
    objective = prepared(objective, logp_T, tokens)
    _, grad_T = surrogate_and_grad(objective, logp_T, tokens)
    metrics = objective.metrics(inputs_of(logp_T, tokens))
    flat_T = (grad_T == 0) & tokens.mask_T & (tokens.advantage_T != 0)
    total, count = metrics["clip_fraction"]
    assert total.item() == flat_T.sum().item()
    assert count.item() == tokens.mask_T.sum().item()
    if isinstance(objective, PPO | GSPO | BAPO | M2PO):
        assert total > 0
    ratio_T = (logp_T - tokens.old_logp_T).exp()[tokens.mask_T]
    torch.testing.assert_close(metrics["ratio"][0], ratio_T.sum())
    torch.testing.assert_close(metrics["update_k3"][0], (ratio_T - 1 - ratio_T.log()).sum())


@every_objective
def test_float32_inputs_give_float32_surrogates(objective):
    logp_T, tokens = make_tokens()
    low = {name: x.float() for name, x in vars(tokens).items() if x.is_floating_point()}
    tokens, logp_T = replace(tokens, **low), logp_T.float()
    value_T = prepared(objective, logp_T, tokens).surrogate(inputs_of(logp_T, tokens))
    assert value_T.dtype == torch.float32


@every_objective
def test_a_micro_batch_of_padding_alone_is_zero(objective):
    logp_T, tokens = make_tokens()
    objective = prepared(objective, logp_T, tokens)
    empty = replace(
        tokens, mask_T=torch.zeros_like(tokens.mask_T), segment_T=torch.full_like(tokens.segment_T, -1)
    )
    value_T, grad_T = surrogate_and_grad(objective, logp_T, empty)
    assert not value_T.any() and not grad_T.any()
    assert objective.metrics(inputs_of(logp_T, empty))["clip_fraction"][1] == 0
    none = part(empty, slice(0, 0))
    assert objective.surrogate(inputs_of(logp_T[:0], none)).shape == (0,)


def test_ratios_beyond_the_clamp_stay_finite():
    logp_T = torch.tensor([0.0, -500.0], requires_grad=True)
    tokens = Tokens(
        old_logp_T=torch.tensor([-500.0, 0.0]),
        server_logp_T=torch.tensor([-500.0, 0.0]),
        advantage_T=torch.tensor([-1.0, -1.0]),
        mask_T=torch.tensor([True, True]),
        segment_T=torch.tensor([0, 1]),
    )
    value_T = PPO().surrogate(inputs_of(logp_T, tokens))
    value_T.sum().backward()
    torch.testing.assert_close(value_T.detach(), torch.tensor([-math.exp(20), -0.8]))
    assert logp_T.grad.isfinite().all()


def test_gspo_has_the_gradient_of_the_clipped_sequence_ratio():
    logp_T, tokens = make_tokens(gap=0.1)
    objective = GSPO(clip_low=0.03, clip_high=0.04)
    _, grad_T = surrogate_and_grad(objective, logp_T, tokens)
    live_T = logp_T.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(LENGTHS)):
        own_T = tokens.mask_T & (tokens.segment_T == i)
        if own_T.any():
            s, a = (live_T - tokens.old_logp_T)[own_T].mean().exp(), tokens.advantage_T[own_T][0]
            total = total + own_T.sum() * torch.minimum(s * a, s.clamp(0.97, 1.04) * a)
    total.backward()
    torch.testing.assert_close(grad_T, live_T.grad)


@pytest.mark.parametrize("name", ["bapo", "m2po", "clip_cov", "kl_cov"])
def test_an_objective_that_was_not_prepared_says_so(name):
    logp_T, tokens = make_tokens()
    objective = OBJECTIVES[name]()
    for call in (objective.surrogate, objective.metrics):
        with pytest.raises(RuntimeError, match=f"Objective '{name}' needs numbers of the whole mini-batch"):
            call(inputs_of(logp_T, tokens))


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("ppo", {"clip_low": 1.5}, "clip_low = 1.5: must lie in [0, 1]. Use 0.2."),
        ("ppo", {"clip_high": -0.1}, "clip_high = -0.1: must be >= 0. Use 0.28."),
        ("ppo", {"dual_clip": 1.1}, "dual_clip = 1.1: must be > 1 + clip_high"),
        ("decoupled_ppo", {"cap": 0.5}, "cap = 0.5: must be >= 1."),
        ("opsm", {"delta": -1}, "delta = -1.0: must be >= 0."),
        ("opsm", {"clip_low": 2}, "clip_low = 2.0: must lie in [0, 1]."),
        ("cispo", {"clip_low": 1.5}, "clip_low = 1.5: must lie in [0, 1]. Use 1.0."),
        ("cispo", {"clip_high": -1}, "clip_high = -1.0: must be >= 0. Use 4.0."),
        ("gspo", {"clip_high": "-1e-4"}, "clip_high = -0.0001: must be >= 0."),
        ("gspo", {"clip_low": -1}, "clip_low = -1.0: must lie in [0, 1]."),
        ("topr", {"level": "tokn"}, "level = 'tokn': must be one of 'sequence', 'token'."),
        ("topr", {"anchor": "q"}, "anchor = 'q': must be one of 'server', 'old'."),
        ("minpro", {"cap": 0}, "cap = 0.0: must be >= 1."),
        ("dppo_tv", {"delta_low": -0.1}, "delta_low = -0.1: must be >= 0. Use 0.15."),
        ("dppo_kl", {"delta_high": "nan"}, "delta_high = nan: must be >= 0. Use 0.05."),
        ("dppo_tv", {"kl_coef": -1}, "kl_coef = -1.0: must be finite and >= 0. Use 1e-3, or 0 for none."),
        ("dppo_kl", {"cap": 0.1}, "cap = 0.1: must be >= 1."),
        ("dppo_kl", {"approximation": "top_k"}, "approximation = 'top_k': must be one of 'binary', 'topk'."),
        ("sapo", {"tau_negative": 0}, "tau_negative = 0.0: must be a finite number > 0. Use 1.0 and 1.05."),
        ("gmpo", {"clip_low": -1}, "clip_low = -1.0: must be finite and >= 0. Use 0.4."),
        ("clip_cov", {"share": 1}, "share = 1.0: must lie in (0, 1)."),
        ("clip_cov", {"cov_low": 6}, "cov_low = 6.0: must be < cov_high = 5.0."),
        ("kl_cov", {"coef": 0}, "coef = 0.0: must be finite and > 0. Use 1.0."),
        ("bapo", {"positive_share": 1}, "positive_share = 1.0: must lie in (0, 1)."),
        ("bapo", {"low_end": 0.5}, "low_end = 0.5: must lie in [low_start = 0.6, 1]."),
        ("bapo", {"high_start": 4}, "high_start = 4.0: must lie in [1, high_end = 3.0]."),
        ("bapo", {"low_step": 0}, "low_step = 0.0: must be >= 0.001 and finite."),
        ("bapo", {"dual_clip": 2}, "dual_clip = 2.0: must be >= high_end = 3.0."),
        ("m2po", {"budget": 0}, "budget = 0.0: must be a finite number > 0."),
        ("m2po", {"scope": "every"}, "scope = 'every': must be one of"),
    ],
)
def test_bad_knobs_are_named_with_their_rule(name, knobs, message):
    with pytest.raises(ValueError) as caught:
        build(name, knobs, OBJECTIVES, "algorithm.objective")
    assert str(caught.value).startswith(f"algorithm.objective.{message}")


def test_an_unknown_knob_is_named_with_the_nearest():
    message = "Unknown setting 'algorithm.objective.clip' of 'ppo'. Did you mean 'clip_low'?"
    with pytest.raises(ValueError) as caught:
        build("ppo", {"clip": 0.2}, OBJECTIVES, "algorithm.objective")
    assert str(caught.value) == message
