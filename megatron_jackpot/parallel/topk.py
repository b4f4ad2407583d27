"""Top-k with a fixed order: larger value first, equal values by lowest id, on one rank and over ranks.

torch.topk leaves the order of equal values open, and bf16 logits are full of them. Value and id are therefore
packed into one int64 key. Shapes: T tokens, V columns of one slice, k entries per token, -1 no id.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def local_top(values_TV: Tensor, k: int, first: int) -> tuple[Tensor, Tensor]:
    """(values [T, k] fp32, ids [T, k] int32) of a slice from id `first` on; short ones end in -inf, -1."""
    num_tokens, width = values_TV.shape
    values_TK = values_TV.new_full((num_tokens, k), -float("inf"), dtype=torch.float32)
    ids_TK = torch.full((num_tokens, k), -1, dtype=torch.int32, device=values_TV.device)
    found = min(k, width)
    if found:
        ids_V = torch.arange(first, first + width, device=values_TV.device)
        columns = _order_keys(values_TV.float(), ids_V).topk(found, dim=-1).indices
        values_TK[:, :found] = values_TV.gather(-1, columns)
        ids_TK[:, :found] = columns + first
    return values_TK, ids_TK


def gather_top(values_TK: Tensor, ids_TK: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The k best of every rank's k: (values [T, k] fp32, ids [T, k] int64).

    All-gather: one, k x TP x 8 bytes per token. Nothing is sent on one rank.
    """
    if group is None or group.size() == 1:
        return values_TK, ids_TK.long()
    num_tokens, k = values_TK.shape
    packed = torch.stack([values_TK.view(torch.int32), ids_TK])
    gathered = packed.new_empty(group.size(), *packed.shape)
    dist.all_gather_into_tensor(gathered.view(-1, num_tokens, k), packed, group=group)
    all_values, all_ids = gathered.permute(1, 2, 0, 3).reshape(2, num_tokens, -1)
    return top_of(all_values.view(torch.float32), all_ids.long(), k)


def top_of(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of given entries (values [T, k] fp32, ids [T, k] int64); ids [V] or [T, V]."""
    best = _order_keys(values, ids).topk(k, dim=-1).indices
    return values.gather(-1, best), ids.expand_as(values).gather(-1, best)


def _order_keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that sort like (value, -id); ids [V] or [T, V], and -1 is below any id of the same value."""
    # + 0.0 turns -0.0 into 0.0, and makes the copy that is changed in place below.
    bits = (values + 0.0).view(torch.int32)
    # Two's complement floats sort like integers once the magnitude bits of negative ones are flipped.
    bits ^= (bits >> 31) & 0x7FFFFFFF
    keys = bits.long()
    keys <<= 32
    keys += torch.where(ids < 0, 0, 2**31 - ids.long())
    return keys
