"""Weights to the servers through a shared folder: safetensors, one reload per push, the last two kept."""

import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from megatron_jackpot.models.hf_folder import write_hf_folder
from megatron_jackpot.run.interrupt import Stop, never
from megatron_jackpot.run.limits import attempt_s
from megatron_jackpot.servers.admin import ServerAdmin
from megatron_jackpot.servers.protocol import Label
from megatron_jackpot.sync.memory_saver import MemorySaver
from megatron_jackpot.sync.proof import Proof, SentTensors, SyncReport, paused, wait
from megatron_jackpot.sync.retry import retry, wait_for_healthy

KEPT_VERSIONS = 2


class DiskSync:
    """push() writes folder/weights-v{version} as an HF folder and has every server load it.

    `folder` must be visible to the servers under the same path. Call it on one rank.
    """

    def __init__(
        self,
        urls: Iterable[str],
        *,
        folder: Path,
        hf_folder: Path,
        bucket_bytes: int = 512 * 2**20,
        timeout_s: float = 120,
        patience_s: float = 300,
        checksums_every: int = 1,
        release_memory: bool = False,
        stop: Stop = never,
    ) -> None:
        self.admin = ServerAdmin(list(urls), timeout_s=timeout_s)
        self.urls = list(self.admin.urls)
        self.patience_s, self.stop = patience_s, stop
        self.folder = Path(folder).absolute()
        self.hf_folder = Path(hf_folder)
        self.bucket_bytes = bucket_bytes
        self.proof = Proof(self.admin, self.hf_folder, checksums_every=checksums_every)
        self.memory_saver = MemorySaver(self.admin, enabled=release_memory)

    def push(
        self,
        named_tensors: Iterable[tuple[str, Tensor]],
        version: int,
        *,
        attempt: str = "",
        mend: bool = False,
    ) -> SyncReport:
        """HF-named tensors, which can be read again, -> all servers that answer, as BroadcastSync.push
        does."""
        if mend:
            self.proof.distrust()
        limit_s = attempt_s(self.patience_s, self.admin.timeout_s)
        label = Label(version, attempt)
        return retry(lambda: self._push(named_tensors, label), limit_s)

    def _push(self, named_tensors: Iterable[tuple[str, Tensor]], label: Label) -> SyncReport:
        present = wait_for_healthy(self.urls, self.patience_s, self.stop)
        self.proof.begin(present)
        self.admin.urls = list(present)
        started, sent = time.monotonic(), SentTensors()
        path = self.folder / f"weights-v{label.version}"
        write_hf_folder(path, sent.watch(named_tensors), self.hf_folder, bucket_bytes=self.bucket_bytes)
        with paused(self.admin):
            self.memory_saver.resume_weights()
            self.memory_saver.resume_cache()
            wait(self.admin.update_from_disk(str(path)))
            checksum = self.proof.check(sent, label)
        self._drop_old()
        return SyncReport(label.version, time.monotonic() - started, sent.num_bytes, checksum, proved=False)

    def release(self) -> None:
        """The servers give back their memory until the next push; nothing where that was not asked for."""
        self.memory_saver.release()

    def end_release(self) -> None:
        """The servers take it again, without weights."""
        self.memory_saver.end()

    def close(self) -> None:
        """Nothing is held between pushes."""

    def _drop_old(self) -> None:
        # By time of writing, not by number: after a resume from an older step the numbers start again lower.
        folders = sorted(self.folder.glob("weights-v*"), key=lambda path: path.stat().st_mtime_ns)
        for old in folders[:-KEPT_VERSIONS]:
            shutil.rmtree(old)
