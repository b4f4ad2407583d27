"""A model from HF's format to Megatron's and back, streamed: tensor by tensor, each byte read and written
once.

A conversion writes conversion.json beside the weights: name, shape, dtype and crc32 of every HF tensor that
went through, so that two folders can be compared without reading both.
"""

import contextlib
import errno
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_jackpot.config.model_folder import copy_other_files, read_hf_config
from megatron_jackpot.models.dist_folder import DistFolder, is_dist_folder, write_dist_folder
from megatron_jackpot.models.families import Family, Kind, family_of
from megatron_jackpot.models.hf_folder import (
    HFFolder,
    Spec,
    finish_hf_folder,
    tensor_bytes,
    write_safetensors,
)
from megatron_jackpot.models.weights import check_names

REPORT = "conversion.json"
SPARE_BYTES = 64 * 2**20
"""Room on the disk beyond the weights: tokenizer, index, metadata."""

Progress = Callable[[int], None]
"""Called with the number of bytes of every tensor that went through."""


@dataclass
class Report:
    """What went through, by HF name, in HF's layout."""

    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> {"shape": [...], "dtype": "float32", "crc32": "9ae0daaf"}."""
    num_bytes: int = 0
    seconds: float = 0.0

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self.tensors:
            raise ValueError(f"Tensor {name} came twice.")
        self.tensors[name] = {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "crc32": f"{zlib.crc32(tensor_bytes(tensor)):08x}",
        }
        self.num_bytes += tensor.nbytes

    def differences(self, other: "Report") -> list[str]:
        """A line for every tensor that is not the same in both."""
        lines = []
        for name in sorted({*self.tensors, *other.tensors}):
            mine, theirs = self.tensors.get(name), other.tensors.get(name)
            if mine != theirs:
                lines.append(f"{name}: {mine or 'absent'} | {theirs or 'absent'}")
        return lines


class MegatronTensors:
    """HF tensors of a folder in Megatron's format, with `spec` and `read` as HFFolder has them."""

    def __init__(self, folder: Path, family: Family) -> None:
        """Raises ValueError unless the weights are those of the folder's config.json."""
        self.folder, self.family, self.dist = Path(folder), family, DistFolder(folder)
        self.dist.check(family)
        self._entries = {
            name: (kind, layer, shape)
            for kind, layer in family.entries()
            for name, shape in zip(family.hf_names(kind, layer), kind.shapes, strict=True)
        }
        self._split: dict[str, Tensor] = {}

    def spec(self, name: str) -> Spec:
        kind, _, shape = self._entries[name]
        return Spec(name, shape, self.dist.dtype(kind))

    def read(self, name: str) -> Tensor:
        """The parts of one Megatron tensor are asked for one after another: it is read once for all of
        them."""
        if name not in self._split:
            kind, layer, _ = self._entries[name]
            self._split = self.family.unshard(kind, layer, [self.dist.read(kind, layer)])
        return self._split.pop(name)


def open_model(folder: Path) -> tuple[Family, HFFolder | MegatronTensors]:
    """A model folder of either format. Raises ValueError where it disagrees with its own config.json."""
    family = family_of(read_hf_config(folder))
    if is_dist_folder(folder):
        return family, MegatronTensors(folder, family)
    source = HFFolder(folder)
    check_names(source, family)
    return family, source


def hf_to_megatron(hf: Path, out: Path, progress: Progress = lambda num_bytes: None) -> Report:
    """Write the HF folder `hf` as `out` in Megatron's format, loadable with any tp, pp and dp.

    Raises ValueError for a folder that is wrong, an `out` that is there, a disk that is full; nothing is left
    then.
    """
    family, source = open_model(hf)
    if isinstance(source, MegatronTensors):
        raise ValueError(f"{hf} is in Megatron's format already.")
    report, started = Report(), time.perf_counter()

    def read(kind: Kind, layer: int | None) -> Tensor:
        def tensor(name: str) -> Tensor:
            value = source.read(name)
            report.add(name, value)
            progress(value.nbytes)
            return value

        return family.shard(kind, layer, tensor, family.vocab_size, 1, 0)

    specs = [(kind, layer, _whole(family, source, kind, layer)) for kind, layer in family.entries()]
    with published(out, sum(spec.num_bytes for _, _, spec in specs)) as folder:
        write_dist_folder(folder, family, specs, read)
        copy_other_files(hf, folder)
        _finish(report, family, hf, folder, started)
    return report


