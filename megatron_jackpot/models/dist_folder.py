"""Megatron's distributed checkpoint format as files: one tensor of a folder read or written at a time.

Nothing here needs a process group or a model: a checkpoint holds whole tensors by `Kind.checkpoint_key`,
layers stacked, in chunks that any tp, pp and dp can load. Beside them lie config.json and the tokenizer.
"""

import pickle
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, maybe_load_config, save_config
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_jackpot.models.families import Family, Kind
from megatron_jackpot.models.hf_folder import Spec
from megatron_jackpot.models.pickles import COMMON, check_pickles

BACKEND = CheckpointingConfig("torch_dist", 1)
OPTIMIZER = "optimizer."
"""Start of the keys of an optimizer's state."""


def is_dist_folder(folder: Path) -> bool:
    return maybe_load_config(str(folder)) is not None


def stacked_shape(kind: Kind, num_layers: int) -> tuple[int, ...]:
    """Shape in a checkpoint: the HF tensors' rows together, layers in front."""
    first = kind.shapes[0]
    whole = (sum(shape[0] for shape in kind.shapes), *first[1:])
    return (num_layers, *whole) if kind.per_layer else whole


class DistFolder:
    """The weights in a folder of Megatron's format."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError for another format, for a file that is missing or shorter than it was written,
        and where loading it could run code.
        """
        self.folder = Path(folder)
        found = maybe_load_config(str(folder))
        if found != BACKEND:
            raise ValueError(f"{folder} is not a checkpoint of Megatron's format torch_dist: found {found}.")
        self.reader = dcp.FileSystemReader(self.folder)
        try:
            self.metadata: Metadata = check_pickles(self.folder)
        except OSError as error:
            raise ValueError(f"{self.folder} cannot be read: {error}.") from error
        self._check_files()
        self.reader.set_up_storage_reader(self.metadata, is_coordinator=True)

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for place in self.metadata.storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in sorted(ends.items()):
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size is None or size < end:
                state = "is missing" if size is None else f"is truncated: {size} of {end} bytes"
                raise ValueError(f"{path} {state}. The checkpoint cannot be used.")

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Key -> shape, dtype and chunks of every weight; the optimizer's state and fp8 scales are left
        out."""
        return {
            key: entry
            for key, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(OPTIMIZER)
        }

    def check(self, family: Family) -> None:
        """Raises ValueError unless the weights are those of config.json, in name and shape."""
        found = self.tensors
        wanted = {kind.checkpoint_key: kind for kind in family.kinds}
        if found.keys() != wanted.keys():
            missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
            raise ValueError(
                f"{self.folder} does not hold the model in its config.json: missing {missing[:5]}, "
                f"unexpected {unexpected[:5]}."
            )
        for key, kind in wanted.items():
            shape, size = stacked_shape(kind, family.num_layers), tuple(found[key].size)
            # A run pads the vocabulary; the padding is never read.
            padded = kind.layout == "vocab" and size[0] >= shape[0] and size[1:] == shape[1:]
            if size != shape and not padded:
                raise ValueError(f"{self.folder}: {key} has shape {size}, config.json asks for {shape}.")

    def dtype(self, kind: Kind) -> torch.dtype:
        return self.tensors[kind.checkpoint_key].properties.dtype

    def read(self, kind: Kind, layer: int | None) -> Tensor:
        """One layer's tensor, whole, without the padding of the vocabulary."""
        key, whole = kind.checkpoint_key, stacked_shape(kind, 1)
        entry = self.tensors[key]
        target = torch.empty(whole, dtype=entry.properties.dtype)
        start = torch.Size((layer or 0, *(0 for _ in whole[1:])))
        items = create_read_items_for_chunk_list(key, entry, [ChunkStorageMetadata(start, target.shape)])
        if sum(item.lengths.numel() for item in items) != target.numel():
            raise ValueError(f"{self.folder}: {key} is incomplete in layer {layer}.")
        try:
            self.reader.read_data(LoadPlan(items), _Into(target))
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.folder}: {key} cannot be read: {error}.") from error
        return target[0] if kind.per_layer else target


class _Into(LoadPlanner):
    """Fills one tensor; only the two methods that FileSystemReader.read_data calls do anything."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self.target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...

    def load_bytes(self, read_item: ReadItem, value: object) -> None:
        raise NotImplementedError

    def set_up_planner(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError

    create_local_plan = create_global_plan = finish_plan = set_up_planner


def write_dist_folder(
    folder: Path,
    family: Family,
    specs: Iterable[tuple[Kind, int | None, Spec]],
    read: Callable[[Kind, int | None], Tensor],
) -> None:
    """Write the weights of a whole model into an empty folder, read one after another. One file, fsynced.

    `specs` gives for every entry of the family the shape and dtype of its whole tensor, `read` the tensor.
    """
    writer = dcp.FileSystemWriter(
        folder, single_file_per_rank=True, sync_files=True, thread_count=1, per_thread_copy_ahead=0
    )
    planner = _Stream(family, specs, read)
    dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    torch.save({}, folder / COMMON)
    save_config(BACKEND, str(folder))


class _Stream(SavePlanner):
    """A plan made of specs; a tensor exists only while it is being written."""

    def __init__(
        self,
        family: Family,
        specs: Iterable[tuple[Kind, int | None, Spec]],
        read: Callable[[Kind, int | None], Tensor],
    ) -> None:
        self.read = read
        self.entries: dict[MetadataIndex, tuple[Kind, int | None]] = {}
        self.items = []
        for kind, layer, spec in specs:
            shape = (1, *spec.shape) if kind.per_layer else spec.shape
            offset = torch.Size((layer or 0, *(0 for _ in shape[1:])))
            index = MetadataIndex(kind.checkpoint_key, offset)
            self.entries[index] = kind, layer
            chunk = ChunkStorageMetadata(offset, torch.Size(shape))
            size = torch.Size(stacked_shape(kind, family.num_layers))
            entry = TensorWriteData(chunk, TensorProperties(dtype=spec.dtype), size)
            self.items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=entry))

    def set_up_planner(
        self, state_dict: dict, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None: ...

    def create_local_plan(self) -> SavePlan:
        return SavePlan(self.items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans, rewrite_index_hints=False)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        kind, layer = self.entries[write_item.index]
        tensor = self.read(kind, layer)
        return tensor[None] if kind.per_layer else tensor
