"""Who this rank is: its groups, its place in the pipeline, and the two broadcasts that keep ranks in step."""

import datetime
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import methodcaller
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """The parallel layout as seen by one rank; both models share it."""

    tp_group: ProcessGroup
    pp_group: ProcessGroup
    dp_group: ProcessGroup
    """Ranks that hold the same shard of the models and different data (dp x cp)."""
    model_group: ProcessGroup
    """Ranks that hold one copy of the models (tp x pp); its first rank is the DP leader."""
    device: torch.device
    _waits: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)

    @property
    def tp_rank(self) -> int:
        return self.tp_group.rank()

    @property
    def pp_rank(self) -> int:
        return self.pp_group.rank()

    @property
    def dp_rank(self) -> int:
        return self.dp_group.rank()

    @property
    def tp(self) -> int:
        return self.tp_group.size()

    @property
    def pp(self) -> int:
        return self.pp_group.size()

    @property
    def dp(self) -> int:
        return self.dp_group.size()

    @property
    def is_leader(self) -> bool:
        """True on the rank that speaks HTTP for its copy of the models."""
        return self.model_group.rank() == 0

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes metrics and pushes weights."""
        return dist.get_rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """True where logits, scores and corrections exist."""
        return self.pp_rank == self.pp - 1

    def from_last_stage(self, tensor: Tensor) -> Tensor:
        """A small tensor of the last pipeline stage, on every stage; in place. Broadcasts: 1 over pp."""
        if self.pp > 1:
            dist.broadcast(tensor, src=dist.get_global_rank(self.pp_group, self.pp - 1), group=self.pp_group)
        return tensor

    def from_leader(self, value: Any) -> Any:
        """A picklable value of the DP leader, on all its tp and pp peers. Broadcasts: 2 over tp x pp."""
        if self.model_group.size() == 1:
            return value
        box = [value]
        source = dist.get_global_rank(self.model_group, 0)
        dist.broadcast_object_list(box, src=source, group=self.model_group, device=self.device)
        return box[0]

    def from_main(self, value: Any) -> Any:
        """A picklable value of global rank 0, everywhere. Broadcasts: 2 over the world."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def tensors_from_leader(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """A DP leader's named tensors on its tp and pp peers. Broadcasts: 2 + one per tensor over tp x pp."""
        header = self.from_leader(
            None if tensors is None else {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        )
        if tensors is None:
            tensors = {
                name: torch.empty(shape, dtype=dtype, device=self.device)
                for name, (shape, dtype) in header.items()
            }
        moved = {name: tensor.to(self.device).contiguous() for name, tensor in tensors.items()}
        if self.model_group.size() > 1:
            source = dist.get_global_rank(self.model_group, 0)
            for tensor in moved.values():
                # NCCL and gloo both lack bool in some versions; bytes are always there.
                payload = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
                dist.broadcast(payload, src=source, group=self.model_group)
        return moved

    def object_from_last_stage(self, value: Any) -> Any:
        """A small picklable value of the last pipeline stage, on every stage. Broadcasts: 2 over pp."""
        if self.pp == 1:
            return value
        box = [value]
        source = dist.get_global_rank(self.pp_group, self.pp - 1)
        dist.broadcast_object_list(box, src=source, group=self.pp_group, device=self.device)
        return box[0]

    def wait_for_leaders(self, what: str, timeout_s: float) -> None:
        """Wait until every DP leader has come this far, without holding a collective open.

        Rollouts and weight updates may take longer than a collective is allowed to. Raises TimeoutError
        naming `what` and the ranks that did not arrive.
        """
        if dist.get_world_size() == 1:
            return
        store = dist.distributed_c10d._get_default_store()
        # Counted: what is done again after a rollback must be waited for again.
        meeting = f"jackpot/{next(self._waits)}/{what}"
        if self.is_leader:
            store.set(f"{meeting}/{self.dp_rank}", "here")
        for rank in range(self.dp):
            key = f"{meeting}/{rank}"
            try:
                store.wait([key], datetime.timedelta(seconds=timeout_s))
            except dist.DistStoreError as error:
                raise TimeoutError(
                    f"Rank {dist.get_rank()} waited {timeout_s:.0f} s for DP leader {rank} to finish "
                    f"'{what}'."
                ) from error

    def own_store(self) -> dist.Store:
        """A client of its own of the ranks' store, for another thread than the main one: a wait holds its
        client's lock."""
        # torch's stubs do not know `clone`.
        return methodcaller("clone")(dist.distributed_c10d._get_default_store())

    def store_set(self, key: str, word: str) -> None:
        """The main rank's word to all others, without a collective: see `store_wait`."""
        if dist.get_world_size() > 1:
            dist.distributed_c10d._get_default_store().set(f"jackpot/{key}", word)

    def store_wait(self, key: str, timeout_s: float) -> str:
        """What the main rank says under `key`. Raises TimeoutError naming it."""
        store = dist.distributed_c10d._get_default_store()
        try:
            store.wait([f"jackpot/{key}"], datetime.timedelta(seconds=timeout_s))
        except RuntimeError as error:  # DistStoreError is one; a file store raises the bare class
            raise TimeoutError(
                f"Rank {dist.get_rank()} waited {timeout_s:.0f} s for the main rank to come to '{key}'."
            ) from error
        return store.get(f"jackpot/{key}").decode()

    def largest(self, value: int) -> int:
        """The largest of a small integer over all ranks. Reductions: 1 over the world."""
        box = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return int(box)

    def barrier(self) -> None:
        dist.barrier()
