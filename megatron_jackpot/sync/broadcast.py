"""Weights to the servers through a torch.distributed group of its own: rank 0 is here, the servers' follow.

The group meets under the keys that torch's own process groups use (group name, then device), which is what
SGLang's side does; the trainer's groups are not touched, and SGLang is not imported.
"""

import asyncio
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jackpot.models.hf_folder import write_hf_folder
from megatron_jackpot.run.interrupt import Stop, never
from megatron_jackpot.run.limits import attempt_s
from megatron_jackpot.servers.admin import ServerAdmin
from megatron_jackpot.servers.protocol import Label, ServerError
from megatron_jackpot.sync.memory_saver import MemorySaver
from megatron_jackpot.sync.prefetcher import BucketPrefetcher, FlatBucket
from megatron_jackpot.sync.proof import (
    Proof,
    SentTensors,
    SyncError,
    SyncReport,
    attempt,
    paused,
    same_weights,
    wait,
)
from megatron_jackpot.sync.retry import retry, wait_for_healthy

T = TypeVar("T")
Backend = Literal["nccl", "gloo"]


class WeightGroup:
    """This rank and all ranks of all servers, for broadcasts from this rank."""

    def __init__(self, admin: ServerAdmin, *, backend: Backend, address: str, timeout_s: float) -> None:
        self.name = f"weights-{uuid.uuid4().hex[:8]}"
        self.backend = backend
        self.timeout = timedelta(seconds=timeout_s)
        sizes = wait(admin.tp_sizes())
        offsets = [1 + sum(sizes[:i]) for i in range(len(sizes))]
        self.size = 1 + sum(sizes)
        self.store = dist.TCPStore(
            address, 0, self.size, is_master=True, timeout=self.timeout, wait_for_workers=False
        )
        join = admin.init_group(
            host=address,
            port=self.store.port,
            rank_offsets=offsets,
            world_size=self.size,
            name=self.name,
            backend=backend,
        )
        waiting_for = f"the weight group of {self.size} ranks on {', '.join(admin.urls)}"
        self.group = side_by_side(self._make, join, timeout_s, waiting_for)

    def broadcast(self, tensor: Tensor) -> None:
        """Send `tensor`; returns when it is out, raises RuntimeError after the time limit of the group."""
        if tensor.device.type == "cuda":
            torch.cuda.set_device(tensor.device)
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self.group.broadcast([tensor], options).wait(self.timeout)
        if tensor.device.type == "cuda":
            # This thread's stream alone: the next bucket is being made on another one.
            torch.cuda.current_stream(tensor.device).synchronize()

    def _make(self) -> Any:
        """One of torch's backends, whose stubs know no broadcast."""
        prefix = dist.PrefixStore(f"{self.name}/", dist.PrefixStore(self.name, self.store))
        if self.backend == "gloo":
            return dist.ProcessGroupGloo(dist.PrefixStore("cpu/", prefix), 0, self.size, self.timeout)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self.timeout
        return dist.ProcessGroupNCCL(dist.PrefixStore("cuda/", prefix), 0, self.size, options)

    def abort(self) -> None:
        """Give up what is under way: NCCL at once, gloo when its time limit passes."""
        self.group.abort()


