"""The rules that single methods have for their knobs, and presets: what they refuse, with the remedy."""

import pytest

from megatron_jackpot.algorithm.corrections import CORRECTIONS, Jackpot, make_correction
from megatron_jackpot.algorithm.registry import build


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("tis", {"cap": "big"}, "algorithm.correction.cap = 'big': must be of type float, got str."),
        ("tis", {"cap": True}, "algorithm.correction.cap = True: must be of type float, got bool."),
        ("jackpot", {"seed": 0.5}, "algorithm.correction.seed = 0.5: must be of type int, got float."),
        (
            "tis",
            {"cap": 0.5},
            "algorithm.correction.cap = 0.5: must be >= 1. Use .inf to switch the cap off.",
        ),
        ("jackpot", {"lam": 0}, "algorithm.correction.lam = 0.0: must be a finite number > 0."),
        ("jackpot", {"policy_cap": 0.9}, "algorithm.correction.policy_cap = 0.9: must be >= 1."),
        ("jackpot", {"mask": "expcted"}, "algorithm.correction.mask = 'expcted': must be one of"),
        ("icepop", {"low": 2}, "algorithm.correction.low = 2.0, high = 5.0: must be low <= 1 <= high"),
        ("geo_rs", {"veto": 1}, "algorithm.correction.veto = 1.0: must lie in (0, 1)"),
        ("k_filter", {"low": 0.5}, "algorithm.correction.low = 0.5: only kind = 'k1' has a lower bound"),
        (
            "jackpot",
            {"target_acceptance": 1},
            "algorithm.correction.target_acceptance = 1.0: must lie in (0, 1)",
        ),
        ("jackpot", {"kappa_from": "both"}, "algorithm.correction.kappa_from = 'both': must be one of"),
    ],
)
def test_a_value_against_a_method_s_rule_is_named_with_the_rule_and_its_remedy(name, knobs, message):
    with pytest.raises(ValueError) as caught:
        build(name, knobs, CORRECTIONS, "algorithm.correction")
    assert str(caught.value).startswith(message)


def test_a_preset_is_a_set_of_knobs_that_knobs_beside_it_override():
    assert make_correction("jackpot", {}, 7) == Jackpot(seed=7)
    assert make_correction("jackpot", {"preset": "paper", "seed": 1}, 7) == Jackpot(seed=1)
    recommended = make_correction("jackpot", {"preset": "recommended", "mask": "bernoulli"}, 7)
    assert recommended == Jackpot(seed=7, z_correction="tail", denominator="all")
    reference = make_correction("jackpot", {"preset": "reference"}, 7)
    assert (reference.clip_order, reference.candidates, reference.kappa_over, reference.denominator) == (
        "before_z",
        "intersection",
        "microbatch",
        "accepted",
    )
    with pytest.raises(ValueError, match="correction.preset = 'papr'.*Did you mean 'paper'"):
        make_correction("jackpot", {"preset": "papr"}, 7)
