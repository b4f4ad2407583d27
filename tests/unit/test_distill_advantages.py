"""Distillation losses against enumerated KL divergences; group advantages against their formulas."""

import math
import statistics

import numpy as np
import pytest
import torch

from megatron_jackpot.algorithm.advantages import ADVANTAGES, GRPO, RLOO, DrGRPO, ReinforcePP
from megatron_jackpot.algorithm.distill import DISTILL, ForwardFull, ForwardTopK, K3Sample, ReverseFull
from megatron_jackpot.algorithm.registry import build
from megatron_jackpot.records import DistillInputs

UNREAD = torch.zeros(0)
"""Rewards that nobody looks at."""
GROUPS = ([1.0, 0.0, 0.0, 1.0, 1.0], [0.3, -2.0, 7.5], [5.0, 5.0 + 1e-3], [0.1, 0.7])


def sampled(method, actor_logp_T, policy_logp_T):
    """The loss from log-probs of the sampled tokens."""
    none_TK = torch.empty(len(actor_logp_T), 0)
    return method(
        DistillInputs(
            actor_logp_T=actor_logp_T,
            policy_logp_T=policy_logp_T,
            actor_logp_TK=none_TK,
            policy_logp_TK=none_TK,
            kl=refuse,
        )
    )


def at_candidates(method, actor_logp_TK, policy_logp_TK):
    """The loss from log-probs at candidates."""
    zero_T = torch.zeros(len(actor_logp_TK))
    return method(
        DistillInputs(
            actor_logp_T=zero_T,
            policy_logp_T=zero_T,
            actor_logp_TK=actor_logp_TK,
            policy_logp_TK=policy_logp_TK,
            kl=refuse,
        )
    )


def whole(method, kl_T):
    """The loss from a divergence over the vocabulary, asked for in the method's direction."""

    def kl(direction):
        assert direction == method.direction
        return kl_T

    none_TK = torch.empty(len(kl_T), 0)
    return method(
        DistillInputs(
            actor_logp_T=kl_T * 0,
            policy_logp_T=kl_T * 0,
            actor_logp_TK=none_TK,
            policy_logp_TK=none_TK,
            kl=kl,
        )
    )


def refuse(direction):
    raise AssertionError("needs no logits")


def pair(seed=0, vocab=30):
    generator = torch.Generator().manual_seed(seed)
    logits = 0.5 * torch.randn(
        2, vocab, generator=generator, dtype=torch.float64
    )  # no token reaches the limit
    return logits[0].log_softmax(-1), logits[1].requires_grad_()


def test_on_actor_samples_the_k3_value_is_kl_actor_policy():
    policy, actor_logits = pair()
    actor = actor_logits.log_softmax(-1)
    value = (actor.exp() * sampled(K3Sample(), actor, policy)).sum()
    torch.testing.assert_close(value, (actor.exp() * (actor - policy)).sum())


def test_on_actor_samples_the_k3_gradient_is_that_of_kl_policy_actor():
    policy, actor_logits = pair()
    actor = actor_logits.log_softmax(-1)
    (actor.exp().detach() * sampled(K3Sample(), actor, policy)).sum().backward()
    other = actor_logits.detach().clone().requires_grad_()
    (policy.exp() * (policy - other.log_softmax(-1))).sum().backward()
    torch.testing.assert_close(actor_logits.grad, other.grad)


def test_k3_gradient_agrees_with_finite_differences_and_spares_the_teacher():
    generator = torch.Generator().manual_seed(1)
    policy_T, actor_T = 0.5 * torch.randn(2, 200, generator=generator, dtype=torch.float64)
    policy_T.requires_grad_()
    actor_T.requires_grad_()
    sampled(K3Sample(), actor_T, policy_T).sum().backward()
    with torch.no_grad():
        up, down = (sampled(K3Sample(), actor_T + sign * 1e-6, policy_T) for sign in (1, -1))
        torch.testing.assert_close(actor_T.grad, 1 - (policy_T - actor_T).exp())
    torch.testing.assert_close(actor_T.grad, (up - down) / 2e-6, rtol=1e-5, atol=1e-7)
    assert policy_T.grad is None


def test_k3_is_clamped_and_finite_at_any_gap():
    actor_T = torch.tensor([-60.0, -3.0, 0.0, -1.0], requires_grad=True)
    loss_T = sampled(K3Sample(), actor_T, torch.tensor([0.0, 0.0, -60.0, -math.inf]))
    loss_T.sum().backward()
    assert loss_T.tolist() == [10.0] * 4 and actor_T.grad.tolist() == [0.0] * 4


