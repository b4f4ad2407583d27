"""TRL's losses and their gradients, which benchmarks/peers_losses.py had from TRL's own code, against ours.

TRL's settings and ours, everywhere with the correction `none`:

| TRL | here |
|---|---|
| `loss_type` grpo, dapo | aggregation `sequence`, `token` |
| `loss_type` dr_grpo, `max_completion_length` | `constant`, `length` |
| `loss_type` bnpo, of one micro-batch | `token` |
| `loss_type` sapo, its temperatures | `sapo`, `tau_positive`, `tau_negative`, with `sequence` |
| `loss_type` cispo, `epsilon_high` | `cispo`, 1 + `clip_high`, with `token` |
| `importance_sampling_level` sequence with `loss_type` grpo | `gspo` with `sequence` |
| the same with `loss_type` luspo, a sum over each response | `gspo` with `constant`, `length` 1 |
| `epsilon`, `epsilon_high`, `delta` | `clip_low`, `clip_high`, `dual_clip` |
| `off_policy_mask_threshold` | `opsm`, `delta`, `anchor: server` |
| `gradient_accumulation_steps`, processes | nothing: N is that of the mini-batch |
| `loss_type` vespo | not here |
"""

import json
from pathlib import Path

import pytest
import torch

from megatron_jackpot.algorithm.aggregation import ConstantLength, SequenceMean, TokenMean
from megatron_jackpot.algorithm.objectives import CISPO, GSPO, OPSM, PPO, SAPO
from tests.unit.flat import Tokens
from tests.unit.test_aggregation import minimised

TRL = json.loads((Path(__file__).parent / "data" / "trl_losses.json").read_text(encoding="utf-8"))
RESPONSES, RESULTS = TRL["responses"], TRL["results"]
CLIPS = dict(clip_low=0.2, clip_high=0.2)
SEQUENCE_CLIPS = dict(clip_low=0.05, clip_high=0.08)
OURS = {
    "grpo": (PPO(**CLIPS), SequenceMean()),
    "grpo, accumulated": (PPO(**CLIPS), SequenceMean()),
    "dapo": (PPO(clip_low=0.2, clip_high=0.28), TokenMean()),
    "dapo, accumulated": (PPO(clip_low=0.2, clip_high=0.28), TokenMean()),
    "dr_grpo": (PPO(**CLIPS), ConstantLength(length=20)),
    "dr_grpo, accumulated": (PPO(**CLIPS), ConstantLength(length=20)),
    "bnpo": (PPO(**CLIPS), TokenMean()),
    "gspo": (GSPO(**SEQUENCE_CLIPS), SequenceMean()),
    "luspo": (GSPO(**SEQUENCE_CLIPS), ConstantLength(length=1)),
    "cispo": (CISPO(clip_high=0.25), TokenMean()),
    "sapo": (SAPO(tau_positive=1.0, tau_negative=1.05), SequenceMean()),
    "two-sided": (PPO(**CLIPS, dual_clip=1.375), SequenceMean()),
    "opsm": (OPSM(**CLIPS, delta=0.03, anchor="server"), SequenceMean()),
}
APART = {"bnpo, accumulated", "dapo, first of two steps"}
"""Where TRL's weights depend on how the responses are split."""

ROUNDING = 2e-7
"""Of a loss in fp32, whose terms are near 1 and cancel."""


def ours(name, responses):
    """(loss, its gradient in the live log-probs), fp32 as in training."""
    objective, method = OURS[name]
    sizes = torch.tensor([len(one["mask"]) for one in responses])
    segment_T = torch.repeat_interleave(torch.arange(len(responses)), sizes)

    def flat(key):
        return torch.tensor([x for one in responses for x in one[key]])

    tokens = Tokens(
        old_logp_T=flat("old"),
        server_logp_T=flat("server"),
        advantage_T=torch.tensor([one["advantage"] for one in responses])[segment_T],
        mask_T=flat("mask").bool(),
        segment_T=segment_T,
    )
    return minimised(objective, method, tokens, flat("live"), segment_T // 4)


def tokens_in(responses):
    return sum(sum(one["mask"]) for one in responses)


@pytest.mark.parametrize("name", OURS)
def test_trl_s_loss_and_gradient_come_out(name):
    loss, gradient = ours(name, RESPONSES)
    assert loss == pytest.approx(RESULTS[name]["loss"], rel=1e-6, abs=ROUNDING)
    assert gradient == pytest.approx(RESULTS[name]["gradient"], rel=1e-6, abs=1e-12)


def test_bnpo_over_two_micro_batches_is_ours_but_for_the_weight_of_each():
    """Theirs weighs both alike, `token` by their tokens."""
    halves, total = (RESPONSES[:6], RESPONSES[6:]), tokens_in(RESPONSES)
    _, gradient = ours("bnpo", RESPONSES)
    factors = [total / 2 / tokens_in(half) for half in halves for one in half for _ in one["mask"]]
    assert max(factors) > 1.2
    theirs = [factor * value for factor, value in zip(factors, gradient, strict=True)]
    assert theirs == pytest.approx(RESULTS["bnpo, accumulated"]["gradient"], rel=1e-6, abs=1e-12)


def test_dapo_in_two_steps_on_a_generation_is_ours_but_for_the_size_of_each():
    """Theirs divides both by the tokens of an average one, `token` each by its own."""
    first = RESPONSES[:6]
    factor = tokens_in(first) / (tokens_in(RESPONSES) / 2)
    assert factor < 0.8
    loss, gradient = ours("dapo", first)
    assert factor * loss == pytest.approx(RESULTS["dapo, first of two steps"]["loss"], abs=ROUNDING)
    theirs = [factor * value for value in gradient]
    assert theirs == pytest.approx(RESULTS["dapo, first of two steps"]["gradient"], rel=1e-6, abs=1e-12)


def test_every_result_of_trl_is_compared_and_the_inputs_reach_every_bound():
    assert OURS.keys() | APART == RESULTS.keys()
    positive = [one["advantage"] > 0 for one in RESPONSES for valid in one["mask"] if valid]
    at = [place for place, valid in enumerate(x for one in RESPONSES for x in one["mask"]) if valid]
    for name in ("grpo", "dapo", "gspo", "two-sided"):
        moved = [RESULTS[name]["gradient"][place] != 0 for place in at]
        kinds = set(zip(positive, moved, strict=True))
        assert kinds == {(True, True), (True, False), (False, True), (False, False)}, name
    assert len({RESULTS[name]["loss"] for name in ("grpo", "two-sided", "opsm", "sapo", "gspo")}) == 5
