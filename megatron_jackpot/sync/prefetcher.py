"""Buckets made in a thread while the one before travels: export and transfer overlap, a bounded number at a
time."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from megatron_jackpot.models.hf_folder import buckets

POLL_S = 0.1


@dataclass(frozen=True)
class FlatBucket:
    """Several tensors in one block of bytes, one behind the other.

    Example: FlatBucket(["a", "b"], ["float32"] * 2, [[2, 3], [4]], tensor of 40 bytes).
    """

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    flat: Tensor
    """uint8 [bytes], on the device it is sent from."""

    @classmethod
    def of(cls, named_tensors: list[tuple[str, Tensor]], device: torch.device) -> "FlatBucket":
        pieces = [tensor.detach().to(device).contiguous().view(-1) for _, tensor in named_tensors]
        return cls(
            [name for name, _ in named_tensors],
            [str(tensor.dtype).removeprefix("torch.") for _, tensor in named_tensors],
            [list(tensor.shape) for _, tensor in named_tensors],
            torch.cat([piece.view(torch.uint8) for piece in pieces]),
        )


class BucketPrefetcher:
    """Iterates over the buckets of `named_tensors`; as a context, for its end.

    At most three buckets exist: one travels, one waits, one is made. However the block ends, `named_tensors`
    is read to its end: an export is a collective, and the other ranks are in it. An error of the thread is
    raised here; every wait for it ends after `timeout_s` with TimeoutError.
    """

    def __init__(
        self,
        named_tensors: Iterable[tuple[str, Tensor]],
        bucket_bytes: int,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self.named_tensors, self.bucket_bytes, self.device = named_tensors, bucket_bytes, device
        self.timeout_s = timeout_s
        # A new thread would start on the first one.
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._made: queue.Queue[FlatBucket | BaseException | None] = queue.Queue(maxsize=1)
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "BucketPrefetcher":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._given_up.set()
        self._thread.join(self.timeout_s)
        if self._thread.is_alive() and error is None:
            raise TimeoutError(f"Waited {self.timeout_s:g} s for the export of weights to end.")

    def __iter__(self) -> Iterator[FlatBucket]:
        while True:
            try:
                made = self._made.get(timeout=self.timeout_s)
            except queue.Empty:
                raise TimeoutError(f"Waited {self.timeout_s:g} s for the next bucket of weights.") from None
            if made is None:
                return
            if isinstance(made, BaseException):
                raise made
            yield made

    def _work(self) -> None:
        stream, finish = self._own_stream()
        tensors = iter(self.named_tensors)
        try:
            with stream:
                for bucket in buckets(tensors, self.bucket_bytes):
                    flat = FlatBucket.of(bucket, self.device)
                    finish()
                    if not self._put(flat):
                        break
                for _ in tensors:
                    pass
        except BaseException as error:  # raised where the buckets are taken
            self._put(error)
        else:
            self._put(None)

    def _put(self, made: FlatBucket | BaseException | None) -> bool:
        """False where nobody takes it any more."""
        while not self._given_up.is_set():
            try:
                self._made.put(made, timeout=POLL_S)
            except queue.Full:
                continue
            return True
        return False

    def _own_stream(self) -> tuple[AbstractContextManager[object], Callable[[], None]]:
        """On CUDA a stream of the thread's own, so that its kernels run beside a broadcast, and how to wait
        for them."""
        if self._gpu is None:
            return nullcontext(), lambda: None
        torch.cuda.set_device(self._gpu)
        stream = torch.cuda.Stream()
        # What the weights were last written by.
        stream.wait_stream(torch.cuda.default_stream())
        return torch.cuda.stream(stream), stream.synchronize
