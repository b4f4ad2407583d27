"""A model that nobody trains: its weights in host memory, on the device for its passes alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.models.host_copy import HostCopy


class HostWeights:
    """Takes a frozen model's weights off the device. No pass changes them, so that nothing is copied back."""

    def __init__(self, model: MegatronModel) -> None:
        self.device = model.mesh.device
        self._parameters = [p for chunk in model.chunks for p in chunk.parameters()]
        self._memory = HostCopy()
        self.take([parameter.data for parameter in self._parameters])

    def take(self, weights: Sequence[Tensor]) -> None:
        """Hold these from here on, one for each parameter in their order."""
        self._copies = self._memory.take(weights)
        self._release()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Within, the weights are on the device: one copy of them."""
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            parameter.data = copy.to(self.device, non_blocking=True)
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            parameter.data = copy
