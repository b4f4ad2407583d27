"""Top-k with a fixed order: larger value first, equal values by lowest id, on one rank and over ranks.

torch.topk leaves the order of equal values open, and bf16 logits are full of them. Value and id are therefore
packed into one int64 key; an fp64 value fills one alone, and is sorted. Values are fp32, or fp64 where the
logits are. Shapes: T tokens, V columns of one slice, k entries per token, -1 no id.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_jackpot.algorithm.obrs import precise


def local_top(values_TV: Tensor, k: int, first: int) -> tuple[Tensor, Tensor]:
    """(values [T, k], ids [T, k] int32) of a slice from id `first` on; short ones end in -inf, -1."""
    num_tokens, width = values_TV.shape
    values_TV = precise(values_TV)
    values_TK = values_TV.new_full((num_tokens, k), -float("inf"))
    ids_TK = torch.full((num_tokens, k), -1, dtype=torch.int32, device=values_TV.device)
    found = min(k, width)
    if found:
        ids_V = torch.arange(first, first + width, device=values_TV.device)
        columns = _best(values_TV, ids_V, found)
        values_TK[:, :found] = values_TV.gather(-1, columns)
        ids_TK[:, :found] = columns + first
    return values_TK, ids_TK


def gather_top(values_TK: Tensor, ids_TK: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The k best of every rank's k: (values [T, k], ids [T, k] int64).

    All-gather: one, k x TP x 8 bytes per token (16 for fp64). Nothing is sent on one rank, or of no token.
    """
    if group is None or group.size() == 1 or not values_TK.numel():
        return values_TK, ids_TK.long()
    num_tokens, k = values_TK.shape
    bits = torch.int64 if values_TK.dtype == torch.float64 else torch.int32
    packed = torch.stack([values_TK.view(bits), ids_TK.to(bits)])
    gathered = packed.new_empty(group.size(), *packed.shape)
    dist.all_gather_into_tensor(gathered.view(-1, num_tokens, k), packed, group=group)
    all_values, all_ids = gathered.permute(1, 2, 0, 3).reshape(2, num_tokens, -1)
    return top_of(all_values.view(values_TK.dtype), all_ids.long(), k)


def top_of(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of given entries (values [T, k], ids [T, k] int64); ids [V] or [T, V]."""
    best = _best(values, ids, k)
    return values.gather(-1, best), ids.expand_as(values).gather(-1, best)


def _best(values: Tensor, ids: Tensor, k: int) -> Tensor:
    """Columns of the k best entries, best first, [T, k]."""
    if values.dtype != torch.float64:
        return _order_keys(values, ids).topk(k, dim=-1).indices
    by_id = torch.where(ids < 0, 2**31, ids.long()).expand_as(values).argsort(dim=-1, stable=True)
    by_value = values.gather(-1, by_id).argsort(dim=-1, descending=True, stable=True)
    return by_id.gather(-1, by_value[:, :k])


def _order_keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys of fp32 values that sort like (value, -id); ids [V] or [T, V], and -1 is below any id of the
    same value."""
    # + 0.0 turns -0.0 into 0.0, and makes the copy that is changed in place below.
    bits = (values + 0.0).view(torch.int32)
    # Two's complement floats sort like integers once the magnitude bits of negative ones are flipped.
    bits ^= (bits >> 31) & 0x7FFFFFFF
    keys = bits.long()
    keys <<= 32
    keys += torch.where(ids < 0, 0, 2**31 - ids.long())
    return keys