class BroadcastSync:
    """push() sends weights in flattened buckets; the first push is proved against a load from disk.

    `proof_folder` must be visible to the servers and holds weights during the first push only; None leaves
    the comparison out. Call it on one rank.
    """

    def __init__(
        self,
        urls: Iterable[str],
        *,
        hf_folder: Path,
        proof_folder: Path | None,
        backend: Backend | None = None,
        bucket_bytes: int = 512 * 2**20,
        timeout_s: float = 120,
        patience_s: float = 300,
        checksums_every: int = 1,
        address: str | None = None,
        release_memory: bool = False,
        stop: Stop = never,
    ) -> None:
        self.admin = ServerAdmin(list(urls), timeout_s=timeout_s)
        self.urls = list(self.admin.urls)
        self.patience_s, self.stop = patience_s, stop
        self.hf_folder = Path(hf_folder)
        self.proof_folder = None if proof_folder is None else Path(proof_folder).absolute()
        self.backend: Backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        self.device = torch.device("cuda" if self.backend == "nccl" else "cpu")
        self.bucket_bytes = bucket_bytes
        self.timeout_s = timeout_s
        self.address = address or address_towards(self.admin.urls[0])
        self.proof = Proof(self.admin, self.hf_folder, checksums_every=checksums_every)
        self.memory_saver = MemorySaver(self.admin, enabled=release_memory)
        self.group: WeightGroup | None = None
        self.proved = proof_folder is None

    def push(
        self,
        named_tensors: Iterable[tuple[str, Tensor]],
        version: int,
        *,
        attempt: str = "",
        mend: bool = False,
    ) -> SyncReport:
        """HF-named tensors, which can be read again, -> all servers that answer, which from then on call them
        `version` of `attempt`; where they are to `mend` something, with the whole proof.

        A server that is gone is left out, and joins again in a later push. Raises SyncError or ServerError
        after several attempts; no wait in one exceeds timeout_s, the first answer of any server patience_s.
        PushInterrupted when `stop` gives a reason while no server answers. After an error the servers may
        hold a mixture: push again, or load from disk, before sampling.
        """
        if mend:
            self.proof.distrust()
        limit_s = attempt_s(self.patience_s, self.timeout_s)
        label = Label(version, attempt)
        return retry(lambda: self._push(named_tensors, label), limit_s)

    def _push(self, named_tensors: Iterable[tuple[str, Tensor]], label: Label) -> SyncReport:
        self._leave_out_absent()
        started, sent, proved = time.monotonic(), SentTensors(), False
        watched = sent.watch(named_tensors)
        if not self.proved:
            # The first push needs the tensors twice.
            watched = [(name, tensor.detach().to("cpu", copy=True)) for name, tensor in watched]
        self._join()
        try:
            with paused(self.admin):
                self.memory_saver.resume_weights()
                self._send_all(watched, sent)
                self.memory_saver.resume_cache()
                if not self.proved:
                    self._prove(watched)
                    self.proved = proved = True
                checksum = self.proof.check(sent, label)
        except BaseException as error:
            self._leave_broken(error)
            raise
        return SyncReport(label.version, time.monotonic() - started, sent.num_bytes, checksum, proved)

    def close(self) -> None:
        """Dissolve the group."""
        if self.group is not None:
            name, self.group = self.group.name, None
            with suppress(ServerError):
                # A server that is gone has no group left to dissolve.
                wait(self.admin.destroy_group(name))

    def _leave_out_absent(self) -> None:
        present = wait_for_healthy(self.urls, self.patience_s, self.stop)
        self.proof.begin(present)
        if self.proof.fault or list(present) != self.admin.urls:
            # One that was started again at its old address is in no group, while the others wait in theirs.
            self.close()
            self.admin.urls = list(present)

    def release(self) -> None:
        """The servers give back their memory until the next push; nothing where that was not asked for."""
        self.memory_saver.release()

    def end_release(self) -> None:
        """The servers take it again, without weights."""
        self.memory_saver.end()

    def _end_open_session(self) -> None:
        with suppress(ServerError):
            # A push that broke off may have left its session open; without one this is refused.
            wait(self.admin.end_update())

    def _join(self) -> None:
        if self.group is None:
            self._end_open_session()
            self.group = WeightGroup(
                self.admin, backend=self.backend, address=self.address, timeout_s=self.timeout_s
            )

    def _leave_broken(self, error: BaseException) -> None:
        # A broadcast that was cut off leaves bytes in the sockets: the next push must not meet them.
        if self.group is not None:
            group, self.group = self.group, None
            group.abort()
            attempt(error, self.admin.destroy_group(group.name))

    def _send_all(self, named_tensors: Iterable[tuple[str, Tensor]], sent: SentTensors) -> None:
        wait(self.admin.begin_update())
        try:
            with BucketPrefetcher(named_tensors, self.bucket_bytes, self.device, self.timeout_s) as made:
                # Nothing is sampled until the end of the push, so the first bucket's flush is enough. It
                # costs less than /flush_cache, which on a CPU collects the server's whole heap.
                flush = True
                for bucket in made:
                    self._send(bucket, flush=flush)
                    sent.confirm(bucket)
                    flush = False
        except BaseException as error:
            attempt(error, self.admin.end_update())
            raise
        wait(self.admin.end_update())

    def _send(self, bucket: FlatBucket, *, flush: bool) -> None:
        assert self.group is not None
        receive = self.admin.update_from_distributed(
            bucket.names,
            bucket.dtypes,
            bucket.shapes,
            group=self.group.name,
            load_format="flattened_bucket",
            flush=flush,
        )
        servers = ", ".join(self.admin.urls)
        waiting_for = f"a bucket of {len(bucket.names)} tensors from {bucket.names[0]} on to reach {servers}"
        group = self.group
        side_by_side(lambda: group.broadcast(bucket.flat), receive, self.timeout_s, waiting_for)

    def _prove(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load the same tensors from disk and compare."""
        assert self.proof_folder is not None
        path = self.proof_folder / "broadcast-proof"
        by_broadcast = self.proof.equal_checksums()
        write_hf_folder(path, named_tensors, self.hf_folder, bucket_bytes=self.bucket_bytes)
        try:
            wait(self.admin.update_from_disk(str(path)))
            from_disk = self.proof.equal_checksums()
        finally:
            shutil.rmtree(path)
        same_weights(by_broadcast, from_disk, "the first broadcast", "a load of the same tensors from disk")


def side_by_side(
    work: Callable[[], T], call: Coroutine[Any, Any, object], timeout_s: float, waiting_for: str
) -> T:
    """Run `work` in a thread beside the coroutine `call`; its result, or the first error of either.

    When the call fails the thread is left to its own time limit: it is a daemon and nobody waits for it.
    """

    async def both() -> T:
        ours = asyncio.wrap_future(_in_daemon(work))
        theirs = asyncio.ensure_future(call)
        done, unfinished = await asyncio.wait(
            {ours, theirs}, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION
        )
        for one in unfinished:
            one.cancel()
        for one in (theirs, ours):
            if one in done and one.exception() is not None:
                failure = one.exception()
                if isinstance(failure, ServerError):
                    raise failure
                raise SyncError(f"Failed while waiting for {waiting_for}: {failure}") from failure
        if unfinished:
            late = "the servers' reply" if theirs in unfinished else "the broadcast"
            raise SyncError(f"Waited {timeout_s:g} s for {waiting_for}; {late} is missing.")
        return ours.result()

    return asyncio.run(both())


def _in_daemon(work: Callable[[], T]) -> Future[T]:
    result: Future[T] = Future()

    def run() -> None:
        result.set_running_or_notify_cancel()
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result


def address_towards(url: str) -> str:
    """This machine's address as the server at `url` sees it."""
    place = urlsplit(url)
    family, _, _, _, address = socket.getaddrinfo(
        place.hostname or "127.0.0.1", place.port or 80, type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return probe.getsockname()[0]
