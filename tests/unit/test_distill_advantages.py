"""k3 distillation against enumerated KL divergences; group advantages against their formulas."""

import math
import statistics

import pytest
import torch

from megatron_jackpot.algorithm.advantages import ADVANTAGES, GRPO, RLOO
from megatron_jackpot.algorithm.distill import DISTILL, K3Sample
from megatron_jackpot.algorithm.registry import build

GROUPS = ([1.0, 0.0, 0.0, 1.0, 1.0], [0.3, -2.0, 7.5], [5.0, 5.0 + 1e-3], [0.1, 0.7])


def pair(seed=0, vocab=30):
    generator = torch.Generator().manual_seed(seed)
    logits = 0.5 * torch.randn(
        2, vocab, generator=generator, dtype=torch.float64
    )  # no token reaches the limit
    return logits[0].log_softmax(-1), logits[1].requires_grad_()


def test_on_actor_samples_the_k3_value_is_kl_actor_policy():
    policy, actor_logits = pair()
    actor = actor_logits.log_softmax(-1)
    value = (actor.exp() * K3Sample()(actor, policy)).sum()
    torch.testing.assert_close(value, (actor.exp() * (actor - policy)).sum())


def test_on_actor_samples_the_k3_gradient_is_that_of_kl_policy_actor():
    policy, actor_logits = pair()
    actor = actor_logits.log_softmax(-1)
    (actor.exp().detach() * K3Sample()(actor, policy)).sum().backward()
    other = actor_logits.detach().clone().requires_grad_()
    (policy.exp() * (policy - other.log_softmax(-1))).sum().backward()
    torch.testing.assert_close(actor_logits.grad, other.grad)


def test_k3_gradient_agrees_with_finite_differences_and_spares_the_teacher():
    generator = torch.Generator().manual_seed(1)
    policy_T, actor_T = 0.5 * torch.randn(2, 200, generator=generator, dtype=torch.float64)
    policy_T.requires_grad_()
    actor_T.requires_grad_()
    K3Sample()(actor_T, policy_T).sum().backward()
    with torch.no_grad():
        up, down = (K3Sample()(actor_T + sign * 1e-6, policy_T) for sign in (1, -1))
        torch.testing.assert_close(actor_T.grad, 1 - (policy_T - actor_T).exp())
    torch.testing.assert_close(actor_T.grad, (up - down) / 2e-6, rtol=1e-5, atol=1e-7)
    assert policy_T.grad is None


def test_k3_is_clamped_and_finite_at_any_gap():
    actor_T = torch.tensor([-60.0, -3.0, 0.0, -1.0], requires_grad=True)
    loss_T = K3Sample()(actor_T, torch.tensor([0.0, 0.0, -60.0, -math.inf]))
    loss_T.sum().backward()
    assert loss_T.tolist() == [10.0] * 4 and actor_T.grad.tolist() == [0.0] * 4


def test_k3_of_nearly_equal_models_is_not_rounding_noise():
    d = 1e-3
    loss = K3Sample()(torch.zeros(1), torch.full((1,), d))
    assert loss.item() == pytest.approx(math.expm1(d) - d, rel=1e-3)


@pytest.mark.parametrize("rewards", GROUPS)
@pytest.mark.parametrize("std", [True, False])
def test_grpo_is_centred_and_scaled(rewards, std):
    scale = statistics.stdev(rewards) + 1e-6 if std else 1.0
    want = [(r - statistics.fmean(rewards)) / scale for r in rewards]
    for given in (rewards, torch.tensor(rewards, dtype=torch.float64)):
        torch.testing.assert_close(GRPO(std=std)(given), torch.tensor(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rewards", GROUPS)
def test_rloo_is_the_reward_minus_the_mean_of_the_others(rewards):
    want = [r - statistics.fmean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]
    torch.testing.assert_close(RLOO()(rewards), torch.tensor(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("advantage", [GRPO(), GRPO(std=False), RLOO()])
@pytest.mark.parametrize("rewards", [[0.1] * 3, [1.0] * 8, [0.5], []])
def test_equal_rewards_and_lone_samples_have_no_advantage(advantage, rewards):
    assert advantage(rewards).tolist() == [0.0] * len(rewards)


@pytest.mark.parametrize("advantage", [GRPO(), RLOO()])
def test_a_reward_that_is_not_finite_is_an_error(advantage):
    with pytest.raises(ValueError, match=r"rewards = \[1.0, nan\]: must be finite"):
        advantage([1.0, math.nan])
    with pytest.raises(ValueError, match="must be one number per completion"):
        advantage(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("registry", "name", "knobs", "message"),
    [
        (ADVANTAGES, "grpo", {"eps": 0}, "here.eps = 0.0: must be > 0. Use 1e-6."),
        (ADVANTAGES, "grpo", {"std": 1}, "here.std = 1: must be of type bool, got int."),
        (ADVANTAGES, "rlo", {}, "here.name = 'rlo' is unknown. Did you mean 'rloo'?"),
        (DISTILL, "k3_sample", {"limit": 0}, "here.limit = 0.0: must lie in (0, 20.0]. Use 10."),
        (DISTILL, "k3", {}, "here.name = 'k3' is unknown."),
    ],
)
def test_bad_knobs_are_named_with_their_rule(registry, name, knobs, message):
    with pytest.raises(ValueError) as caught:
        build(name, knobs, registry, "here")
    assert str(caught.value).startswith(message)
