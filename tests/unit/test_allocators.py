"""Allocators against enumeration: variances, optima by brute force, a rescue's cost, what is remembered."""

import itertools
import json
import math
import random
from collections import defaultdict

import pytest
import torch

from megatron_jackpot.algorithm.allocators import (
    VIP,
    CoBA,
    DynamicSampling,
    Rescue,
    beta_density,
    gradient_variance,
)
from megatron_jackpot.algorithm.allocators_base import Allocator, Fixed, Memory, greedy
from megatron_jackpot.algorithm.selectors import AERO
from tests.unit.test_selectors import group_of

RATES = (0.05, 0.2, 0.5, 0.8, 0.95)


def verdicts(p: float, rule: Allocator) -> dict[tuple[int, int], float]:
    """(correct, rollouts) -> probability, of 8 rollouts and what `rule` asks for after them."""
    law: dict[tuple[int, int], float] = defaultdict(float)
    for c in range(9):
        law[c, 8] = math.comb(8, c) * p**c * (1 - p) ** (8 - c)
    ended: dict[tuple[int, int], float] = defaultdict(float)
    while law:
        (c, n), mass = law.popitem()
        more = rule.more([True] * c + [False] * (n - c))
        if not more:
            ended[c, n] += mass
        for right in range(more + 1 if more else 0):
            law[c + right, n + more] += mass * math.comb(more, right) * p**right * (1 - p) ** (more - right)
    return ended


@pytest.mark.parametrize(
    ("p", "generated", "trained"),
    [(0.02, 14.4, 3.5), (0.05, 12.6, 3.0), (0.1, 10.6, 2.9), (0.3, 8.2, 4.8)],
)
def test_what_aero_samples_and_trains_on_is_the_specification_s_table(p, generated, trained):
    law, kept = verdicts(p, Rescue()), 0.0
    for (c, n), mass in law.items():
        kept += mass * len(AERO()(group_of([1.0] * c + [0.0] * (n - c))).index_S)
    assert sum(law.values()) == pytest.approx(1.0)
    assert sum(mass * n for (_, n), mass in law.items()) == pytest.approx(generated, abs=0.05)
    assert kept == pytest.approx(trained, abs=0.05)


def test_a_rescue_makes_more_groups_live_and_stops_at_the_first_success_or_at_its_limit():
    live = [sum(m for (c, n), m in verdicts(0.05, rule).items() if 0 < c < n) for rule in (Fixed(), Rescue())]
    assert live == pytest.approx([0.337, 0.560], abs=5e-4)
    law = verdicts(0.1, Rescue())
    assert max(n for _, n in law) == 16
    assert all(1 <= c <= 2 for c, n in law if 8 < n < 16)
    # Both rollouts of a pair stay, also where the first of them was right.
    assert (2, 10) in law and Rescue(extra=5, most=16).more([False] * 13) == 3
    assert Rescue().more([False] * 20) == 0


def test_a_rescue_weighs_hard_prompts_up_and_keeps_their_direction():
    """The expected centred gradient, in units of (mean g+ - mean g-): c (n - c) / n^2."""
    for p, want, without in ((0.02, 0.02654, 0.01715), (0.1, 0.0981, 0.0788), (0.3, 0.1888, 0.1838)):
        both = [
            sum(m * c * (n - c) / n**2 for (c, n), m in verdicts(p, rule).items())
            for rule in (Rescue(), Fixed())
        ]
        # Rounded these are the specification's: .0265 and .0172, .098 and .079, .189 and .184.
        assert both == pytest.approx([want, without], abs=5.1e-5)
    rate = sum(m * c / n for (c, n), m in verdicts(0.02, Rescue()).items())
    assert rate == pytest.approx(0.0303, abs=5e-5)


@pytest.mark.parametrize("n", range(2, 9))
def test_the_variances_of_vip_are_those_of_an_enumeration(n):
    """Rewards +-1: the mean square of (1/n) sum A_i g_i, g_i independent of variance 1, over 4."""
    for p in (0.1, 0.5, 0.7):
        square = {"dr_grpo": 0.0, "rloo": 0.0}
        for signs in itertools.product((-1.0, 1.0), repeat=n):
            mass = math.prod(p if r > 0 else 1 - p for r in signs)
            mean = sum(signs) / n
            total = sum((r - mean) ** 2 for r in signs)
            square["dr_grpo"] += mass * total / n**2
            square["rloo"] += mass * total * (n / (n - 1)) ** 2 / n**2
        for form, value in square.items():
            assert gradient_variance(p, n, form) == pytest.approx(value / 4, rel=1e-9), form


def test_what_dr_grpo_gains_by_a_rollout_shrinks_from_the_third_on_and_not_before():
    """Why `least` is 3 there: one rollout has no variance, as it has no gradient."""
    falls = [
        gradient_variance(0.3, n, "dr_grpo") - gradient_variance(0.3, n + 1, "dr_grpo") for n in range(1, 40)
    ]
    assert falls[0] < 0 < falls[1] < falls[2]
    assert all(later < earlier for earlier, later in itertools.pairwise(falls[2:]))


def parts(budget: int, count: int, least: int, most: int):
    if count == 1:
        if least <= budget <= most:
            yield (budget,)
        return
    for first in range(least, min(most, budget) + 1):
        for rest in parts(budget - first, count - 1, least, most):
            yield (first, *rest)


@pytest.mark.parametrize("form", ["dr_grpo", "rloo"])
def test_vip_shares_out_the_budget_with_the_least_sum_of_variances(form):
    draw = random.Random(4)
    for _ in range(60):
        vip = VIP(variance=form, least=3, most=9)
        memory = Memory(visits={i: [(draw.randint(0, 8), 8)] for i in range(4)})
        samples = draw.randint(3, 9)
        plan = vip.plan(range(4), samples, memory)
        rates = [vip.rate(memory.visits[i]) for i in range(4)]

        def total(numbers, rates=rates):
            return sum(gradient_variance(p, n, form) for p, n in zip(rates, numbers, strict=True))

        assert sum(plan) == 4 * samples and min(plan) >= 3 and max(plan) <= 9
        assert total(plan) == pytest.approx(min(map(total, parts(4 * samples, 4, 3, 9))), rel=1e-12)


def test_coba_shares_out_the_budget_with_the_largest_sum_of_values():
    draw, coba = random.Random(5), CoBA(least=2, most=9)
    for _ in range(60):
        rates, alpha = [draw.random() for _ in range(4)], draw.uniform(1, 10)
        inside = [min(max(p, 0.01), 0.99) for p in rates]

        def total(numbers, inside=inside, alpha=alpha):
            return sum(
                (1 - math.exp(-n * p * (1 - p) / 3)) * beta_density(p, alpha, 11 - alpha)
                for p, n in zip(inside, numbers, strict=True)
            )

        budget = draw.randint(8, 36)
        assert total(coba.share(rates, budget, alpha)) == pytest.approx(
            max(map(total, parts(budget, 4, 2, 9))), rel=1e-12
        )


def test_coba_s_plans_are_the_specification_s_numbers():
    coba = CoBA()
    assert coba.share(RATES, 80, 9.0) == [2, 2, 2, 35, 39]
    assert coba.share(RATES, 80, 2.0) == [39, 35, 2, 2, 2]
    assert coba.share(RATES, 80, 5.5) == [2, 18, 41, 17, 2]


def test_coba_s_reference_shares_its_surplus_by_bands():
    """p < .05, up to .99, above: .6 + .4 f of the surplus by value to a share f of prompts in the middle, .8
    above a half; the rest to the first band that has room."""
    coba = CoBA(variant="reference", most=32)
    # 70 over 5 x 2. Three of five: 56 by value, at tau = 3 + 9 x .06 / .1667; 14 to the one that fails.
    failing, *middle, solved = coba.share_by_bands([0.0, 0.2, 0.5, 0.8, 1.0], 80, 9.0)
    assert (failing, solved) == (16, 2) and sum(middle) == 62
    tau = 3 + 9 * 0.06 / 0.1667

    def total(numbers):
        return sum(
            (1 - math.exp(-n * p * (1 - p) / tau)) * beta_density(p, 9.0, 2.0)
            for p, n in zip((0.2, 0.5, 0.8), numbers, strict=True)
        )

    assert total(middle) == pytest.approx(max(map(total, parts(62, 3, 2, 32))), rel=1e-12)
    # None in the middle: 23 = 70 / 3, 15 = 47 / 3, 10 = 32 / 3 in turn; of the 22 left 7 each, and 1 goes on.
    assert coba.share_by_bands([0.0, 0.0, 0.0, 1.0, 1.0], 80, 9.0) == [32, 24, 19, 3, 2]
    # One of five in the middle: .68 of 30 is 20.
    assert coba.share_by_bands([0.0, 0.0, 0.5, 1.0, 1.0], 40, 9.0)[2] == 22
    assert sum(coba.share_by_bands([0.0, 0.02, 0.5, 0.995, 1.0], 40, 9.0)) == 40


