"""The cost in GPU-seconds, against closed forms."""

import math
from dataclasses import replace

import pytest

from benchmarks.cost import (
    METHODS,
    PAIRS,
    Cost,
    Hardware,
    Load,
    balanced,
    break_even,
    decode_seconds,
    pass_seconds,
    per_useful,
    step_cost,
    timeline,
    token_flops,
)
from megatron_jackpot.plan.formulas import num_params

LOAD = Load(prompt=100, response=1000, sequences=64, samples=8, concurrency=16)
ACTOR, POLICY = PAIRS["Qwen3 1.7B -> 4B"]
BY_NAME = {method.name: method for method in METHODS}


def test_the_pairs_have_the_sizes_in_their_names() -> None:
    sizes = [num_params(shape) / 1e9 for pair in PAIRS.values() for shape in pair]
    # With embeddings, as Hugging Face counts them.
    assert sizes == pytest.approx([1.54, 3.09, 1.72, 4.02, 1.72, 8.19], abs=0.01)


def test_decoding_one_sequence_reads_the_weights_for_each_token_and_many_are_bound_by_arithmetic() -> None:
    short = replace(LOAD, prompt=1e-9, response=1e-9, sequences=1, concurrency=1)
    gpu = Hardware(decode_share=1.0)
    per_token = decode_seconds(POLICY, short, gpu) / short.response
    assert per_token == pytest.approx(2 * num_params(POLICY) / gpu.bandwidth, rel=1e-6)
    many = replace(short, concurrency=10**5, sequences=10**5)
    per_token = decode_seconds(POLICY, many, gpu) / many.response / many.sequences
    assert per_token == pytest.approx(token_flops(POLICY, 0.0) / gpu.flops, rel=1e-6)


def test_a_token_costs_two_flops_a_weight_and_attention_grows_with_the_context() -> None:
    # Norms are no products; the table counts once, as the output layer.
    norms = POLICY.num_layers * (2 * POLICY.hidden_size + 2 * POLICY.head_dim) + POLICY.hidden_size
    assert token_flops(POLICY, 0) == 2 * (num_params(POLICY) - norms)
    assert token_flops(POLICY, 1000) - token_flops(POLICY, 0) == 4 * 36 * 32 * 128 * 1000


def test_on_policy_scores_nothing_and_a_joint_step_scores_and_trains_both_models() -> None:
    gpu = Hardware()
    one, two = (pass_seconds(shape, LOAD, gpu) for shape in (POLICY, ACTOR))
    alone, joint = (
        step_cost(BY_NAME[n], POLICY, ACTOR, LOAD, gpu, making=7.0) for n in ("on_policy", "jackpot")
    )
    assert (alone.scoring, alone.training, alone.making) == (0.0, 3 * one, 0.0)
    assert (joint.scoring, joint.training, joint.making) == pytest.approx((one + two, 3 * (one + two), 7.0))
    assert joint.decode < alone.decode and joint.push < alone.push


def test_perfect_overlap_wastes_nothing_and_taking_turns_wastes_half() -> None:
    cost = Cost(decode=30.0, prefill=0.0, scoring=10.0, training=20.0, push=0.0, making=0.0)
    assert balanced(cost, 8) == pytest.approx((2 * cost.busy, cost.busy))
    # Twice as many servers as the work asks for: they wait.
    serial, overlapped = timeline(cost, 2.0, 1.0)
    assert (serial, overlapped) == pytest.approx((3 * (15 + 30), 3 * 30))


def test_rejection_divides_by_the_acceptance_and_breaks_even_where_the_ratio_is_one() -> None:
    jackpot, tis = BY_NAME["jackpot"], BY_NAME["tis"]
    assert per_useful(10.0, 0.5, jackpot) == 20.0 and per_useful(10.0, 0.5, tis) == 10.0
    even = break_even(10.0, 16.0)
    assert math.isclose(per_useful(10.0, even, jackpot), 16.0)
    with pytest.raises(ValueError, match="acceptance"):
        per_useful(1.0, 0.0, jackpot)
