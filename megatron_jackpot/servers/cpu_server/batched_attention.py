"""Attention of SGLang's CPU engine over many sequences at once, in place of its loop over them.

A plugin of SGLang's, named by jackpot_cpu_server-0.dist-info: its backend `torch_native` becomes this one and
keeps the name, by which the engine decides other things too. Sequences of about one length are padded to the
longest and attend together. What is rare goes the engine's own way: sliding windows, cross-attention,
encoders, keys in another dtype than queries.

Shapes: N tokens, those of all sequences one after another; B sequences, Q queries and L keys of each; H heads
of D dimensions, of keys fewer heads. A slot is a row of the cache of keys or values.
"""

import inspect
import logging

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

log = logging.getLogger(__name__)

LARGEST = 2**22
"""Entries of a mask, and keys x 128, that are in memory at once."""


FIRST = "self query output k_cache v_cache req_to_token req_pool_indices seq_lens"
LAST = "encoder_lens scaling enable_gqa causal is_cross_attn sliding_window_size"
KNOWN = {
    "_run_sdpa_forward_decode": f"{FIRST} {LAST}",
    "_run_sdpa_forward_extend": f"{FIRST} extend_prefix_lens extend_seq_lens {LAST}",
}
"""The methods that are replaced, and their arguments: another SGLang's may ask for more than is done here."""


def register() -> None:
    """Called by SGLang in each of its processes."""
    for name, arguments in KNOWN.items():
        found = " ".join(inspect.signature(getattr(TorchNativeAttnBackend, name)).parameters)
        if found != arguments:
            log.warning(f"SGLang's {name} takes {found}, not {arguments}: its own attention is used.")
            return
    register_attention_backend("torch_native")(BatchedAttention)


class BatchedAttention(TorchNativeAttnBackend):
    """`torch_native` with these two methods; their arguments are those of the ones they replace."""

    def _run_sdpa_forward_decode(
        self,
        query_NHD: Tensor,
        output_NHD: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        rows_B: Tensor,
        lengths_B: Tensor,
        encoder_lens: Tensor | None = None,
        **how: object,
    ) -> Tensor:
        held = (keys, values, slots, rows_B, lengths_B)
        if encoder_lens is not None or is_rare(query_NHD, keys, **how):
            return super()._run_sdpa_forward_decode(query_NHD, output_NHD, *held, encoder_lens, **how)
        return attend(query_NHD, output_NHD, *held, torch.ones_like(lengths_B), **how)

    def _run_sdpa_forward_extend(
        self,
        query_NHD: Tensor,
        output_NHD: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        rows_B: Tensor,
        lengths_B: Tensor,
        before_B: Tensor,
        queries_B: Tensor,
        encoder_lens: Tensor | None = None,
        **how: object,
    ) -> Tensor:
        held = (keys, values, slots, rows_B, lengths_B)
        if encoder_lens is not None or not how["causal"] or is_rare(query_NHD, keys, **how):
            rest = (before_B, queries_B, encoder_lens)
            return super()._run_sdpa_forward_extend(query_NHD, output_NHD, *held, *rest, **how)
        return attend(query_NHD, output_NHD, *held, queries_B, **how)


def is_rare(
    query: Tensor, keys: Tensor, *, is_cross_attn: bool, sliding_window_size: int | None, **_: object
) -> bool:
    return is_cross_attn or sliding_window_size is not None or query.dtype != keys.dtype


def attend(
    query_NHD: Tensor,
    output_NHD: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    rows_B: Tensor,
    lengths_B: Tensor,
    queries_B: Tensor,
    *,
    scaling: float | None,
    enable_gqa: bool,
    **_: object,
) -> Tensor:
    """Each sequence's last `queries` tokens over all of its `lengths` tokens, as a decoder: into the output.

    keys, values [slots, H, D]; slots [rows, length]: where the tokens of a row lie; `rows_B` are the
    sequences' rows.
    """
    starts_B = queries_B.cumsum(0) - queries_B
    for group in alike(queries_B.tolist(), lengths_B.tolist()):
        at = torch.tensor(group)
        num_B, length_B = queries_B[at, None], lengths_B[at, None]
        position_L = torch.arange(int(length_B.max()))
        slots_BL = slots[rows_B[at], : len(position_L)]
        # Past its end a sequence has its first key again: what the mask leaves out must still be finite.
        slots_BL = torch.where(position_L < length_B, slots_BL, slots_BL[:, :1])
        key, value = (taken(cache, slots_BL).transpose(1, 2) for cache in (keys, values))
        whole = bool((num_B == length_B).all())
        most = int(num_B.max())
        at_once = most if whole else max(1, LARGEST // slots_BL.numel())
        for first in range(0, most, at_once):
            position_Q = torch.arange(first, min(first + at_once, most))
            at_BQ = starts_B[at, None] + torch.minimum(position_Q, num_B - 1)
            last_BQ = length_B - num_B + position_Q
            found = scaled_dot_product_attention(
                taken(query_NHD, at_BQ).transpose(1, 2),
                key,
                value,
                attn_mask=None if whole else (position_L <= last_BQ[..., None])[:, None],
                is_causal=whole,
                scale=scaling,
                enable_gqa=enable_gqa,
            )
            real_BQ = position_Q < num_B
            output_NHD.index_copy_(0, at_BQ[real_BQ], found.transpose(1, 2)[real_BQ])
    return output_NHD


def alike(queries: list[int], lengths: list[int]) -> list[list[int]]:
    """The sequences, by number, in groups whose most queries and greatest length are at most a quarter and 16
    above their least."""
    groups: list[list[int]] = []
    few = least = most = 0
    for i in sorted(range(len(lengths)), key=lambda i: (queries[i], lengths[i])):
        lower, upper = min(least, lengths[i]), max(most, lengths[i])
        near = queries[i] <= few * 5 // 4 + 16 and upper <= lower * 5 // 4 + 16
        if groups and near and (len(groups[-1]) + 1) * upper * max(queries[i], 128) <= LARGEST:
            groups[-1].append(i)
            least, most = lower, upper
        else:
            groups.append([i])
            few, least, most = queries[i], lengths[i], lengths[i]
    return groups


def taken(rows: Tensor, at: Tensor) -> Tensor:
    """rows[at], five times as fast."""
    return rows.index_select(0, at.flatten()).unflatten(0, at.shape)
