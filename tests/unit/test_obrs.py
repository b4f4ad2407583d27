"""The laws of OBRS, enumerated over small vocabularies in fp64."""

import math

import pytest
import torch

from megatron_jackpot.algorithm.obrs import (
    _philox,
    accept_prob,
    check_sampled,
    counter_uniform,
    draw_keep,
    drift_weight,
    exact_overlap_mass,
    jackpot_weight,
    kappa,
    overlap_mass,
    tail_correction,
)

LAMS = (0.2, 0.5, 0.8, 1.0, 1.25, 2.0, 5.0)
IDENTITY = dict(rtol=1e-12, atol=1e-12)


def draws(num=3000, vocab=50, seed=0):
    """Random (log p, log q) [num, vocab] in fp64: peaked and flat rows, all ratios inside the +-20 clamp."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = 0.2 + 2.3 * torch.rand(2, num, 1, generator=generator, dtype=torch.float64)
    logits = torch.randn(2, num, vocab, generator=generator, dtype=torch.float64) * sharpness
    return logits.log_softmax(-1).unbind()


def kept_law(p, q, lam):
    """q' from its definition, q * accept / its sum, and that sum."""
    mass = q.exp() * accept_prob(p, q, lam)
    return mass / mass.sum(-1, keepdim=True), mass.sum(-1)


def close(actual, expected):
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual), **IDENTITY
    )


@pytest.mark.parametrize("lam", LAMS)
def test_overlap_mass_over_the_vocabulary_is_the_expected_acceptance(lam):
    p, q = draws()
    z = exact_overlap_mass(p, q, lam)
    close(z, (q.exp() * torch.minimum(torch.ones_like(p), p.exp() / (lam * q.exp()))).sum(-1))
    assert (z > 0).all() and (z <= min(1, 1 / lam)).all()


def test_at_lam_1_the_overlap_is_one_minus_total_variation():
    p, q = draws()
    close(exact_overlap_mass(p, q, 1.0), 1 - (p.exp() - q.exp()).abs().sum(-1) / 2)


@pytest.mark.parametrize("lam", LAMS)
def test_identity_1_weights_of_the_kept_law_sum_to_one(lam):
    p, q = draws()
    law, z = kept_law(p, q, lam)
    weight = jackpot_weight(p, q, z[:, None], lam, math.inf)
    close((law * weight).sum(-1), 1.0)
    close(weight, p.exp() / law)


def test_identity_1_misses_what_the_server_cannot_sample():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    q = torch.tensor([0.6, 0.4], dtype=torch.float64).log()
    law, z = kept_law(p[:2], q, 1.3)
    close((law * jackpot_weight(p[:2], q, z, 1.3, math.inf)).sum(), 0.8)


def test_identity_2_divergence_from_the_target_falls_and_keeps_falling_with_lam():
    p, q = draws()
    before = (p.exp() * (p - q)).sum(-1)
    for lam in LAMS:
        after = (p.exp() * (p - kept_law(p, q, lam)[0].log())).sum(-1)
        assert (after <= before + 1e-12).all()
        before = after


def test_identity_2_no_other_rule_of_the_same_acceptance_is_closer():
    p, q = draws(num=64, vocab=4, seed=1)
    for lam in (0.5, 1.0, 2.0):
        _, budget = kept_law(p, q, lam)
        rule = best_rule(p.exp(), q.exp(), budget)
        found = q.exp() * rule / budget[:, None]
        assert rule.max() <= 1 and ((q.exp() * rule).sum(-1) - budget).abs().max() < 1e-9
        kl = [(p.exp() * (p - law.log())).sum(-1) for law in (kept_law(p, q, lam)[0], found)]
        assert (kl[0] <= kl[1] + 1e-8).all()
        assert (kl[1] - kl[0]).max() < 1e-4  # the optimiser did get there


def best_rule(p, q, budget):
    """argmax over 0 <= a <= 1, sum q a = budget, of sum p log a: mirror ascent on the kept mass m = q a.

    After a step on log m, the nearest m <= q of the right sum in KL is min(q, c m); c by bisection.
    """
    mass = q * budget[:, None]
    for _ in range(150):
        mass = mass * (0.2 * (p * budget[:, None] / mass - 1)).clamp(-1, 1).exp()
        low, high = torch.full_like(budget, -5.0), torch.full_like(budget, 25.0)
        for _ in range(45):
            middle = (low + high) / 2
            too_much = torch.minimum(q, mass * middle.exp()[:, None]).sum(-1) > budget
            low, high = torch.where(too_much, low, middle), torch.where(too_much, middle, high)
        mass = torch.minimum(q, mass * high.exp()[:, None])
    return mass / q


