"""Our parts of Megatron's local layers against torch's own forms, and their gradients against differences."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_jackpot.models import local_layers
from megatron_jackpot.models.engine import packed_seq_params

LENGTHS = (5, 1, 7, 7, 2)
HEADS, GROUPS, WIDTH = 4, 2, 6


def _inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    ]


def _attention():
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    angles = torch.outer(torch.arange(max(LENGTHS) + 2.0), torch.tensor([1.0, 0.1, 0.01])).double()
    angles = torch.cat([angles, angles], -1)
    module = local_layers.PackedAttention(SimpleNamespace(kv_channels=WIDTH))
    packed = packed_seq_params(starts, max(LENGTHS))
    return angles, lambda *given: module(*given, packed, angles[:, None, None])


def _by_sequence(angles, query, key, value):
    """Each sequence alone: a head's query against its group's keys, turned by complex multiplication."""
    outs, first = [], 0
    for length in LENGTHS:
        rows = slice(first, first + length)
        first += length
        turn = torch.polar(torch.ones(()).double(), angles[:length, None, : WIDTH // 2])
        q, k = (
            torch.view_as_real(torch.complex(*x[rows].chunk(2, -1)) * turn).transpose(-1, -2).flatten(-2)
            for x in (query, key)
        )
        k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, value[rows]))
        scores = torch.einsum("ihd,jhd->hij", q, k) / WIDTH**0.5
        behind = torch.ones(length, length).triu(1).bool()
        weight = scores.masked_fill(behind, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hij,jhd->ihd", weight, v))
    return torch.cat(outs).flatten(1)[:, None]


@pytest.mark.parametrize("longest_dense", (128, 0), ids=("dense", "in blocks"))
def test_attention_of_packed_sequences_is_that_of_each_alone(monkeypatch, longest_dense: int) -> None:
    monkeypatch.setattr(local_layers, "LONGEST_DENSE", longest_dense)
    angles, attend = _attention()
    inputs = _inputs()
    got, want = attend(*inputs), _by_sequence(angles, *inputs)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    given = (torch.autograd.grad(out, inputs, grad) for out in (got, want))
    for ours, theirs in zip(*given, strict=True):
        torch.testing.assert_close(ours, theirs)
    first = LENGTHS[0]
    with torch.no_grad():
        bad = [x.index_fill(0, torch.arange(first), float("nan")) for x in inputs]
        torch.testing.assert_close(attend(*bad)[first:], want[first:])


def test_norm_and_gate_are_torchs_with_their_gradients() -> None:
    x = torch.randn(3, 1, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    norm = local_layers._Norm.apply
    torch.testing.assert_close(norm(x, weight, 1e-6), F.rms_norm(x, (8,), weight, 1e-6))
    assert torch.autograd.gradcheck(lambda x, weight: norm(x, weight, 1e-6), (x, weight))
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(local_layers._SwiGLU.apply(x), F.silu(gate) * up)
    assert torch.autograd.gradcheck(local_layers._SwiGLU.apply, (x,))
