"""Megatron shards -> HF tensors on the main rank: tensor-parallel gather, pipeline hand-over, padding
stripped."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jackpot.models.build import global_names, plain
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.models.hf_folder import write_hf_folder
from megatron_jackpot.parallel.reduce import raise_on_all_ranks
from megatron_jackpot.sync.fp8 import quantised

SHARD_BYTES = 2 * 10**9
CPU = torch.device("cpu")


def export(model: MegatronModel) -> dict[str, Tensor]:
    """HF name -> CPU tensor on the main rank, {} elsewhere. Every rank must call it."""
    return dict(exported(model))


def export_hf(model: MegatronModel, path: Path) -> None:
    """Write the HF folder `path` on the main rank, a shard at a time. Every rank must call it.

    Raises OSError on every rank when it cannot be written; nothing of it is left then.
    """
    tensors = exported(model)
    with raise_on_all_ranks():
        if model.mesh.is_main:
            assert model.folder is not None
            try:
                write_hf_folder(path, tensors, model.folder, bucket_bytes=SHARD_BYTES)
            finally:
                # After an error too: the other ranks are in the collectives of the tensors that are left.
                for _ in tensors:
                    pass
        else:
            assert not list(tensors)


class WeightStream:
    """The weights of a push, on their device, to be read again and again by the main rank; the others take
    part.

    Every rank makes one. The main rank iterates it, each time to the end, and then calls `finish`; the others
    call `take_part`, which returns when it has. `name` tells one push from another; nobody holds a collective
    open between two readings.
    """

    def __init__(
        self, model: MegatronModel, name: str, *, dtype: torch.dtype | None, fp8: bool, timeout_s: float
    ) -> None:
        self.model, self.name, self.dtype, self.fp8 = model, name, dtype, fp8
        self.timeout_s = timeout_s
        self.num_readings = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._announce("read")
        stream = exported(self.model, device=self.model.mesh.device, dtype=self.dtype)
        # An expression of its own: when it is closed, `stream` stays open.
        pairs = (pair for pair in stream)
        try:
            yield from quantised(pairs) if self.fp8 else pairs
        finally:
            # Whoever reads gives up in the middle: the other ranks do not know, and are in the same
            # collectives.
            for _ in stream:
                pass

    def finish(self) -> None:
        self._announce("done")

    def take_part(self) -> None:
        """Raises TimeoutError when the main rank says nothing for `timeout_s`."""
        while self.model.mesh.store_wait(f"{self.name}/{self.num_readings}", self.timeout_s) == "read":
            self.num_readings += 1
            assert not list(exported(self.model))

    def _announce(self, what: str) -> None:
        self.model.mesh.store_set(f"{self.name}/{self.num_readings}", what)
        self.num_readings += 1


def exported(
    model: MegatronModel, *, device: torch.device = CPU, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(HF name, tensor on `device`) one after another on the main rank, none elsewhere. A tied embedding is
    emitted once.

    `dtype` is the server's; None keeps the parameters'. Every rank must come to its end. Collectives, on the
    first copy of the model only: all-gather over tp and, with pp > 1, broadcast over pp per tensor.
    """
    with torch.no_grad(), model.fresh_parameters():
        for name, shards in _whole_tensors(model):
            kind, layer = model.family.find(name)
            if model.mesh.is_main:
                tensors = model.family.unshard(kind, layer, shards)
                for key, value in tensors.items():
                    yield key, value.detach().to(device=device, dtype=dtype, copy=True)


def _whole_tensors(model: MegatronModel) -> Iterator[tuple[str, list[Tensor]]]:
    mesh = model.mesh
    if mesh.dp_rank != 0:
        return
    mine: dict[str, Tensor] = {}
    for chunk in model.chunks:
        mine.update(global_names(chunk.module))
    described = {name: tuple(parameter.shape) for name, parameter in mine.items()}
    stages: list[dict[str, tuple[int, ...]]] = [{} for _ in range(mesh.pp)]
    dist.all_gather_object(stages, described, group=mesh.pp_group)
    owners: dict[str, int] = {}
    for stage, names in enumerate(stages):
        for name in names:
            owners.setdefault(name, stage)
    for name, stage in owners.items():
        kind, _ = model.family.find(name)
        count = mesh.tp if kind.tp_dim is not None else 1
        shape, dtype = stages[stage][name], model.config.params_dtype
        if stage == mesh.pp_rank:
            gathered = _gather_shards(plain(mine[name]), count, model)
        else:
            gathered = torch.empty((count, *shape), dtype=dtype, device=mesh.device)
        if stage != 0 and mesh.tp_rank == 0:
            dist.broadcast(gathered, src=dist.get_global_rank(mesh.pp_group, stage), group=mesh.pp_group)
        yield name, list(gathered.unbind())


def _gather_shards(shard: Tensor, count: int, model: MegatronModel) -> Tensor:
    if count == 1:
        return shard[None].clone()
    gathered = shard.new_empty((count, *shard.shape))
    dist.all_gather_into_tensor(gathered.flatten(), shard.contiguous().flatten(), group=model.mesh.tp_group)
    return gathered
