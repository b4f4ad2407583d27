"""Megatron shards -> HF tensors on the main rank: tensor-parallel gather, pipeline hand-over, padding stripped."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jackpot.hf_folder import write_hf_folder
from megatron_jackpot.models.build import global_names
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.parallel.reduce import together

SHARD_BYTES = 2 * 10**9


def export(model: MegatronModel) -> dict[str, Tensor]:
    """HF name -> CPU tensor on the main rank, {} elsewhere. Every rank must call it."""
    return dict(exported(model))


def export_hf(model: MegatronModel, path: Path) -> None:
    """Write the HF folder `path` on the main rank, a shard at a time. Every rank must call it.

    Raises OSError on every rank when it cannot be written; nothing of it is left then.
    """
    tensors = exported(model)
    with together():
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


def exported(model: MegatronModel) -> Iterator[tuple[str, Tensor]]:
    """(HF name, CPU tensor) one after another on the main rank, none elsewhere. A tied embedding is emitted once.

    Every rank must come to its end. Collectives, on the first copy of the model only: all-gather over tp and, with pp > 1,
    broadcast over pp per tensor.
    """
    with torch.no_grad(), model.fresh_parameters():
        for name, shards in _whole_tensors(model):
            kind, layer = model.family.find(name)
            if model.mesh.is_main:
                tensors = model.family.unshard(kind, layer, shards)
                yield from ((key, value.detach().to("cpu", copy=True)) for key, value in tensors.items())


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
            gathered = _gather_shards(_plain(mine[name]), count, model)
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


def _plain(parameter: Tensor) -> Tensor:
    """An fp8 parameter in its high-precision form; any other as it is."""
    return parameter.dequantize() if hasattr(parameter, "_fp8_dtype") else parameter.detach()