def test_k3_of_nearly_equal_models_is_not_rounding_noise():
    d = 1e-3
    loss = sampled(K3Sample(), torch.zeros(1), torch.full((1,), d))
    assert loss.item() == pytest.approx(math.expm1(d) - d, rel=1e-3)


def candidates(seed=2, tokens=40, vocab=12, top=4):
    """(actor logits [T, V] live, policy logp [T, V], candidate ids [T, K] that both models favour)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, tokens, vocab, generator=generator, dtype=torch.float64)
    ids_TK = (logits[0] + logits[1]).topk(top, -1).indices
    return logits[0].requires_grad_(), logits[1].log_softmax(-1), ids_TK


def numpy_kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


def test_forward_topk_over_the_vocabulary_is_kl_policy_actor_with_its_gradient():
    logits_TV, policy_TV, _ = candidates()
    actor_TV = logits_TV.log_softmax(-1)
    loss_T = at_candidates(ForwardTopK(), actor_TV, policy_TV)
    loss_T.sum().backward()
    p, q = policy_TV.exp().numpy(), actor_TV.detach().exp().numpy()
    np.testing.assert_allclose(loss_T.detach().numpy(), numpy_kl(p, q), rtol=1e-9)
    np.testing.assert_allclose(logits_TV.grad.numpy(), q - p, atol=1e-9)


def test_forward_topk_is_the_kl_with_one_more_id_for_the_rest_and_a_lower_bound():
    logits_TV, policy_TV, ids_TK = candidates()
    actor_TV = logits_TV.detach().log_softmax(-1)
    loss_T = at_candidates(ForwardTopK(), actor_TV.gather(-1, ids_TK), policy_TV.gather(-1, ids_TK)).numpy()
    p, q = policy_TV.exp().numpy(), actor_TV.exp().numpy()
    for row, ids in enumerate(ids_TK.numpy()):
        others = np.setdiff1d(np.arange(p.shape[1]), ids)
        want = numpy_kl(*(np.append(x[row][ids], x[row][others].sum()) for x in (p, q)))
        assert loss_T[row] == pytest.approx(want, rel=1e-9)
    assert (loss_T > 0).all() and (loss_T < numpy_kl(p, q)).all()


def test_forward_topk_gradient_agrees_with_finite_differences_and_spares_the_teacher():
    logits_TV, policy_TV, ids_TK = candidates(tokens=5)
    policy_TK = policy_TV.gather(-1, ids_TK).requires_grad_()

    def loss(logits):
        return at_candidates(ForwardTopK(), logits.log_softmax(-1).gather(-1, ids_TK), policy_TK).sum()

    loss(logits_TV).backward()
    want_TV = torch.zeros_like(logits_TV)
    with torch.no_grad():
        for at in np.ndindex(*logits_TV.shape):
            step_TV = torch.zeros_like(logits_TV)
            step_TV[at] = 1e-5
            want_TV[at] = (loss(logits_TV + step_TV) - loss(logits_TV - step_TV)) / 2e-5
    torch.testing.assert_close(logits_TV.grad, want_TV, rtol=1e-6, atol=1e-8)
    assert policy_TK.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_padding_candidates_change_neither_the_loss_nor_the_gradient(dtype):
    logits_TV, policy_TV, ids_TK = candidates()
    policy_TK = policy_TV.gather(-1, ids_TK).to(dtype)
    actor_TK = logits_TV.detach().log_softmax(-1).gather(-1, ids_TK).to(dtype).requires_grad_()
    padding = torch.full((len(ids_TK), 3), -math.inf, dtype=dtype)
    padded_TK = torch.cat([padding, actor_TK.detach()], -1).requires_grad_()
    loss_T = at_candidates(ForwardTopK(), actor_TK, policy_TK)
    padded_T = at_candidates(ForwardTopK(), padded_TK, torch.cat([padding, policy_TK], -1))
    loss_T.sum().backward()
    padded_T.sum().backward()
    assert loss_T.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(padded_T, loss_T)
    torch.testing.assert_close(padded_TK.grad, torch.cat([torch.zeros_like(padding), actor_TK.grad], -1))


def test_forward_topk_is_finite_with_its_gradient_at_every_edge():
    inf = math.inf
    rows = {  # (actor, policy)
        "all padding": ([-inf, -inf], [-inf, -inf]),
        "impossible for the actor": ([-inf, math.log(0.5)], [math.log(0.5), math.log(0.4)]),
        "impossible for the policy": ([math.log(0.5), math.log(0.3)], [-inf, math.log(0.9)]),
        "nothing left": ([0.0, -inf], [math.log(0.5), -inf]),
        "nothing left of either": ([0.0, -inf], [0.0, -inf]),
        "sums above one by rounding": ([1e-6, -30.0], [1e-6, -30.0]),
        "far apart": ([-200.0, -1e-7], [-1e-7, -200.0]),
    }
    actor_TK = torch.tensor([actor for actor, _ in rows.values()], requires_grad=True)
    loss_T = at_candidates(ForwardTopK(), actor_TK, torch.tensor([policy for _, policy in rows.values()]))
    loss_T.sum().backward()
    assert torch.isfinite(loss_T).all() and torch.isfinite(actor_TK.grad).all()
    got = dict(zip(rows, loss_T.tolist(), strict=True))
    assert got["all padding"] == got["nothing left of either"] == 0
    want = 0.4 * math.log(0.4 / 0.5) + 0.6 * math.log(0.6 / 0.5)
    assert got["impossible for the actor"] == pytest.approx(want, rel=1e-5)
    want = 0.9 * math.log(0.9 / 0.3) + 0.1 * math.log(0.1 / 0.7)
    assert got["impossible for the policy"] == pytest.approx(want, rel=1e-5)
    assert actor_TK.grad[0].tolist() == [0, 0] and actor_TK.grad[1, 0] == 0


def test_every_distillation_says_what_it_is_called_with():
    needs = {name: method.needs for name, method in DISTILL.items()}
    assert needs == {
        "k3_sample": "sampled",
        "forward_topk": "candidates",
        "forward_full": "logits",
        "reverse_full": "logits",
    }
    assert (ForwardFull.direction, ReverseFull.direction) == ("forward", "reverse")


@pytest.mark.parametrize("method", [ForwardFull, ReverseFull])
def test_a_full_divergence_passes_through_up_to_its_limit(method):
    kl_T = torch.tensor([0.0, 0.3, 7.0], requires_grad=True)
    assert whole(method(), kl_T) is kl_T
    loss_T = whole(method(limit=1.0), kl_T)
    loss_T.sum().backward()
    assert loss_T.tolist() == [0.0, pytest.approx(0.3), 1.0] and kl_T.grad.tolist() == [1, 1, 0]


@pytest.mark.parametrize("rewards", GROUPS)
@pytest.mark.parametrize("std", ["group", "none"])
def test_grpo_is_centred_and_scaled(rewards, std):
    scale = statistics.stdev(rewards) + 1e-6 if std == "group" else 1.0
    want = [(r - statistics.fmean(rewards)) / scale for r in rewards]
    for given in (rewards, torch.tensor(rewards, dtype=torch.float64)):
        torch.testing.assert_close(GRPO(std=std)(given), torch.tensor(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rewards", GROUPS)
def test_rloo_is_the_reward_minus_the_mean_of_the_others(rewards):
    want = [r - statistics.fmean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]
    torch.testing.assert_close(RLOO()(rewards), torch.tensor(want), rtol=1e-5, atol=1e-6)
    scaled = [x / (statistics.stdev(rewards) + 1e-6) for x in want]
    torch.testing.assert_close(RLOO(std="group")(rewards), torch.tensor(scaled), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rewards", GROUPS)
@pytest.mark.parametrize("advantage", [DrGRPO(), ReinforcePP()])
def test_dr_grpo_and_the_group_step_of_reinforce_pp_are_the_centred_reward(rewards, advantage):
    want = np.array(rewards) - np.mean(rewards)
    torch.testing.assert_close(
        advantage(rewards), torch.tensor(want, dtype=torch.float32), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("size", [1, 3])
def test_reinforce_pp_divides_by_the_deviation_over_all_ranks(size):
    method = ReinforcePP()
    groups = [*GROUPS, [1.0, 1.0], [0.1] * 3, [0.5]]
    advantages = [method(group) for group in groups]
    ranks = [torch.cat([torch.zeros(0), *advantages[rank::size]]) for rank in range(size)]
    sent = []
    for advantage_N in ranks:  # what every rank puts into the sum, then the step with what comes out
        method.over_batch(advantage_N, UNREAD, lambda sums: sent.append(sums) or sums)
    assert len(sent) == size and all(sums.dtype == torch.float64 for sums in sent)
    got = [method.over_batch(advantage_N, UNREAD, lambda sums: sum(sent)) for advantage_N in ranks]
    centred = np.concatenate([np.array(group) - np.mean(group) for group in groups])
    for advantage_N, got_N in zip(ranks, got, strict=True):
        np.testing.assert_allclose(got_N.numpy(), advantage_N.numpy() / (centred.std() + 1e-6), rtol=1e-5)
        assert got_N.dtype == torch.float32 and (got_N[advantage_N == 0] == 0).all()
    assert torch.cat(got).numpy().std() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("method", [GRPO(std="batch"), RLOO(std="batch")])
def test_the_deviation_of_the_batch_is_that_of_all_rewards_on_all_ranks(method, size):
    groups = [*GROUPS, [1.0, 1.0], [0.1] * 3, [0.5]]
    mine = [groups[rank::size] for rank in range(size)]
    advantages = [torch.cat([method(group) for group in own]) for own in mine]
    rewards = [torch.tensor([r for group in own for r in group], dtype=torch.float64) for own in mine]
    sent = []
    for pair in zip(advantages, rewards, strict=True):
        method.over_batch(*pair, lambda sums: sent.append(sums) or sums)
    scale = statistics.stdev([r for group in groups for r in group]) + 1e-6
    for rank, own in enumerate(mine):
        got = method.over_batch(advantages[rank], rewards[rank], lambda sums: sum(sent)).tolist()
        want = []
        for group in own:
            for i, r in enumerate(group):
                others = group[:i] + group[i + 1 :] if isinstance(method, RLOO) else group
                want.append((r - statistics.fmean(others or [r])) / scale if len(set(group)) > 1 else 0.0)
        assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("advantage_N", [torch.zeros(0), torch.zeros(5)])
def test_reinforce_pp_of_a_batch_without_signal_is_zero(advantage_N):
    got_N = ReinforcePP().over_batch(advantage_N, UNREAD, lambda sums: sums)
    assert got_N.tolist() == advantage_N.tolist()


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_the_others_need_nothing_from_the_batch(name):
    def refuse(sums):
        raise AssertionError("no collective is needed")

    advantage_N = torch.tensor([0.5, -3.0])
    assert build(name, {}, ADVANTAGES, "here").over_batch(advantage_N, UNREAD, refuse) is advantage_N


@pytest.mark.parametrize("advantage", [GRPO(), GRPO(std="batch"), RLOO(), DrGRPO(), ReinforcePP()])
@pytest.mark.parametrize("rewards", [[0.1] * 3, [1.0] * 8, [0.5], []])
def test_equal_rewards_and_lone_samples_have_no_advantage(advantage, rewards):
    assert advantage(rewards).tolist() == [0.0] * len(rewards)


def test_the_reward_itself_is_an_advantage_without_a_group():
    assert build("reward", {}, ADVANTAGES, "here")([0.25]).tolist() == [0.25]
    assert build("reward", {}, ADVANTAGES, "here")([1.0, 1.0, -3.0]).tolist() == [1.0, 1.0, -3.0]


@pytest.mark.parametrize("advantage", [GRPO(), RLOO(), DrGRPO(), ReinforcePP()])
def test_a_reward_that_is_not_finite_is_an_error(advantage):
    with pytest.raises(ValueError, match=r"rewards = \[1.0, nan\]: must be finite"):
        advantage([1.0, math.nan])
    with pytest.raises(ValueError, match="must be one number per completion"):
        advantage(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("registry", "name", "knobs", "message"),
    [
        (ADVANTAGES, "grpo", {"eps": 0}, "here.eps = 0.0: must be a finite number > 0. Use 1e-6."),
        (ADVANTAGES, "grpo", {"std": False}, "here.std = False: must be one of 'group', 'batch', 'none'."),
        (ADVANTAGES, "rlo", {}, "here.name = 'rlo' is unknown. Did you mean 'rloo'?"),
        (DISTILL, "k3_sample", {"limit": 0}, "here.limit = 0.0: must lie in (0, 20.0]. Use 10."),
        (ADVANTAGES, "reinforce++", {"eps": -1}, "here.eps = -1.0: must be a finite number > 0. Use 1e-6."),
        (
            ADVANTAGES,
            "dr_grpo",
            {"std": "none"},
            "Unknown setting 'here.std' of 'dr_grpo'. It has no settings.",
        ),
        (DISTILL, "k3", {}, "here.name = 'k3' is unknown."),
        (DISTILL, "forward_topk", {"needs": "logits"}, "Unknown setting 'here.needs' of 'forward_topk'."),
        (DISTILL, "reverse_full", {"limit": 0}, "here.limit = 0.0: must be > 0 or null. Use null."),
    ],
)
def test_bad_knobs_are_named_with_their_rule(registry, name, knobs, message):
    with pytest.raises(ValueError) as caught:
        build(name, knobs, registry, "here")
    assert str(caught.value).startswith(message)