def megatron_to_hf(
    folder: Path, out: Path, progress: Progress = lambda num_bytes: None, *, shard_bytes: int = 5 * 10**9
) -> Report:
    """Write the weights of `folder`, in Megatron's format, as the HF folder `out`. Raises as hf_to_megatron
    does."""
    family, source = open_model(folder)
    if isinstance(source, HFFolder):
        raise ValueError(f"{folder} is an HF folder already.")
    report, started = Report(), time.perf_counter()

    def read(name: str) -> Tensor:
        value = source.read(name)
        report.add(name, value)
        progress(value.nbytes)
        return value

    specs = [source.spec(name) for name in family.hf_shapes()]
    shards = _shards(specs, shard_bytes)
    with published(out, sum(spec.num_bytes for spec in specs)) as unfinished:
        for number, shard in enumerate(shards):
            write_safetensors(unfinished / f"{number}.unnamed", shard, read)
        finish_hf_folder(unfinished, shards, folder)
        _finish(report, family, folder, unfinished, started)
    return report


def model_bytes(folder: Path) -> int:
    """Bytes of a model folder's tensors, without reading them."""
    family, source = open_model(folder)
    return sum(source.spec(name).num_bytes for name in family.hf_shapes())


def checksums(folder: Path, progress: Progress = lambda num_bytes: None) -> Report:
    """Read every tensor of a model folder of either format."""
    family, source = open_model(folder)
    report, started = Report(), time.perf_counter()
    for name in family.hf_shapes():
        value = source.read(name)
        report.add(name, value)
        progress(value.nbytes)
    report.seconds = time.perf_counter() - started
    return report


@contextlib.contextmanager
def published(out: Path, num_bytes: int) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the block ends well, and is removed when it does not.

    Raises ValueError when `out` is there, or the disk has no room for `num_bytes`.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} is there already. Name a new folder, or remove it first.")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < num_bytes + SPARE_BYTES:
        raise ValueError(f"{out.parent} has {free:,} bytes free, {num_bytes + SPARE_BYTES:,} are needed.")
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(out)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if _disk_is_full(error):
            raise ValueError(f"The disk of {out.parent} is full. Nothing was left there.") from error
        raise


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return True
        if any(_disk_is_full(inner[0]) for inner in getattr(error, "failures", {}).values()):
            return True
        error = error.__cause__ or error.__context__
    return False


def _whole(family: Family, source: HFFolder, kind: Kind, layer: int | None) -> Spec:
    """Shape and dtype of a Megatron tensor. Raises ValueError when the HF tensors in it differ in dtype."""
    parts = [source.spec(name) for name in family.hf_names(kind, layer)]
    if len({part.dtype for part in parts}) > 1:
        raise ValueError(f"{source.folder}: {[part.name for part in parts]} differ in dtype.")
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Spec(kind.checkpoint_key, shape, parts[0].dtype)


def _shards(specs: list[Spec], shard_bytes: int) -> list[list[Spec]]:
    shards: list[list[Spec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(one.num_bytes for one in shards[-1]) + spec.num_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    return shards


def _check_recorded(report: Report, recorded: Path) -> None:
    """Raises ValueError where the conversion that made the source read other values than lie there now."""
    if not recorded.is_file():
        return
    try:
        tensors = json.loads(recorded.read_text(encoding="utf-8"))["tensors"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{recorded} cannot be read ({error}). Remove it, or convert anew.") from error
    if differing := report.differences(Report(tensors)):
        raise ValueError(
            f"{recorded.parent} has other weights than when it was made: {differing[0]}. Make it anew; where "
            f"they were changed on purpose, remove {recorded}."
        )


def _finish(report: Report, family: Family, source: Path, folder: Path, started: float) -> None:
    wanted = family.hf_shapes().keys()
    if report.tensors.keys() != wanted:
        raise ValueError(f"Missing or unexpected tensors: {sorted(report.tensors.keys() ^ wanted)[:5]}.")
    _check_recorded(report, source / REPORT)
    (folder / REPORT).write_text(
        json.dumps({"tensors": report.tensors, "bytes": report.num_bytes}, indent=1), encoding="utf-8"
    )
    report.seconds = time.perf_counter() - started
