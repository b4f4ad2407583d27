"""From YAML keys to a method: every mistake is named with its remedy."""

import pytest

from megatron_jackpot.algorithm.corrections import CORRECTIONS, Jackpot, NoCorrection, make_correction
from megatron_jackpot.algorithm.registry import build


def test_build_turns_yaml_keys_into_the_method():
    built = build(
        "jackpot", {"lam": 1, "cap": "4e0", "policy_cap": None}, CORRECTIONS, "algorithm.correction"
    )
    assert built == Jackpot(lam=1.0, cap=4.0, policy_cap=None) and isinstance(built.lam, float)
    assert build("none", {}, CORRECTIONS, "algorithm.correction") == NoCorrection()


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("jackpt", {}, "algorithm.correction.name = 'jackpt' is unknown. Did you mean 'jackpot'?"),
        (
            "zzz",
            {},
            "algorithm.correction.name = 'zzz' is unknown. Known: geo_rs, icepop, jackpot, k_filter, mis, "
            "none",
        ),
        (
            "jackpot",
            {"lambda": 1.0},
            "Unknown knob 'algorithm.correction.lambda' of 'jackpot'. Did you mean 'lam'?",
        ),
        ("none", {"cap": 1}, "Unknown knob 'algorithm.correction.cap' of 'none'."),
        ("tis", {"cap": "big"}, "algorithm.correction.cap = 'big': must be of type float, got str."),
        ("tis", {"cap": True}, "algorithm.correction.cap = True: must be of type float, got bool."),
        ("tis", {"cap": [2]}, "algorithm.correction.cap = [2]: must be of type float, got list."),
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
def test_every_mistake_in_the_yaml_is_named_with_its_remedy(name, knobs, message):
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
