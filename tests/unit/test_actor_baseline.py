"""A group's mean as a baseline, where the group is the server's and its tokens are rejected and weighed."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_jackpot.algorithm.obrs import accept_prob, jackpot_weight, overlap_mass

V = 3


def laws() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of a first token under policy and server [V], of a second one after each first [V, V]."""
    generator = np.random.default_rng(3)
    first_V, second_VV = generator.normal(size=V), generator.normal(size=(V, V))
    server = (x + 0.7 * generator.normal(size=x.shape) for x in (first_V, second_VV))
    policy_V, policy_VV, server_V, server_VV = (
        torch.tensor(x).log_softmax(-1) for x in (first_V, second_VV, *server)
    )
    return policy_V, server_V, policy_VV, server_VV


def expected_weight(policy_V: Tensor, server_V: Tensor, cap: float) -> Tensor:
    """q(a) P(kept) min(Z max(lam, r), cap) of each next token a at lam = 1."""
    z_1 = overlap_mass(policy_V, server_V, 1.0)[..., None]
    weight_V = jackpot_weight(policy_V, server_V, z_1, 1.0, cap)
    return server_V.exp() * accept_prob(policy_V, server_V, 1.0) * weight_V


def coefficient(cap: float) -> float:
    """The largest element of E sum_t w_t grad log p(y_t), over both steps' logits: what a baseline, which is
    the same for all tokens, adds to the gradient."""
    policy_V, server_V, policy_VV, server_VV = laws()
    first_V, second_VV = expected_weight(policy_V, server_V, cap), expected_weight(policy_VV, server_VV, cap)
    # Of sum_a m(a) log p(a) by the logits of p.
    slope_V = first_V - first_V.sum() * policy_V.exp()
    slope_VV = server_V.exp()[:, None] * (second_VV - second_VV.sum(-1, keepdim=True) * policy_VV.exp())
    return max(slope_V.abs().max().item(), slope_VV.abs().max().item())


@pytest.mark.parametrize(
    ("cap", "want", "within"), [(math.inf, 0.0, 1e-15), (3.0, 5e-4, 5e-5), (1.0, 0.043, 5e-4)]
)
def test_a_baseline_adds_nothing_to_the_gradient_but_where_the_cap_binds(cap, want, within):
    """Kept tokens come from q' = min(q, p / lam) / Z with weight p / q', which the cap cuts. The
    specification's 0, 5e-4 and .043, two steps enumerated."""
    assert coefficient(cap) == pytest.approx(want, abs=within)
