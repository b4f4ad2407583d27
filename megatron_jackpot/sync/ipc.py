"""Weights to servers on this node without a copy through the host: CUDA IPC handles in SGLang's own request.

A server maps the bucket that lies on this rank's GPU and copies out of it, over NVLink where it lives on
another one.
The request carries a pickle, since stock SGLang takes nothing else; it is made here, for our own servers on
this node, from tensors and plain numbers alone (the server loads it through a list of allowed classes). On a
machine without CUDA the values themselves travel in it.
"""

import base64
import io
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from megatron_jackpot.sync.broadcast import BroadcastSync
from megatron_jackpot.sync.prefetcher import FlatBucket
from megatron_jackpot.sync.proof import wait

DEVICE_INDEX = 6
"""Place of the device among rebuild_cuda_tensor's arguments; SGLang's utils/patch_torch.py counts on it
too."""


class IPCSync(BroadcastSync):
    """As BroadcastSync, but every bucket is handed over in place, and no group is formed."""

    def _join(self) -> None:
        """Nobody to meet; a session that a push left open is closed, and how many ranks a server has is
        asked."""
        self._end_open_session()
        self.tp_sizes = wait(self.admin.tp_sizes())

    def _leave_broken(self, error: BaseException) -> None:
        """Nothing is held."""

    def _send(self, bucket: FlatBucket, *, flush: bool) -> None:
        # Every rank of every server unpickles its own copy: an IPC handle's count must not be met twice.
        bodies = [[serialise(bucket) for _ in range(tp)] for tp in self.tp_sizes]
        wait(self.admin.update_from_tensor(bodies, flush=flush))


def serialise(bucket: FlatBucket) -> str:
    """A bucket as SGLang's load format "flattened_bucket" wants it, base64."""
    metadata, start = [], 0
    for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
        kind = getattr(torch, dtype)
        size = torch.Size(shape).numel() * kind.itemsize
        place = dict(start_idx=start, end_idx=start + size, numel=size)
        metadata.append(SimpleNamespace(name=name, shape=torch.Size(shape), dtype=kind, **place))
        start += size
    content = {"flattened_tensor": bucket.flat, "metadata": metadata}
    written = io.BytesIO()
    _Pickler(written, protocol=pickle.HIGHEST_PROTOCOL).dump(content)
    return base64.b64encode(written.getvalue()).decode()


class _Pickler(pickle._Pickler):
    """Names only what SGLang's list allows, whatever another library has put in the place of torch's
    functions: megatron-core's own loader of storages, say, is not on that list.

    The one in Python, since the one in C refuses a name that does not lead back to the function.
    """

    def reducer_override(self, item: object) -> Any:
        if isinstance(item, Tensor) and item.is_cuda:
            return _handle(item)
        if isinstance(item, torch.storage.TypedStorage):
            return _load_from_bytes, (_bytes(item),)
        return NotImplemented

    def save(self, item: Any, save_persistent_id: bool = True) -> None:
        if item is not _load_from_bytes:
            return super().save(item, save_persistent_id)
        for word in ("torch.storage", "_load_from_bytes"):
            super().save(word)
        self.write(pickle.STACK_GLOBAL)


def _load_from_bytes(content: bytes) -> torch.storage.TypedStorage:
    """Stands for torch.storage's, which is what the pickle names; never called here."""
    raise NotImplementedError


def _bytes(storage: torch.storage.TypedStorage) -> bytes:
    """As torch pickles the values of a storage."""
    written = io.BytesIO()
    torch.save(storage, written, _use_new_zipfile_serialization=False)
    return written.getvalue()


def _handle(tensor: Tensor) -> tuple[Callable[..., Tensor], tuple[object, ...]]:
    """torch's own IPC handle, its device by UUID: the servers number the GPUs that they see differently."""
    rebuild, arguments = reductions.reduce_tensor(tensor)
    uuid = str(torch.cuda.get_device_properties(arguments[DEVICE_INDEX]).uuid)
    return rebuild, (*arguments[:DEVICE_INDEX], uuid, *arguments[DEVICE_INDEX + 1 :])
