"""The pickles in a folder of Megatron's format, read so that a stranger's folder can run no code.

torch's and Megatron's loaders unpickle `.metadata`, whatever `.metadata` calls bytes, and (Megatron 0.16)
`common.pt`.
`check_pickles` reads all of these first, by unpicklers that know only what checkpoints consist of.
"""

import dataclasses
import importlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

METADATA = ".metadata"
COMMON = "common.pt"
_DCP = "torch.distributed.checkpoint."
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
KNOWN: Mapping[str, frozenset[str]] = {
    _DCP + "metadata": frozenset(
        "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata "
        "TensorProperties "
        "StorageMeta _MEM_FORMAT_ENCODING".split()
    ),
    _DCP + "planner": frozenset({"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"}),
    _DCP + "filesystem": frozenset({"_StorageInfo", "_StoragePrefix"}),
    _MEGATRON: frozenset({"MCoreMetadata", "MCoreSavePlan"}),
    "torch": frozenset(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))
    | {"Size"},
    "torch.serialization": frozenset({"_get_layout"}),
    "collections": frozenset({"OrderedDict"}),
    "pathlib": frozenset({"PosixPath", "PurePosixPath"}),
}
"""Module -> what `.metadata` may name in it: classes of data, nothing that acts when it is called."""
_PLAIN = ("MCoreMetadata", "MCoreSavePlan")
"""Classes of data that are no dataclasses."""


def check_pickles(folder: Path) -> Metadata:
    """The folder's metadata. Raises ValueError, with the file and what it names, where loading it could run
    code.

    Raises ValueError too where `.metadata` cannot be read, OSError for other files. No code of the folder's
    is run.
    """
    folder = Path(folder)
    metadata = _read_metadata(folder / METADATA)
    for index, place in metadata.storage_data.items():
        if not (isinstance(index, MetadataIndex) and isinstance(place, _StorageInfo)):
            raise ValueError(f"{folder / METADATA} is not the metadata of a checkpoint.")
        name = place.relative_path
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(
                f"{folder / METADATA} places data in {name!r}, outside its folder. It is not loaded."
            )
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{folder / METADATA} wants {name} decoded by an extension. It is not loaded.")
        if not isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata):
            # Loaders unpickle it without a check; tensors they read with weights_only.
            with (folder / name).open("rb") as file:
                file.seek(place.offset)
                _check_torch(io.BytesIO(file.read(place.length)), f"{folder / name} ({index.fqn})")
    if (folder / COMMON).exists():
        with (folder / COMMON).open("rb") as file:
            _check_torch(file, str(folder / COMMON))
    return metadata


def _read_metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            metadata = _load(file, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if not (
        isinstance(metadata, Metadata)
        and isinstance(metadata.state_dict_metadata, dict)
        and isinstance(metadata.storage_data, dict)
    ):
        raise ValueError(f"{path} is not the metadata of a checkpoint.")
    return metadata


def _check_torch(file: BinaryIO, what: str) -> None:
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line]
        raise ValueError(f"{what} is not loaded, it could run code: {(named or [str(error)])[0]}") from error


def _load(file: BinaryIO, path: Path) -> Any:
    unpickler = _DataOnly(file)
    try:
        return unpickler.load()
    except _Foreign as error:
        raise ValueError(f"{path} is not loaded, it could run code: it names {error}.") from error
    except OSError:
        raise
    except Exception as error:
        # Whatever a damaged or a made-up pickle may lead to.
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}.") from error


class _Foreign(Exception):
    """A pickle names or does what no checkpoint does."""


class _DataOnly(pickle._Unpickler):
    """Python's own unpickler, of classes in KNOWN only; attributes are set on their instances and on nothing
    else."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if name not in KNOWN.get(module, ()):
            raise _Foreign(f"{module}.{name}")
        return getattr(importlib.import_module(module), name)

    def load_build(self) -> None:
        kind = type(self.stack[-2])
        if not (dataclasses.is_dataclass(kind) or kind.__name__ in _PLAIN):
            raise _Foreign(f"attributes of a {kind.__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build
