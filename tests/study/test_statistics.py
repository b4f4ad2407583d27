"""The study's statistics, against known laws and by simulation."""

import numpy as np
import pytest

from benchmarks.study_parts import stats
from benchmarks.study_parts.picture import price
from benchmarks.study_parts.report import verdict
from benchmarks.study_parts.symptoms import symptoms


def test_quantiles_of_t_are_those_in_the_tables() -> None:
    table = {(0.975, 1): 12.706, (0.975, 2): 4.303, (0.975, 4): 2.776, (0.8, 4): 0.941, (0.975, 29): 2.045}
    for (probability, freedom), value in table.items():
        assert stats.t_quantile(probability, freedom) == pytest.approx(value, abs=6e-4)


def test_the_resolvable_difference_is_found_with_the_power_it_promises() -> None:
    sd, units = 0.05, 15
    gap = stats.resolvable(sd, units)
    draws = np.random.default_rng(0).normal(gap, sd, (4000, units))
    t = draws.mean(1) / (draws.std(1, ddof=1) / np.sqrt(units))
    assert (np.abs(t) > stats.t_quantile(0.975, units - 1)).mean() == pytest.approx(0.8, abs=0.02)
    assert stats.resolvable(sd, 1) == np.inf


def test_the_bootstrap_covers_a_mean_with_its_level_and_is_wider_where_warm_ups_differ() -> None:
    rng, covered = np.random.default_rng(1), 0
    for trial in range(200):
        values = rng.normal(0.7, 0.1, 24)
        low, high = stats.bootstrap(values, range(24), draws=400, seed=trial)
        covered += low <= 0.7 <= high
    assert 0.89 <= covered / 200 <= 0.99
    values = np.repeat([0.2, 0.5, 0.8], 8) + rng.normal(0, 0.01, 24)
    one, two = stats.bootstrap(values, range(24)), stats.bootstrap(values, np.repeat([0, 1, 2], 8))
    assert two[1] - two[0] > 1.5 * (one[1] - one[0])


def test_area_drawdown_and_collapse_of_curves_drawn_by_hand() -> None:
    assert stats.area([0, 10, 30], [0.0, 1.0, 1.0]) == pytest.approx((5 + 20) / 30)
    assert stats.drawdown([0.2, 0.8, 0.5, 0.9, 0.8]) == pytest.approx(0.3)
    fell = [0.2, 0.8, 0.3, 0.3, 0.39, 0.8]
    assert stats.collapsed_at(fell) == 4
    assert stats.collapsed_at([0.2, 0.8, 0.3, 0.3, 0.4, 0.3, 0.3]) is None
    assert stats.survival([fell, [0.5] * 6]) == [1, 1, 1, 1, 0.5, 0.5]


def test_a_rate_is_chosen_by_the_other_units_so_that_luck_is_not_counted_twice() -> None:
    # Rate 1 is best for all by unit 0's luck alone: the others would not choose it for unit 0.
    values = np.array([[0.5, 0.6, 0.6], [1.5, 0.5, 0.5]])
    chosen, best = stats.cross_fitted(values)
    assert chosen.tolist() == [0, 1, 1] and best == 1
    assert stats.cross_fitted(values[:, :1])[0].tolist() == [1]
    noise, units = np.random.default_rng(0).normal(0, 1, (2000, 3, 5)), np.arange(5)
    assert abs(np.mean([sample[stats.cross_fitted(sample)[0], units].mean() for sample in noise])) < 0.03
    assert np.mean([sample.mean(1).max() for sample in noise]) > 0.3


@pytest.mark.parametrize(
    ("gap", "smallest", "says"),
    [
        (0.06, 0.03, "better; close"),
        # Both intervals exclude 0, but so small a mean is worth nothing, and the other may be noise.
        (0.015, 0.01, "no difference larger than 0.015; close"),
        (0.06, 0.07, "leans better, unresolved; at most 0.070; close"),
        (-0.15, 0.08, "worse; not shown to be close"),
    ],
)
def test_a_verdict_takes_a_mean_that_is_worth_it_and_resolved(gap: float, smallest: float, says: str) -> None:
    assert verdict(np.full(5, gap), range(5), smallest, close=True) == says


def test_a_verdict_takes_an_interval_without_0() -> None:
    gaps = np.array([0.3, -0.2, 0.3, -0.2, 0.3])
    assert verdict(gaps, range(5), 0.5, close=False) == "no difference larger than 0.500"


def test_curves_are_priced_as_the_cost_table_has_it() -> None:
    assert price("on_policy", 128) == 1.0
    # docs/evidence.md, from `cost.py` and `cost.py --concurrency 16`.
    assert [round(price("jackpot_paper", n), 2) for n in (128, 16)] == [1.03, 0.59]


def test_symptoms_are_the_means_of_the_first_and_the_last_window() -> None:
    def line(step: int, kl: float, policy: float, actor: float) -> dict[str, float]:
        evaluated = {"eval/policy_accuracy": policy, "eval/actor_accuracy": actor}
        return {"step": step, **evaluated, **({"kl/target_server": kl} if step else {})}

    one = [line(0, 9, 0.5, 0.6), line(30, 0.1, 0.5, 0.4), line(60, 0.3, 0.5, 0.6)]
    other = [line(0, 9, 0.5, 0.6), line(30, 0.2, 0.5, 0.5), line(60, 0.5, 0.5, 0.9)]
    table = symptoms({"tis": [one, other], "on_policy": [[{"step": 0, "eval/policy_accuracy": 0.5}]]})
    assert table[4].split(" | ")[1] == "0.150 -> 0.400" and table[4].endswith("| -0.050 -> 0.250 |")
    assert set(table[5].split("|")[2:-1]) == {"  "}
