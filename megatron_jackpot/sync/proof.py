"""What a push of weights reports, and the proof that every server holds what was sent.

SGLang hashes its own fused, sharded tensors, so hashes of HF-named tensors cannot be compared with it. Proof
instead, of every push: names and shapes equal those of the served model's folder; buckets held what was
exported after they had been sent (a folder on disk is not read again); every server reports the version. Of
every `checksums_every`-th, and of the first two from the start and from a fault on: all servers hash alike,
rank by rank; the hashes moved in this push when the sent values did. The first broadcast hashes like a load
of the same tensors from disk (`same_weights`, called by BroadcastSync).
"""

import asyncio
import hashlib
import json
import logging
import math
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_jackpot.config.model_folder import read_hf_config
from megatron_jackpot.models.families import family_of
from megatron_jackpot.servers.admin import ServerAdmin
from megatron_jackpot.servers.protocol import Label, ServerError
from megatron_jackpot.sync.fp8 import SCALE, quantised_shapes
from megatron_jackpot.sync.prefetcher import FlatBucket

log = logging.getLogger(__name__)

T = TypeVar("T")
Checksums = dict[str, dict[str, str]]
Present = dict[str, str]
"""URL of a server that answers -> the weight version that it says it has."""

CLEANUP_S = 10
"""Time limit of a call that cleans up after an error."""
INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class SyncError(RuntimeError):
    """The servers do not hold the weights that were sent."""


@dataclass(frozen=True)
class SyncReport:
    """One push. Example: SyncReport(version=3, seconds=0.4, num_bytes=800, checksum="9f", proved=False)."""

    version: int
    seconds: float
    num_bytes: int
    checksum: str | None
    """Hash over all ranks of one server; equal on all servers. None where it was not this push's turn."""
    proved: bool
    """Whether this push was also compared with a load from disk."""