@pytest.mark.parametrize("cap", [1.0, 1.5, 3.0, 10.0])
@pytest.mark.parametrize("lam", LAMS)
def test_identity_3_expected_weight_is_the_truncated_ratio_times_z(lam, cap):
    p, q = draws()
    z = exact_overlap_mass(p, q, lam)[:, None]
    ratio = (p - q).exp()
    expected = accept_prob(p, q, lam) * jackpot_weight(p, q, z, lam, cap)
    close(expected, (z * ratio).clamp(max=cap))
    before_z = accept_prob(p, q, lam) * jackpot_weight(p, q, z, lam, cap, "before_z")
    close(before_z, torch.minimum(z * ratio, z * lam * cap))


@pytest.mark.parametrize("lam", LAMS)
def test_identities_1_and_3_hold_in_fp32_to_1e_5(lam):
    p, q = (x.float() for x in draws())
    z = exact_overlap_mass(p, q, lam)[:, None]
    assert z.dtype == torch.float32
    accept, weight = accept_prob(p, q, lam), jackpot_weight(p, q, z, lam, math.inf)
    total = (q.exp() * accept / z * weight).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=0)
    capped = accept * jackpot_weight(p, q, z, lam, 3.0)
    torch.testing.assert_close(capped, (z * (p - q).exp()).clamp(max=3.0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("lam", LAMS)
def test_the_tail_correction_lies_between_its_bounds_and_is_exact_where_nothing_is_left_out(lam):
    p, q = draws(num=400)
    token = torch.multinomial(q.exp(), 1, generator=torch.Generator().manual_seed(3))
    accept = accept_prob(p.gather(-1, token), q.gather(-1, token), lam)[:, 0]
    mask = torch.arange(400) % 7 > 0
    exact = exact_overlap_mass(p, q, lam)
    errors = {}
    for k in (10, 50):
        inside = token[:, 0] < k
        z_k = overlap_mass(p[:, :k], q[:, :k], lam)
        z, eta = tail_correction(accept, inside, p[:, :k], q[:, :k], z_k, lam, mask, lambda sums: sums)
        rest_q, rest_p = (1 - x[:, :k].exp().sum(-1) for x in (q, p))
        assert 0 <= eta <= 1 and (z >= z_k - 1e-12).all()
        assert (z <= z_k + torch.minimum(rest_q, rest_p / lam).clamp(min=0) + 1e-12).all()
        errors[k] = ((z - exact).abs().mean(), (z_k - exact).abs().mean())
    assert errors[10][0] < 0.5 * errors[10][1]
    assert errors[50][0] < 1e-12
    # An id whose q is not known counts as left out, of p as of q.
    unknown = q[:, :10].clone()
    unknown[:, 5:] = -math.inf
    z_5 = overlap_mass(p[:, :5], q[:, :5], lam)
    args = (accept, token[:, 0] < 5)
    five = tail_correction(*args, p[:, :5], q[:, :5], z_5, lam, mask, lambda sums: sums)
    ten = tail_correction(*args, p[:, :10], unknown, z_5, lam, mask, lambda sums: sums)
    close(ten[0], five[0])


def test_identity_4_small_lam_is_truncated_importance_sampling():
    p, q = draws()
    lam = 1e-8  # below every ratio: everything is kept
    z = exact_overlap_mass(p, q, lam)[:, None]
    assert (accept_prob(p, q, lam) == 1).all()
    close(jackpot_weight(p, q, z, lam, 3.0), (p - q).exp().clamp(max=3.0))


def test_identity_5_equal_distributions_keep_everything_with_weight_one():
    _, q = draws()
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        same = q.to(dtype)
        z = exact_overlap_mass(same, same, 1.0)
        assert (accept_prob(same, same, 1.0) == 1).all()
        weight = jackpot_weight(same, same, z[:, None], 1.0, 3.0)
        torch.testing.assert_close(weight, torch.ones_like(weight), rtol=0, atol=tolerance)


def test_identity_6_on_policy_server_with_a_current_target_has_a_truncated_expected_weight():
    current, old = draws()
    z = exact_overlap_mass(current, old, 1.0)[:, None]
    unclipped_surrogate = (current - old).exp()  # s = p_current / p_old multiplies no second time: s := 1
    expected = accept_prob(current, old, 1.0) * jackpot_weight(current, old, z, 1.0, 3.0)
    close(expected, (z * unclipped_surrogate).clamp(max=3.0))
    with_c2 = expected * drift_weight(old, current, 1.28)
    assert (with_c2 - expected).abs().max() > 0.1  # which is why c2 must be dropped in that regime


def test_zeros_and_one_hot_rows_stay_finite():
    zero = -math.inf
    p = torch.tensor([[0.0, zero, zero], [math.log(0.5), math.log(0.5), zero]], dtype=torch.float64)
    q = torch.tensor([[zero, 0.0, zero], [zero, math.log(0.5), math.log(0.5)]], dtype=torch.float64)
    close(exact_overlap_mass(p, q, 1.0), [0.0, 0.5])
    close(exact_overlap_mass(p, p, 1.0), [1.0, 1.0])
    assert accept_prob(torch.tensor(zero), torch.tensor(-3.0), 1.0) == 0


def test_log_ratios_are_clamped_at_20():
    far = torch.tensor([0.0, -500.0]), torch.tensor([-500.0, 0.0])
    weight = jackpot_weight(*far, torch.ones(2), 1.0, math.inf)
    torch.testing.assert_close(weight, torch.tensor([math.exp(20), 1.0]))
    torch.testing.assert_close(accept_prob(*far, 1.0), torch.tensor([1.0, math.exp(-20)]))


def test_bf16_inputs_are_computed_in_fp32():
    p, q = (logp.to(torch.bfloat16) for logp in draws())
    for actual, wanted in (
        (accept_prob(p, q, 1.1), accept_prob(p.double(), q.double(), 1.1)),
        (overlap_mass(p, q, 1.1), overlap_mass(p.double(), q.double(), 1.1)),
    ):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-7)


def test_candidates_can_only_lose_overlap_and_padding_adds_none():
    p, q = draws()
    full = exact_overlap_mass(p, q, 1.0)
    part = overlap_mass(p[:, :20], q[:, :20], 1.0)
    padding = torch.full((len(p), 7), -math.inf, dtype=torch.float64)
    assert (part <= full).all()
    close(overlap_mass(torch.cat([p[:, :20], padding], -1), torch.cat([q[:, :20], padding], -1), 1.0), part)


def test_any_leading_shape_gives_the_same_numbers():
    p, q = draws(num=500)
    z = overlap_mass(p, q, 0.8)
    cube = (5, 10, 10, 50)
    close(overlap_mass(p.view(cube), q.view(cube), 0.8), z.view(5, 10, 10))
    close(accept_prob(p.view(cube), q.view(cube), 0.8), accept_prob(p, q, 0.8).view(cube))
    weight = jackpot_weight(p.view(cube), q.view(cube), z.view(5, 10, 10, 1), 0.8, 3.0)
    close(weight, jackpot_weight(p, q, z[:, None], 0.8, 3.0).view(cube))


def test_kappa_makes_the_mean_overlap_equal_the_acceptance():
    p, q = draws(num=200)
    mask = torch.arange(200) % 3 > 0
    accept, z_k = exact_overlap_mass(p, q, 1.0), overlap_mass(p[:, :20], q[:, :20], 1.0)
    value = kappa(accept, z_k, mask, lambda sums: sums)
    close((value * z_k[mask]).mean(), accept[mask].mean())


def test_kappa_is_one_statistic_of_the_mini_batch_however_it_is_split():
    p, q = draws(num=300)
    accept, z_k = exact_overlap_mass(p, q, 1.0) < 0.7, overlap_mass(p[:, :9], q[:, :9], 1.0)
    mask = torch.arange(300) % 7 > 1
    whole = kappa(accept, z_k, mask, lambda sums: sums)
    seen = []
    for part in (slice(0, 40), slice(40, 41), slice(41, 300)):
        kappa(accept[part], z_k[part], mask[part], lambda sums: seen.append(sums) or sums)
    assert len(seen) == 3  # one call each
    close(kappa(accept[:40], z_k[:40], mask[:40], lambda _: torch.stack(seen).sum(0)), whole)


def test_kappa_without_any_overlap_is_one():
    nothing = torch.zeros(4)
    assert kappa(nothing, nothing, torch.ones(4, dtype=torch.bool), lambda sums: sums) == 1
    assert kappa(nothing, nothing, torch.zeros(4, dtype=torch.bool), lambda sums: sums) == 1


def test_weights_carry_no_gradient():
    p, q = (logp.clone().requires_grad_() for logp in draws(num=3))
    z = exact_overlap_mass(p, q, 1.0)[:, None]
    for order in ("after_z", "before_z"):
        assert not jackpot_weight(p, q, z, 1.0, 3.0, order).requires_grad
    assert not drift_weight(p, q, 1.28).requires_grad


# Known answers of Random123 1.09 (kat_vectors), philox4x32 with 10 rounds.
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert _philox(counter, key) == answer
    assert tuple(word.item() for word in _philox(tuple(map(torch.tensor, counter)), key)) == answer


def keys(num=20_000):
    index = torch.arange(num)
    return torch.stack([index % 3, index // 7 % 50, index % 7], -1), index // 4


def test_uniform_numbers_have_24_bits_and_the_moments_of_the_uniform_law():
    u = counter_uniform(3, 5, *keys()).double()
    assert u.min() >= 0 and u.max() < 1
    assert (u * 2**24 == (u * 2**24).round()).all()
    sigma = len(u) ** -0.5
    assert abs(u.mean() - 0.5) < 5 * sigma / 12**0.5
    assert abs(u.square().mean() - 1 / 3) < 5 * sigma * (4 / 45) ** 0.5
    assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 5 * sigma


def test_every_part_of_the_key_changes_the_draws():
    ids, position = keys()
    variants = [
        counter_uniform(seed, step, ids, position) for seed, step in ((0, 0), (1, 0), (0, 1), (2**40, 0))
    ]
    for part in range(3):
        variants.append(counter_uniform(0, 0, ids + torch.eye(3, dtype=torch.int64)[part] * 1000, position))
    variants.append(counter_uniform(0, 0, ids, position + 100_000))
    for i, first in enumerate(variants):
        for second in variants[i + 1 :]:
            assert (first == second).float().mean() < 0.001


def test_draws_do_not_depend_on_packing_order_or_split():
    ids, position = keys()
    accept = torch.linspace(0, 1, len(position))
    whole = draw_keep(accept, 1, 2, ids, position)
    order = torch.randperm(len(position), generator=torch.Generator().manual_seed(0))
    pieces = [draw_keep(accept[part], 1, 2, ids[part], position[part]) for part in order.split(777)]
    assert torch.equal(torch.cat(pieces), whole[order])
    rows = draw_keep(accept.view(100, 200), 1, 2, ids.view(100, 200, 3), position.view(100, 200))
    assert torch.equal(rows.flatten(), whole)


def test_keep_happens_with_the_accept_probability():
    ids, position = keys()
    for accept in (0.0, 0.1, 0.5, 0.93, 1.0):
        keep = draw_keep(torch.full(position.shape, accept), 9, 9, ids, position).double()
        assert abs(keep.mean() - accept) <= 5 * (accept * (1 - accept) / len(keep)) ** 0.5


@pytest.mark.gpu
def test_draws_are_bit_identical_on_cpu_and_cuda():
    ids, position = keys()
    assert torch.equal(
        counter_uniform(3, 5, ids.cuda(), position.cuda()).cpu(), counter_uniform(3, 5, ids, position)
    )


ONE = torch.zeros(1)


@pytest.mark.parametrize("lam", [0.0, -1.0, math.inf, math.nan])
def test_a_bad_lam_is_named_with_its_rule(lam):
    for call in (
        lambda: accept_prob(ONE, ONE, lam),
        lambda: overlap_mass(ONE, ONE, lam),
        lambda: exact_overlap_mass(ONE, ONE, lam),
        lambda: jackpot_weight(ONE, ONE, ONE, lam, 3.0),
    ):
        with pytest.raises(ValueError, match=rf"lam = {lam}: must be a finite number > 0\. Use 1\.0"):
            call()


@pytest.mark.parametrize("cap", [0.99, -1.0, math.nan])
def test_a_cap_below_one_is_named_with_its_rule(cap):
    with pytest.raises(ValueError, match=rf"^cap = {cap}: must be >= 1"):
        jackpot_weight(ONE, ONE, ONE, 1.0, cap)
    with pytest.raises(ValueError, match=rf"^policy_cap = {cap}: must be >= 1"):
        drift_weight(ONE, ONE, cap)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_server_logp_that_is_not_finite_is_an_error(value):
    with pytest.raises(ValueError, match=rf"server_logp = {value}: must be finite"):
        check_sampled(ONE, torch.tensor([0.0, value]))


def test_a_nan_of_the_target_or_of_a_candidate_is_an_error():
    nan = torch.tensor([math.nan])
    for broken in (nan, torch.tensor([math.inf])):
        with pytest.raises(ValueError, match="target_logp = nan"):
            check_sampled(broken, ONE)
    check_sampled(torch.tensor([-math.inf]), ONE)
    for pair in ((nan, ONE), (ONE, nan)):
        with pytest.raises(ValueError, match="candidate log-probs contain NaN"):
            overlap_mass(*pair, 1.0)


def test_what_is_not_a_number_stays_one_where_it_was_not_checked():
    """Nothing turns a broken log-prob into an accept probability or a weight that looks right."""
    for pair in ((torch.tensor([math.nan]), ONE), (ONE, torch.tensor([math.nan]))):
        assert accept_prob(*pair, 1.0).isnan().all()
        assert jackpot_weight(*pair, ONE, 1.0, 3.0).isnan().all()


def test_an_unknown_clip_order_is_an_error():
    with pytest.raises(ValueError, match="clip_order = 'later': must be 'after_z' or 'before_z'"):
        jackpot_weight(ONE, ONE, ONE, 1.0, 3.0, "later")
