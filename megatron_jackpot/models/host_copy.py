"""A copy of tensors in host memory that is allocated and touched once, and reused by every later copy."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)

ALIGNMENT = 64
MAX_GAP = 4096
"""Bytes between two tensors of one storage that are copied along, so that both travel in one piece."""


class HostCopy:
    """Host memory for copies of one set of tensors; page-locked where they live on a GPU."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._locked = False

    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors' values, in host memory that the next `take` overwrites.

        What lies side by side in one storage is copied at once, what overlaps only once. Returns when all is
        copied.
        """
        places, pieces, size = _lay_out(tensors)
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        if size > self._memory.numel():
            self._allocate(size, lock=on_gpu)
        for source, start in pieces:
            self._memory[start : start + source.numel()].copy_(source, non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return [self._view(tensor, start) for tensor, start in zip(tensors, places, strict=True)]

    def _allocate(self, size: int, *, lock: bool) -> None:
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        # Filled, because the first touch of a page takes longer than a copy into it.
        self._memory = torch.empty(size, dtype=torch.uint8).fill_(0)
        # Not pin_memory=True: its allocator rounds up to a power of two.
        self._locked = lock and not int(
            torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 0)
        )
        if lock and not self._locked:
            log.warning(
                f"{size / 1e9:.1f} GB of host memory could not be page-locked (ulimit -l): the copies that "
                "saves make of the GPU's state are slower."
            )

    def _view(self, tensor: Tensor, start: int) -> Tensor:
        view = torch.empty(0, dtype=tensor.dtype)
        storage = self._memory.untyped_storage()
        return view.set_(storage, start // tensor.element_size(), tensor.shape, tensor.stride())


def _lay_out(tensors: Sequence[Tensor]) -> tuple[list[int], list[tuple[Tensor, int]], int]:
    """(where each tensor starts, (bytes to copy, where they go), bytes in all)."""
    places = [0] * len(tensors)
    pieces: list[tuple[Tensor, int]] = []
    run: list[int] = []
    begin = end = size = 0

    def close() -> None:
        nonlocal size
        storage = tensors[run[0]].untyped_storage()
        # Every tensor stays as well aligned as it was.
        start = -(-size // ALIGNMENT) * ALIGNMENT + begin % ALIGNMENT
        for index in run:
            places[index] = start + tensors[index].data_ptr() - begin
        source = torch.empty(0, dtype=torch.uint8, device=tensors[run[0]].device)
        pieces.append((source.set_(storage, begin - storage.data_ptr(), (end - begin,), (1,)), start))
        size = start + end - begin

    filled = [index for index, tensor in enumerate(tensors) if tensor.numel()]
    for index in sorted(
        filled, key=lambda i: (tensors[i].untyped_storage().data_ptr(), tensors[i].data_ptr())
    ):
        first = tensors[index].data_ptr()
        if run and not (_same_storage(tensors[run[0]], tensors[index]) and first <= end + MAX_GAP):
            close()
            run = []
        if not run:
            begin = end = first
        run.append(index)
        end = max(end, first + _extent(tensors[index]))
    if run:
        close()
    return places, pieces, size


def _same_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