def test_coba_s_reference_meets_its_budget_within_its_bounds():
    draw, coba = random.Random(6), CoBA(variant="reference", least=2, most=9)
    for _ in range(200):
        rates = [draw.choice([0.0, 0.04, draw.random(), 1.0]) for _ in range(draw.randint(1, 6))]
        budget = draw.randint(2 * len(rates), 9 * len(rates))
        plan = coba.share_by_bands(rates, budget, draw.uniform(1, 10))
        assert sum(plan) == budget and 2 <= min(plan) and max(plan) <= 9


def test_the_density_is_that_of_the_beta_distribution():
    for alpha, beta, p in ((9.0, 2.0, 0.8), (1.0, 10.0, 0.03), (5.5, 5.5, 0.5)):
        want = torch.distributions.Beta(alpha, beta).log_prob(torch.tensor(p)).exp().item()
        assert beta_density(p, alpha, beta) == pytest.approx(want, rel=1e-4)


def test_coba_looks_at_easy_prompts_where_most_fails_and_at_hard_ones_later():
    coba = CoBA()
    assert coba.alpha([]) == 9.0 and CoBA(kappa=2, alpha_least=0.5, alpha_most=1.5).alpha([]) == 0.5
    assert coba.alpha([0.1, 0.1, 0.1]) == pytest.approx(1 + 9 * 0.9)
    assert coba.alpha([0.9]) == pytest.approx(1 + 9 / (1 + math.exp(4)))
    assert coba.alpha([0.0, 0.0, 0.0]) == 10.0
    early, late = (
        CoBA().plan(range(2), 8, Memory(visits={0: [(1, 8)], 1: [(7, 8)]}, rates=[r])) for r in (0.1, 0.95)
    )
    assert early[1] > early[0] and late[0] > late[1]


@pytest.mark.parametrize("kind", [VIP(), VIP(predictor="beta"), CoBA(), CoBA(variant="reference")], ids=str)
def test_prompts_of_which_nothing_is_known_get_the_same(kind):
    assert kind.plan(range(5), 8, Memory()) == [8] * 5
    lower, upper = kind.bounds(8)
    memory = Memory(visits={i: [(i % 9, 8)] for i in range(40)})
    plan = kind.plan(range(50), 8, memory)
    assert sum(plan) == 400 and lower <= min(plan) < 8 < max(plan) <= upper
    assert kind.plan(range(50), 8, memory) == plan


def test_a_prediction_is_of_the_last_visit_or_of_all_with_the_old_ones_decayed():
    visits = [(8, 8), (0, 4)]
    assert VIP().rate(visits) == 1 / 6 and VIP().rate(()) == 0.5
    assert VIP(predictor="beta", decay=0.5).rate(visits) == (0.5 * 8 + 1) / (0.5 * 8 + 4 + 2)


def test_what_is_remembered_is_all_of_a_step_and_survives_a_checkpoint():
    coba, memory = CoBA(), Memory()
    for step in range(5):
        coba.observe([(1, step, 8), (2, 4, 8), (3, 0, 0)], memory)
    assert memory.visits == {1: [(2, 8), (3, 8), (4, 8)], 2: [(4, 8)] * 3}
    assert memory.rates == pytest.approx([(s / 8 + 0.5) / 2 for s in (2, 3, 4)])
    again = Memory()
    again.load_state_dict(json.loads(json.dumps(memory.state_dict())))
    assert again == memory
    fixed = Memory()
    Fixed().observe([(1, 1, 8)], fixed)
    assert fixed == Memory()


def test_ties_of_a_shared_budget_go_to_the_first_and_no_bound_is_passed():
    assert greedy(3, 2, 4, 8, lambda i, n: 0.0) == [4, 2, 2]
    assert greedy(3, 2, 2, 6, lambda i, n: 0.0) == [2, 2, 2]
    assert greedy(3, 2, 9, 8, lambda i, n: -n) == [3, 3, 2]


