"""PPO's surrogate against its formula in plain Python and its gradient against finite differences."""

import math

import pytest
import torch

from megatron_jackpot.algorithm.objectives import OBJECTIVES, PPO
from megatron_jackpot.algorithm.registry import build

VARIANTS = [PPO(), PPO(clip_low=0.4, clip_high=0.7), PPO(dual_clip=3.0), PPO(clip_low=0.0, clip_high=0.0)]


def tokens(num=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    old_T = -torch.rand(num, generator=generator, dtype=torch.float64) * 3
    logp_T = old_T + torch.randn(num, generator=generator, dtype=torch.float64)
    advantage_T = torch.randn(num, generator=generator, dtype=torch.float64)
    advantage_T[::10] = 0.0
    return logp_T, old_T, advantage_T


def surrogate(c, logp, old, a):
    s = math.exp(logp - old)
    value = min(s * a, min(max(s, 1 - c.clip_low), 1 + c.clip_high) * a)
    return max(value, c.dual_clip * a) if c.dual_clip is not None and a < 0 else value


@pytest.mark.parametrize("objective", VARIANTS)
def test_ppo_is_its_formula_token_by_token(objective):
    logp_T, old_T, advantage_T = tokens()
    rows = zip(logp_T.tolist(), old_T.tolist(), advantage_T.tolist(), strict=True)
    want = torch.tensor([surrogate(objective, *row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(objective(logp_T, old_T, advantage_T), want)


@pytest.mark.parametrize("objective", VARIANTS[:3])
def test_the_gradient_agrees_with_finite_differences_and_reaches_the_live_policy_only(objective):
    logp_T, old_T, advantage_T = (x.requires_grad_() for x in tokens())
    objective(logp_T, old_T, advantage_T).sum().backward()
    with torch.no_grad():
        step = 1e-6
        up, down = (objective(logp_T + sign * step, old_T, advantage_T) for sign in (1, -1))
    torch.testing.assert_close(logp_T.grad, (up - down) / (2 * step), rtol=1e-5, atol=1e-8)
    assert old_T.grad is None and advantage_T.grad is None


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    _, old_T, advantage_T = tokens()
    logp_T = old_T.clone().requires_grad_()
    PPO()(logp_T, old_T, advantage_T).sum().backward()
    torch.testing.assert_close(logp_T.grad, advantage_T)


@pytest.mark.parametrize("objective", VARIANTS)
def test_clip_fraction_is_the_share_of_tokens_without_gradient(objective):
    logp_T, old_T, advantage_T = tokens()
    mask_T = (torch.arange(len(logp_T)) % 3 > 0) & (advantage_T != 0)
    live_T = logp_T.clone().requires_grad_()
    objective(live_T, old_T, advantage_T).sum().backward()
    metrics = objective.metrics(logp_T, old_T, advantage_T, mask_T)
    total, count = metrics["clip_fraction"]
    assert total.item() == ((live_T.grad == 0) & mask_T).sum().item() > 0
    assert count.item() == mask_T.sum().item()
    ratio_T = (logp_T - old_T).exp()[mask_T]
    torch.testing.assert_close(metrics["ratio"][0], ratio_T.sum())
    torch.testing.assert_close(metrics["update_k3"][0], (ratio_T - 1 - ratio_T.log()).sum())


def test_ratios_beyond_the_clamp_stay_finite():
    logp_T = torch.tensor([0.0, -500.0], requires_grad=True)
    value_T = PPO()(logp_T, torch.tensor([-500.0, 0.0]), torch.tensor([-1.0, -1.0]))
    value_T.sum().backward()
    torch.testing.assert_close(value_T.detach(), torch.tensor([-math.exp(20), -0.8]))
    assert logp_T.grad.isfinite().all()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"clip_low": 1.5}, "algorithm.objective.clip_low = 1.5: must lie in [0, 1]. Use 0.2."),
        ({"clip_high": -0.1}, "algorithm.objective.clip_high = -0.1: must be >= 0. Use 0.28."),
        ({"dual_clip": 1.1}, "algorithm.objective.dual_clip = 1.1: must be > 1 + clip_high"),
        ({"clip": 0.2}, "Unknown knob 'algorithm.objective.clip' of 'ppo'. Did you mean 'clip_low'?"),
    ],
)
def test_bad_knobs_are_named_with_their_rule(knobs, message):
    with pytest.raises(ValueError) as caught:
        build("ppo", knobs, OBJECTIVES, "algorithm.objective")
    assert str(caught.value).startswith(message)