class SentTensors:
    """What went out in one push: names, shapes, bytes and a digest of the values, at one read of them."""

    def __init__(self) -> None:
        self.shapes: dict[str, list[int]] = {}
        self.num_bytes = 0
        self._sums: dict[str, int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self.shapes:
            raise SyncError(f"Tensor {name} was sent twice in one push.")
        self.shapes[name] = list(tensor.shape)
        self.num_bytes += tensor.nbytes
        bits = tensor.detach().contiguous().view(-1).view(INTEGER_OF_SIZE[tensor.element_size()])
        self._sums[name] = int(bits.sum(dtype=torch.int64))

    def confirm(self, bucket: FlatBucket) -> None:
        """What a bucket holds after it was sent is what was added. Raises SyncError.

        Buckets are made ahead, on a stream of their own: one that was sent half made, or written over, would
        reach all servers alike.
        """
        bits = bucket.flat.view(INTEGER_OF_SIZE[getattr(torch, bucket.dtypes[0]).itemsize])
        pieces = bits.split([math.prod(shape) for shape in bucket.shapes])
        # One wait for the device, not one for each tensor.
        sums = torch.stack([piece.sum(dtype=torch.int64) for piece in pieces]).tolist()
        wrong = [name for name, found in zip(bucket.names, sums, strict=True) if found != self._sums[name]]
        if wrong:
            raise SyncError(
                f"{len(wrong)} tensors were sent with other values than were exported: "
                f"{', '.join(wrong[:5])}."
            )

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(sorted(self._sums.items())).encode()).hexdigest()

    def watch(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named_tensors:
            self.add(name, tensor)
            yield name, tensor


class Proof:
    """Checks of each push; remembers the one before."""

    def __init__(self, admin: ServerAdmin, hf_folder: Path, *, checksums_every: int = 1) -> None:
        self.admin, self.checksums_every = admin, checksums_every
        self.expected = hf_shapes(hf_folder)
        config = json.loads((Path(hf_folder) / "config.json").read_text(encoding="utf-8"))
        self.quantised = "quantization_config" in config
        # A tied output layer is the embedding again: it may be written and sent, or not.
        self.may_differ = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
        self._digest: str | None = None
        """Of what was sent when the servers had `_checksums`."""
        self._checksums: Checksums | None = None
        self._proved = False
        """Whether `_checksums` were read at the end of the push that sent `_digest`, or only later."""
        self._unseen: str | None = None
        """Digest of the push before, where nobody asked what the servers had of it."""
        self._left_behind: Present | None = None
        """The servers of the push before, where it came to its end."""
        self.fault = False
        """Whether the push under way is the first after one: see `begin`."""
        self._left = 0
        """Pushes that may go without checksums."""

    def begin(self, present: Present) -> None:
        """A push is to reach these servers. There was a fault where they are others than the last time, one
        was started again and has lost its version, or the last push broke off. Raises SyncError where they
        have come apart since."""
        self.fault, self._left_behind = present != self._left_behind, None
        if self.fault:
            self._left = 0
        elif self._left == 0 and self._unseen is not None:
            # Against older ones a server would pass that took some of the pushes since and lost the last.
            self._digest, self._checksums = self._unseen, self.equal_checksums()
            self._proved = False

    def distrust(self) -> None:
        """The next push is one after a fault."""
        self._left_behind = None

    def check(self, sent: SentTensors, label: Label) -> str | None:
        """Label the weights of servers that hold them; their checksum, where it is this push's turn. Raises
        SyncError.

        In this order: a server that did not take them and is left out of the next attempt must not say that
        it has them.
        """
        check_names(sent.shapes, self.expected, self.may_differ)
        checksums = None if self._left else self._moved(sent, label)
        wait(self.admin.set_label(label))
        for url, found in zip(self.admin.urls, wait(self.admin.labels()), strict=True):
            if found != label:
                raise SyncError(
                    f"Server {url} reports weight version {found} after a push of version {label}."
                )
        if checksums is None:
            self._unseen = sent.digest
            self._end(label, self._left - 1)
            return None
        self._digest, self._checksums, self._unseen, self._proved = sent.digest, checksums, None, True
        # After a fault the next one too: what a server had before is unknown, so only that shows it move.
        self._end(label, 0 if self.fault else self.checksums_every - 1)
        return _overall(checksums)

    def _moved(self, sent: SentTensors, label: Label) -> Checksums:
        """Those of the servers, all alike, which moved with what was sent. Raises SyncError."""
        checksums = self.equal_checksums()
        if self._digest not in (None, sent.digest) and checksums == self._checksums:
            raise SyncError(
                f"The weights sent as version {label} differ from the push before, but the servers' "
                f"checksums did not move: {self.admin.urls[0]} still serves the old weights."
            )
        if self._digest == sent.digest and self._proved:
            assert self._checksums is not None
            same_weights(
                self._checksums, checksums, "the push before", f"version {label}, the same weights again"
            )
        elif self._digest == sent.digest and checksums != self._checksums:
            log.warning("The push before this one had not reached the servers; this one has.")
        return checksums

    def _end(self, label: Label, left: int) -> None:
        self._left, self._left_behind = left, dict.fromkeys(self.admin.urls, str(label))

    def equal_checksums(self) -> Checksums:
        """The checksums of the servers, which must be equal."""
        return self._equal(wait(self.admin.checksums()))

    def _equal(self, answers: list[Checksums]) -> Checksums:
        first, *others = answers
        scales = any(name.endswith(SCALE) for names in first.values() for name in names)
        if scales != self.quantised:
            serves, sent = ("fp8", "bf16") if scales else ("no fp8", "fp8")
            raise SyncError(
                f"{self.admin.urls[0]} serves {serves} weights, but {sent} ones are sent. Set "
                "servers.quantization to "
                f"{'fp8' if scales else 'null'}, or start the server from a folder of that format."
            )
        for url, other in zip(self.admin.urls[1:], others, strict=True):
            same_weights(first, other, self.admin.urls[0], url)
        return first


def same_weights(left: Checksums, right: Checksums, left_name: str, right_name: str) -> None:
    """Raise SyncError naming up to five tensors that differ."""
    if left.keys() != right.keys():
        raise SyncError(f"{left_name} has ranks {sorted(left)}, {right_name} has {sorted(right)}.")
    differing = [
        f"{rank} {name}"
        for rank in left
        for name in sorted(left[rank].keys() | right[rank].keys())
        if left[rank].get(name) != right[rank].get(name)
    ]
    if differing:
        raise SyncError(
            f"Weights differ between {left_name} and {right_name} in {len(differing)} tensors: "
            f"{', '.join(differing[:5])}."
        )


def check_names(
    sent: dict[str, list[int]],
    expected: dict[str, list[int]],
    may_differ: set[str] | frozenset[str] = frozenset(),
) -> None:
    """SGLang skips names it does not know: a wrong one would leave old weights in place without an error."""
    names = (sent.keys() ^ expected.keys()) - may_differ
    if names:
        name = min(names)
        where = "sent but not in" if name in sent else "not sent but in"
        raise SyncError(
            f"{len(names)} tensor names differ from the served model's folder: {name} was {where} it."
        )
    for name in sent.keys() & expected.keys():
        if sent[name] != expected[name]:
            raise SyncError(
                f"{name} was sent as {sent[name]}, the served model's folder has {expected[name]}."
            )


def hf_shapes(folder: Path) -> dict[str, list[int]]:
    """Tensor name -> shape of the model in a folder's config.json, scales of fp8 included."""
    config = dict(read_hf_config(folder))
    quantised = config.pop("quantization_config", None) is not None
    shapes = {name: list(shape) for name, shape in family_of(config).hf_shapes().items()}
    return quantised_shapes(shapes) if quantised else shapes


@contextmanager
def paused(admin: ServerAdmin) -> Iterator[None]:
    """Servers sample nothing inside.

    After an error, what they were sampling is aborted before they go on: their weights may be half updated.
    """
    wait(admin.pause())
    try:
        yield
    except BaseException as error:
        attempt(error, admin.abort_all())
        attempt(error, admin.resume())
        raise
    wait(admin.resume())


def attempt(error: BaseException, call: Coroutine[Any, Any, Any]) -> None:
    """Make a call that cleans up after `error`; if it fails too, say so in a note of `error`."""
    try:
        wait(asyncio.wait_for(call, CLEANUP_S))
    except (ServerError, TimeoutError) as failure:
        error.add_note(f"While cleaning up: {failure or f'no reply within {CLEANUP_S} s'}")


def wait(call: Coroutine[Any, Any, T]) -> T:
    """Run one admin call from synchronous code."""
    return asyncio.run(call)


def _overall(checksums: Checksums) -> str:
    return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()
