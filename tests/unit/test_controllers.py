"""lam for an acceptance against brute force; both controllers in closed loops, at bounds, after a resume."""

import math

import numpy as np
import pytest
import torch

from megatron_jackpot.algorithm.controllers import SteeredWeight, TargetAcceptance
from megatron_jackpot.algorithm.obrs import lambda_for_acceptance


def alone(sums):
    """One rank."""
    return sums


def never(sums):
    raise AssertionError("nothing may be summed")


def mean_accept(log_ratio, lam):
    return np.minimum(1.0, np.exp(np.asarray(log_ratio, dtype=np.float64)) / lam).mean()


def gaps(seed, tokens=3000, scale=1.0, shift=0.0, heavy=False):
    """log r of sampled tokens; heavy tails reach far beyond the bounds of lam."""
    generator = np.random.default_rng(seed)
    noise = generator.standard_t(2, tokens) if heavy else generator.normal(size=tokens)
    return np.clip(scale * noise + shift, -20, 20)


def solve(log_ratio, acceptance, mask=None, sum_over_batch=alone, **bounds):
    log_ratio = torch.tensor(np.asarray(log_ratio), dtype=torch.float64)
    mask = torch.ones(log_ratio.shape, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return lambda_for_acceptance(log_ratio, mask, acceptance, sum_over_batch, **bounds)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("scale", [0.003, 0.3, 2.0])
@pytest.mark.parametrize("acceptance", [0.3, 0.7, 0.95, 0.999])
def test_the_lam_found_gives_the_acceptance_or_names_the_bound_that_stops_it(heavy, scale, acceptance):
    for seed, shift in ((0, 0.0), (1, -0.4), (2, 0.6)):
        log_ratio = gaps(seed, scale=scale, shift=shift, heavy=heavy)
        lam = solve(log_ratio, acceptance)
        most, least = mean_accept(log_ratio, 0.2), mean_accept(log_ratio, 5.0)
        if least <= acceptance <= most:
            assert 0.2 <= lam <= 5 and mean_accept(log_ratio, lam) == pytest.approx(acceptance, abs=2.1e-4)
        else:
            assert (lam == 0.2 and most < acceptance) or (lam == 5.0 and least > acceptance)


def test_lam_agrees_with_the_root_that_brute_force_finds():
    log_ratio = gaps(3, tokens=20000, scale=0.5)
    grid = np.exp(np.linspace(math.log(0.2), math.log(5), 4001))
    accept = np.array([mean_accept(log_ratio, lam) for lam in grid])
    for acceptance in (0.4, 0.6, 0.9):
        want = np.interp(-acceptance, -accept, grid)  # falls with lam
        assert solve(log_ratio, acceptance) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("middle", [-1.0, -1e-4, 0.0, 0.37, 1.2])
def test_two_clusters_inside_one_bin_are_the_worst_case_and_well_under_a_thousandth(middle):
    width = math.log(25) / 4096
    log_ratio = np.repeat([middle - 0.499 * width, middle + 0.499 * width], 500)
    for acceptance in (0.9, 0.9995, 0.9999):
        lam = solve(log_ratio, acceptance)
        assert mean_accept(log_ratio, lam) == pytest.approx(acceptance, abs=2.1e-4)


@pytest.mark.parametrize("r", [0.1, 0.5, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("acceptance", [0.05, 0.4, 0.9])
def test_with_one_ratio_everywhere_lam_is_the_ratio_over_the_acceptance(r, acceptance):
    lam = solve(np.full(100, math.log(r)), acceptance)
    assert lam == pytest.approx(min(max(r / acceptance, 0.2), 5), rel=1e-6)


def test_one_token_among_many_impossible_ones():
    log_ratio = np.full(1000, -math.inf)
    log_ratio[17] = 0.0
    assert solve(log_ratio, 0.5) == 0.2
    assert solve(log_ratio, 0.0004) == pytest.approx(1 / (1000 * 0.0004), rel=1e-6)


def test_an_unreachable_budget_gives_the_bound():
    assert solve(gaps(4, shift=-8.0), 0.9) == 0.2
    assert solve(gaps(4, shift=8.0), 0.9) == 5.0
    assert solve(np.full(10, math.inf), 0.9) == 5.0


def test_other_bounds_hold_too():
    log_ratio = gaps(5, scale=0.5)
    wide = solve(log_ratio, 0.95)
    assert 0.2 < wide < 0.9
    assert solve(log_ratio, 0.95, lam_min=0.9, lam_max=1.1) == 0.9
    lam = solve(log_ratio, 0.95, lam_min=wide * 0.99, lam_max=wide * 1.01)
    assert lam == pytest.approx(wide, rel=1e-3)


def test_without_a_token_lam_stays():
    nothing = np.full(4, math.nan)
    assert solve(nothing, 0.9, mask=[False] * 4) == 1.0
    assert solve(np.zeros(0), 0.9) == 1.0
    assert solve(nothing, 0.9, mask=[False] * 4, fallback=0.7) == 0.7


def test_tokens_outside_the_mask_do_not_count_whatever_they_hold():
    log_ratio, mask = gaps(6).reshape(30, 100), np.random.default_rng(6).random((30, 100)) < 0.6
    want = solve(log_ratio[mask], 0.8)
    log_ratio[~mask] = np.random.default_rng(7).choice([math.nan, math.inf, -math.inf, 3.0], (~mask).sum())
    assert solve(log_ratio, 0.8, mask=mask) == want


def test_every_split_over_ranks_and_every_order_gives_the_very_same_lam():
    log_ratio = gaps(8, tokens=5000, shift=-0.5)  # a third lies below the least lam, in one bin
    whole = []
    want = solve(log_ratio, 0.65, sum_over_batch=lambda sums: whole.append(sums) or sums)
    assert 0.2 < want < 5 and solve(log_ratio[::-1].copy(), 0.65) == want
    for cuts in ([2500], [1, 4000], [0, 17, 17, 3000]):
        sent = []
        parts = np.split(log_ratio, cuts)
        for part in parts:
            solve(part, 0.65, sum_over_batch=lambda sums, sent=sent: sent.append(sums.clone()) or sums)
        assert len(sent) == len(parts) and all(sums.dtype == torch.float64 for sums in sent)
        assert torch.equal(sum(sent), whole[0])
        for part in parts:
            assert solve(part, 0.65, sum_over_batch=lambda sums, sent=sent: sum(sent)) == want


def test_float32_ratios_that_carry_a_gradient_will_do():
    log_ratio_T = torch.tensor(gaps(9), dtype=torch.float32, requires_grad=True)
    lam = lambda_for_acceptance(log_ratio_T, torch.ones(3000, dtype=torch.bool), 0.8, alone)
    assert isinstance(lam, float) and lam == pytest.approx(solve(gaps(9), 0.8), rel=1e-5)


def test_target_acceptance_follows_a_drifting_gap_one_batch_behind():
    control = TargetAcceptance(acceptance=0.9, lam=1.0)
    errors = []
    for step in range(40):
        log_ratio = gaps(step, scale=0.2 + 0.01 * step, shift=-0.005 * step)
        errors.append(abs(mean_accept(log_ratio, control.lam) - 0.9))
        control.update(torch.tensor(log_ratio), torch.ones(3000, dtype=torch.bool), alone)
    assert errors[0] > 0.015 and max(errors[1:]) < 0.015


def test_target_acceptance_keeps_lam_where_no_token_counts_and_stops_at_its_bounds():
    control = TargetAcceptance(acceptance=0.9, lam=0.8, lam_min=0.5, lam_max=2.0)
    none, every = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    assert control.update(torch.zeros(3), none, alone) == 0.8
    assert control.update(torch.full((3,), -9.0), every, alone) == 0.5
    assert control.update(torch.full((3,), 9.0), every, alone) == 2.0
    assert control.update(torch.zeros(3), every, alone) == pytest.approx(1 / 0.9)


def kl_of_a_toy_actor(control, steps, *, drift=0.004, pull=0.05, kl=0.02, noise=0.1, seed=0):
    """The KL grows by `drift` a step, distillation closes pull * weight of it; what is measured."""
    generator = np.random.default_rng(seed)
    measured = []
    for _ in range(steps):
        kl = max(kl * (1 - min(pull * control.weight, 0.9)) + drift, 1e-8)
        measured.append(kl)
        control.update(kl * math.exp(noise * generator.normal()))
    return np.array(measured)


@pytest.mark.parametrize("drift", [0.001, 0.004, 0.016])
@pytest.mark.parametrize("weight", [0.01, 1.0, 30.0])
def test_a_steered_weight_settles_at_the_set_point_from_either_side(drift, weight):
    control = SteeredWeight(wanted=0.1, weight=weight, gain_i=0.05)
    measured = kl_of_a_toy_actor(control, 2500, drift=drift)
    assert np.exp(np.log(measured[-500:]).mean()) == pytest.approx(0.1, rel=0.05)
    assert measured[-500:].max() < 0.15 and measured[-500:].min() > 0.06
    assert control.weight == pytest.approx(drift / (0.05 * 0.1), rel=0.35)


def test_a_steered_weight_is_its_formula_in_log_space():
    control = SteeredWeight(wanted=0.1, weight=2.0, gain_p=0.3, gain_i=0.07)
    errors = np.log(np.array([0.2, 0.11, 0.05, 0.1]) / 0.1)
    for step, error in enumerate(errors):
        want = 2.0 * math.exp(0.07 * errors[: step + 1].sum() + 0.3 * error)
        assert control.update(0.1 * math.exp(error)) == pytest.approx(want, rel=1e-12)


def test_a_term_that_raises_what_is_measured_moves_the_other_way():
    lowers, raises = SteeredWeight(wanted=0.6), SteeredWeight(wanted=0.6, term="raises")
    for measured in (0.2, 0.9, 0.5):
        assert raises.update(measured) == pytest.approx(lowers.update(0.6**2 / measured), rel=1e-12)
    assert raises.weight > 1.0


@pytest.mark.parametrize(("wild", "bound"), [(math.inf, 4.0), (1e9, 4.0), (0.0, 0.5), (-1.0, 0.5)])
def test_a_steered_weight_stops_at_its_bounds_and_does_not_wind_up(wild, bound):
    control = SteeredWeight(wanted=0.1, weight=1.0, weight_min=0.5, weight_max=4.0)
    for _ in range(1000):
        assert 0.5 <= control.update(wild) <= 4.0
    assert control.weight == bound
    control.update(0.1 * (0.5 if bound == 4.0 else 2.0))  # the first error of the other sign
    assert 0.5 < control.weight < 4.0


def test_one_wild_batch_moves_the_weight_by_no_more_than_its_share():
    control = SteeredWeight(wanted=0.1, weight=1.0, gain_p=0.2, gain_i=0.02)
    assert control.update(1e6) == pytest.approx(math.exp(2 * 0.22))
    assert control.update(0.1) == pytest.approx(math.exp(2 * 0.02))


def test_a_batch_that_measured_nothing_changes_nothing():
    control = SteeredWeight(wanted=0.1, weight=1.0)
    control.update(0.3)
    before = control.state_dict()
    assert control.update(math.nan) == before["weight"] and control.state_dict() == before


def test_a_resumed_a_steered_weight_goes_on_as_if_nothing_had_happened():
    straight, first = SteeredWeight(wanted=0.1), SteeredWeight(wanted=0.1)
    measured = [0.3, 0.2, 0.02, math.nan, 0.5, 0.4]
    for kl in measured:
        straight.update(kl)
    for kl in measured[:4]:
        first.update(kl)
    resumed = SteeredWeight(wanted=0.1, weight=7.0)
    resumed.load_state_dict(first.state_dict())
    assert resumed.weight == first.weight
    for kl in measured[4:]:
        resumed.update(kl)
    assert resumed.state_dict() == straight.state_dict()
    assert all(type(value) is float for value in straight.state_dict().values())


def test_a_resumed_target_acceptance_starts_with_the_saved_lam():
    control = TargetAcceptance(acceptance=0.8, lam=1.0)
    control.update(torch.tensor(gaps(0)), torch.ones(3000, dtype=torch.bool), alone)
    resumed = TargetAcceptance(acceptance=0.8, lam=1.0)
    resumed.load_state_dict(control.state_dict())
    assert resumed.lam == control.lam != 1.0 and type(control.state_dict()["lam"]) is float


def test_bounds_that_became_narrower_hold_after_a_resume():
    acceptance = TargetAcceptance(acceptance=0.9, lam=1.0, lam_max=1.5)
    acceptance.load_state_dict({"lam": 4.0})
    distill = SteeredWeight(wanted=0.1, weight_max=2.0)
    distill.load_state_dict({"weight": 9.0, "integral": math.log(9.0)})
    assert acceptance.lam == 1.5 and distill.state_dict() == {"weight": 2.0, "integral": math.log(2.0)}
    assert distill.update(0.05) < 2.0


@pytest.mark.parametrize("state", [{}, {"lam": 1.0, "extra": 0.0}, {"weight": 1.0}])
@pytest.mark.parametrize("control", [TargetAcceptance(acceptance=0.9, lam=1.0), SteeredWeight(wanted=0.1)])
def test_a_state_with_other_keys_is_an_error(control, state):
    with pytest.raises(ValueError, match=f"state of {type(control).__name__} has keys"):
        control.load_state_dict(state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: solve([0.0], 1.0, sum_over_batch=never), "acceptance = 1.0: must lie in (0, 1). Use 0.9."),
        (lambda: solve([0.0], math.nan, sum_over_batch=never), "acceptance = nan: must lie in (0, 1)."),
        (
            lambda: solve([0.0], 0.9, sum_over_batch=never, lam_min=5.0),
            "lam_min = 5.0, lam_max = 5.0: must be",
        ),
        (lambda: solve([math.nan], 0.9, sum_over_batch=never), "log_ratio = nan: must be a number"),
        (lambda: TargetAcceptance(acceptance=0.0, lam=1.0), "acceptance = 0.0: must lie in (0, 1)."),
        (lambda: TargetAcceptance(acceptance=0.9, lam=6.0), "lam = 6.0: must lie in [0.2, 5.0]"),
        (lambda: TargetAcceptance(acceptance=0.9, lam=1.0, lam_min=0.0), "lam_min = 0.0, lam_max = 5.0:"),
        (lambda: SteeredWeight(wanted=0.0), "wanted = 0.0: must be a finite number > 0. Use 0.1."),
        (lambda: SteeredWeight(weight=0.0), "weight = 0.0: must lie in [0.0001, 100.0]"),
        (lambda: SteeredWeight(gain_p=-1.0), "gain_p = -1.0: must be a finite number >= 0. Use 0.2."),
        (lambda: SteeredWeight(weight_max=math.inf), "weight_min = 0.0001, weight_max = inf: must be"),
    ],
)
def test_what_cannot_work_is_named_with_its_rule(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value).startswith(message)
