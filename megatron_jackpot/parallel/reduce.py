"""What ranks agree on: sums for the algorithm's statistics and for the metrics of a step, and that something
failed."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

FIRST_METRICS = 512
"""Room for metrics in the first all-reduce: its size must not depend on how many a rank has."""


def make_sum_over(group: ProcessGroup | None) -> Callable[[Tensor], Tensor]:
    """A function that sums a tensor over the group in fp64, not in place. All-reduces: 1 per call."""

    def sum_over(tensor: Tensor) -> Tensor:
        total = tensor.to(torch.float64, copy=True)
        if group is not None and group.size() > 1:
            dist.all_reduce(total, group=group)
        return total

    return sum_over


def make_number_alike(group: ProcessGroup | None) -> Callable[[Tensor], tuple[Tensor, int]]:
    """A function from int64 ids [..., k] to (numbers [...], how many), the same number for the same id on
    every rank of the group. Gathers of objects: 1 per call."""

    def number_alike(ids: Tensor) -> tuple[Tensor, int]:
        mine_Nk, index_N = torch.unique(ids.flatten(0, -2), dim=0, return_inverse=True)
        if group is None or group.size() == 1:
            return index_N.view(ids.shape[:-1]), len(mine_Nk)
        parts: list[list[tuple[int, ...]]] = [[] for _ in range(group.size())]
        dist.all_gather_object(parts, [tuple(row) for row in mine_Nk.tolist()], group=group)
        number = {row: i for i, row in enumerate(sorted({row for part in parts for row in part}))}
        numbers_N = torch.tensor([number[tuple(row)] for row in mine_Nk.tolist()], device=ids.device)
        return numbers_N[index_N].view(ids.shape[:-1]), len(number)

    return number_alike


def reduce_metrics(
    metrics: Mapping[str, tuple[Tensor, Tensor]], group: ProcessGroup | None
) -> dict[str, float]:
    """name -> global sum / global count, by name; a name whose global count is 0 is left out. All-reduces: 1,
    and another for what is beyond FIRST_METRICS.

    Raises ValueError, on every rank, when the names differ between ranks.
    """
    names = sorted(metrics)
    assert names, "a step measures something"
    pairs = torch.stack([part.double() for name in names for part in metrics[name]]).view(-1, 2)
    # 20 bits: the sum of squares stays exact in fp64. Mean and mean square agree only where all ranks do.
    fingerprint = zlib.crc32("\n".join(names).encode()) & 0xFFFFF
    header = pairs.new_tensor([[fingerprint, fingerprint**2], [1, 0]])
    first, rest = pairs[:FIRST_METRICS], pairs[FIRST_METRICS:]
    payload = pairs.new_zeros(2 + FIRST_METRICS, 2)
    payload[: 2 + len(first)] = torch.cat([header, first])
    (fingerprints, squares), (num_ranks, _), *rows = make_sum_over(group)(payload).tolist()
    if int(fingerprints) ** 2 != int(num_ranks) * int(squares):
        raise ValueError(
            f"metric names differ between ranks; this rank has {names}. Make them equal everywhere."
        )
    if len(rest):
        # Only now is it known that every rank has as many.
        rows += make_sum_over(group)(rest).tolist()
    return {name: row[0] / row[1] for name, row in zip(names, rows, strict=False) if row[1]}


def with_all_names(
    metrics: Mapping[str, tuple[Tensor, Tensor]], prefix: str, group: ProcessGroup | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """`metrics`, and (0, 0) for names with this prefix that other ranks of the group alone have. Gathers of
    objects: 1."""
    if group is None or group.size() == 1:
        return dict(metrics)
    names: list[list[str]] = [[] for _ in range(group.size())]
    dist.all_gather_object(names, [name for name in metrics if name.startswith(prefix)], group=group)
    nothing = torch.zeros([])
    return {**{name: (nothing, nothing) for part in names for name in part}, **metrics}


@contextmanager
def raise_on_all_ranks(group: ProcessGroup | None = None) -> Iterator[None]:
    """What fails within on one rank fails on all of the group: its error there, OSError with rank and reason
    elsewhere.

    Without it the others would wait in their next collective for a rank that does not come. Gathers: 1 to
    all.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    reasons: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(
        reasons, None if error is None else f"{type(error).__name__}: {error}", group=group
    )
    if error is not None:
        raise error
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise OSError(f"rank {rank}: {reason}")
