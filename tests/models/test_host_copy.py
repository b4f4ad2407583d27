"""A copy in host memory has the values and strides of its tensors, overlaps once, and uses its memory
again."""

import torch

from megatron_jackpot.models.host_copy import MAX_GAP, HostCopy


def some_tensors() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    buffer = torch.randn(3 * MAX_GAP, generator=g)
    apart = torch.randn(5, 7, generator=g)
    return [
        buffer[MAX_GAP : MAX_GAP + 40].view(5, 8),
        buffer[3:10],
        buffer[MAX_GAP + 8 : MAX_GAP + 20],  # inside the first
        buffer[-1],
        apart.t(),
        apart.bfloat16()[1:, 2:],
        torch.arange(3),
        torch.empty(0),
        torch.randn(9, generator=g).to(torch.float16)[1:],
    ]


def test_copies_equal_their_tensors_and_stay_when_those_move() -> None:
    tensors, host = some_tensors(), HostCopy()
    wanted = [tensor.clone() for tensor in tensors]
    copies = host.take(tensors)
    for tensor in tensors:
        tensor.add_(1)
    for copy, want, tensor in zip(copies, wanted, tensors, strict=True):
        assert copy.dtype == want.dtype and torch.equal(copy, want)
        assert copy.stride() == tensor.stride()


def test_memory_is_used_again_and_what_overlaps_is_copied_once() -> None:
    buffer, host = torch.randn(100_000), HostCopy()
    shards = [buffer, buffer[:50_000], buffer[50_000:]]
    first = host.take(shards)
    memory = {copy.untyped_storage().data_ptr() for copy in first}
    assert len(memory) == 1 and first[0].untyped_storage().nbytes() < buffer.nbytes + 200
    buffer.zero_()
    again = host.take(shards)
    assert {copy.untyped_storage().data_ptr() for copy in again} == memory
    assert not again[2].any()
