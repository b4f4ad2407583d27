"""The weights of the last few pushes, in host memory: what servers sampled with can be scored once more."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.models.host_copy import HostCopy


class WeightRing:
    """The last `size` pushed versions of this rank's share of a model's weights; page-locked for a GPU."""

    def __init__(self, model: MegatronModel, size: int) -> None:
        self.model, self.size = model, size
        self._kept: deque[tuple[int, HostCopy, list[Tensor]]] = deque()
        """(version, its memory, its tensors in the order of the parameters), the oldest first."""
        self._spare: list[HostCopy] = []

    @property
    def versions(self) -> tuple[int, ...]:
        """The oldest first; the last is what the model holds, until an optimizer step."""
        return tuple(version for version, *_ in self._kept)

    def push(self, version: int) -> None:
        """Note the model's weights; newer versions are of before a rollback, and are forgotten."""
        while self._kept and self._kept[-1][0] >= version:
            self._spare.append(self._kept.pop()[1])
        if len(self._kept) == self.size:
            self._spare.append(self._kept.popleft()[1])
        memory = self._spare.pop() if self._spare else HostCopy()
        with self.model.fresh_parameters():
            self._kept.append((version, memory, memory.take(self._parameters())))

    @contextmanager
    def loaded(self, version: int) -> Iterator[None]:
        """Within, the model has the weights of `version`; it must have those of the newest before, and has
        them again afterwards."""
        tensors = {known: tensors for known, _, tensors in self._kept}
        try:
            self._load(tensors[version])
            yield
        finally:
            self._load(tensors[self.versions[-1]])

    def _load(self, tensors: list[Tensor]) -> None:
        with torch.no_grad():
            for own, kept in zip(self._parameters(), tensors, strict=True):
                own.copy_(kept, non_blocking=True)

    def _parameters(self) -> list[Tensor]:
        return [parameter.data for chunk in self.model.chunks for parameter in chunk.parameters()]