def test_dynamic_sampling_asks_for_what_is_missing_and_keeps_the_first_live_groups():
    dapo = DynamicSampling()
    assert dapo.fetch(64, 64, 1) == 0 and dapo.fetch(64, 60, 1) == 12 and dapo.fetch(64, 1, 9) == 64
    assert dapo.fetch(64, 60, 10) == 0
    assert DynamicSampling(over_sample=1.5).fetch(64, 61, 3) == 5
    live = [False, True, False, True, True, True]
    assert dapo.commit(live, 3) == [1, 3, 4]
    # One live group too few: the first dead one fills, or nothing does.
    assert dapo.commit(live[:5], 4) == [0, 1, 3, 4]
    assert DynamicSampling(on_exhausted="smaller").commit(live[:5], 4) == [1, 3, 4]
    with pytest.raises(RuntimeError, match="60 of 64 groups differ in correct after .* = 2"):
        DynamicSampling(on_exhausted="fail", max_rounds=2).fetch(64, 60, 2)
    shaped = ([1.0, 0.75], [True, True])
    assert not dapo.live(*shaped) and DynamicSampling(metric="reward").live(*shaped)


def test_an_endless_supply_costs_one_over_the_share_of_live_groups():
    """Generated per live group: 1 / (1 - p0), p0 the chance of an equal one; 1.83 of five prompts. The first
    live ones are kept, whichever prompts they are of."""
    draw, dapo, wanted = random.Random(0), DynamicSampling(over_sample=1.0, max_rounds=1000), 50
    p0 = sum(p**8 + (1 - p) ** 8 for p in (0.0, 0.05, 0.2, 0.5, 0.9)) / 5
    assert 1 / (1 - p0) == pytest.approx(1.83, abs=5e-3)
    generated = 0
    for _ in range(200):
        live: list[bool] = [draw.random() > p0 for _ in range(wanted)]
        rounds = 1
        while more := dapo.fetch(wanted, sum(live), rounds):
            live += [draw.random() > p0 for _ in range(more)]
            rounds += 1
        kept = dapo.commit(live, wanted)
        assert len(kept) == wanted and all(live[i] for i in kept)
        generated += len(live)
    assert generated / (200 * wanted) == pytest.approx(1 / (1 - p0), abs=0.03)


def test_to_keep_the_first_finished_groups_favours_short_answers_and_the_order_of_prompts_does_not():
    """Five prompts, the easier the sooner finished, of which three live groups are kept: their pass rate over
    all orders of the prompts and all patterns of live groups. The specification's .393 and .452."""
    rates, dapo, first = (0.55, 0.45, 0.35, 0.3, 0.1), DynamicSampling(over_sample=1.0), [0.0, 0.0]
    alive = [1 - p**8 - (1 - p) ** 8 for p in rates]
    passes = [(p - p**8) / live for p, live in zip(rates, alive, strict=True)]
    mass, orders = 0.0, [*itertools.permutations(range(5))]
    for pattern in itertools.product((False, True), repeat=5):
        if sum(pattern) < 3:
            continue
        chance = math.prod(x if lives else 1 - x for x, lives in zip(alive, pattern, strict=True))
        mass += chance
        for rule, asked in enumerate((orders, [tuple(range(5))])):
            kept = [order[i] for order in asked for i in dapo.commit([pattern[j] for j in order], 3)]
            first[rule] += chance * sum(passes[j] for j in kept) / len(kept)
    assert [total / mass for total in first] == pytest.approx([0.393, 0.452], abs=5e-4)
    everyone = sum(x * rate for x, rate in zip(alive, passes, strict=True)) / sum(alive)
    assert first[0] / mass == pytest.approx(everyone, abs=0.01)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: VIP(variance="dr_grpo", least=2), "least = 2: must be >= 3 with variance"),
        (lambda: VIP(least=1), "least = 1: must be >= 2"),
        (lambda: CoBA(most=1), "most = 1: must be >= least"),
        (lambda: CoBA(tau_most=2.0), "tau_most = 2.0: must be >= tau = 3.0"),
        (lambda: CoBA(alpha_most=11.0), "alpha_most = 11.0: must be 0 < least"),
        (lambda: Rescue(extra=0), "extra = 0: must be >= 1"),
        (lambda: DynamicSampling(over_sample=0.5), "over_sample = 0.5: must be >= 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(made, message):
    with pytest.raises(ValueError, match=message):
        made()
