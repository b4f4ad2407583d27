"""HF folders: tensors read by name straight from the safetensors, and folders written whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_jackpot.config.model_folder import INDEX, copy_other_files

SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Spec(NamedTuple):
    """A tensor before it is read. Example: Spec("model.norm.weight", (64,), torch.float32)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class HFFolder:
    """The tensors of an HF folder: `specs` without reading any, `read` one at a time, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError for no weights, a shard that the index names and is missing, a truncated one."""
        self.folder = Path(folder)
        self._handles: dict[str, safe_open] = {}
        for path in self._files():
            try:
                handle = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is truncated or not a safetensors file: {error}.") from error
            for name in handle.keys():
                if name in self._handles:
                    raise ValueError(f"{self.folder}: tensor '{name}' is in two safetensors files.")
                self._handles[name] = handle
        if not self._handles:
            raise ValueError(f"{self.folder} holds no *.safetensors file.")

    def _files(self) -> list[Path]:
        """What transformers reads: model.safetensors, else what the index names; without either, all."""
        single = self.folder / SINGLE
        if single.is_file():
            return [single]
        present, indexed = sorted(self.folder.glob("*.safetensors")), self._indexed()
        missing = sorted(indexed - {path.name for path in present})
        if missing:
            raise ValueError(
                f"{self.folder} lacks {', '.join(missing)}, which {INDEX} names. Download the folder again."
            )
        return [path for path in present if not indexed or path.name in indexed]

    def _indexed(self) -> set[str]:
        path = self.folder / INDEX
        if not path.is_file():
            return set()
        try:
            return set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not an index of safetensors files: {error!r}.") from error

    @property
    def names(self) -> set[str]:
        return set(self._handles)

    def spec(self, name: str) -> Spec:
        """Raises ValueError for a tensor that is in no file, or of a dtype that no model here has."""
        part = self._handle(name).get_slice(name)
        if part.get_dtype() not in DTYPES:
            raise ValueError(
                f"{self.folder}: tensor '{name}' has dtype {part.get_dtype()}, known: {list(DTYPES)}."
            )
        return Spec(name, tuple(part.get_shape()), DTYPES[part.get_dtype()])

    def read(self, name: str) -> Tensor:
        return self._handle(name).get_tensor(name)

    def _handle(self, name: str) -> safe_open:
        if name not in self._handles:
            raise ValueError(f"{self.folder}: tensor '{name}' is in no safetensors file.")
        return self._handles[name]


def write_safetensors(path: Path, specs: Sequence[Spec], read: Callable[[str], Tensor]) -> None:
    """One safetensors file, its tensors read and written one after another: memory for one of them."""
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.num_bytes
        offsets = [begin, end]
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            tensor = read(spec.name).detach().cpu()
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise ValueError(
                    f"'{spec.name}' is {tensor.dtype} {tuple(tensor.shape)}, promised was {spec}."
                )
            file.write(tensor_bytes(tensor))
        file.flush()
        os.fsync(file.fileno())


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row order, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def write_hf_folder(
    path: Path, named_tensors: Iterable[tuple[str, Tensor]], hf_folder: Path, *, bucket_bytes: int
) -> None:
    """Shards of about `bucket_bytes`, other files from `hf_folder`; appears whole or not at all.

    The tensors of one shard are held at a time. An existing `path` is replaced.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        shards = []
        for number, bucket in enumerate(buckets(named_tensors, bucket_bytes)):
            specs = [Spec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in bucket]
            write_safetensors(unfinished / f"{number}.unnamed", specs, dict(bucket).__getitem__)
            shards.append(specs)
        finish_hf_folder(unfinished, shards, hf_folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(path)
    os.replace(unfinished, path)


def finish_hf_folder(folder: Path, shards: Sequence[Sequence[Spec]], hf_folder: Path) -> None:
    """Give the files 0.unnamed, 1.unnamed, ... of `folder` their names, write the index, copy the other
    files."""
    where = {}
    for number, specs in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.unnamed").rename(folder / name)
        where |= {spec.name: name for spec in specs}
    total = sum(spec.num_bytes for specs in shards for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    copy_other_files(hf_folder, folder)
    dtypes = {spec.dtype for specs in shards for spec in specs}
    if len(dtypes) == 1:
        _name_dtype(folder / "config.json", str(dtypes.pop()).removeprefix("torch."))


def _name_dtype(config: Path, dtype: str) -> None:
    """config.json's dtype must be that of the weights: transformers and SGLang load in the one that it
    names. Transformers 4 writes one of the two keys, transformers 5 the other, and a folder may have both."""
    if not config.is_file():
        return
    tree = json.loads(config.read_text(encoding="utf-8"))
    named = {key: dtype for key in ("torch_dtype", "dtype") if key in tree} or {"dtype": dtype}
    if tree | named != tree:
        config.write_text(json.dumps(tree | named, indent=2) + "\n", encoding="utf-8")


def buckets(
    named_tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """Consecutive tensors of one dtype, about `bucket_bytes` together, at least one each."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in named_tensors:
        if bucket and (size + tensor.nbytes > bucket_bytes or tensor.dtype != bucket[0][1].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket
