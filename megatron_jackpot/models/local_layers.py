"""Our parts of Megatron's local layers, which a model has where there is no Transformer Engine: a CPU's.

Megatron's own attention refuses packed sequences there, its own norm sequence parallelism, and its rotary
embedding takes each sequence apart. On a CPU a pass over memory costs as much as a small matrix product:
gradients are written out where torch's would make more passes.

Shapes: T packed tokens, S sequences of at most L, G query groups of R heads each, D numbers a head.
"""

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST_DENSE = 64
"""Up to this length all scores of a sequence exist at once: at a dozen tokens torch's attention in blocks
takes twice as long, at 128 it is faster."""


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight takes part in Megatron's sequence-parallel gradient all-reduce."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        # In bf16 torch computes in fp32 and rounds once.
        return super().forward(x) if x.dtype == torch.bfloat16 else _Norm.apply(x, self.weight, self.eps)


class _Norm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        unit, scale, weight = ctx.saved_tensors
        width = weight.shape[0]
        along = (grad * unit).reshape(-1, width)
        shrink = (along @ weight).div_(-width).view(scale.shape)
        return (grad * weight).addcmul_(unit, shrink).mul_(scale), along.sum(0), None


class SwiGLU(MegatronModule):
    """silu(gate) * up of [..., gate and up side by side]."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16:
            gate, up = x.chunk(2, -1)
            return F.silu(gate) * up
        return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    """One exponential: torch's backward of silu computes it again."""

    @staticmethod
    def forward(ctx, x):
        gate, up = x.chunk(2, -1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        ctx.save_for_backward(x, sigmoid, silu)
        return silu * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, sigmoid, silu = ctx.saved_tensors
        both = torch.empty_like(x)
        gate, up = both.chunk(2, -1)
        torch.mul(grad, x.chunk(2, -1)[1], out=gate)
        # silu' = sigmoid + silu (1 - sigmoid)
        gate *= torch.addcmul(silu, silu, sigmoid, value=-1).add_(sigmoid)
        torch.mul(grad, silu, out=up)
        return both


class PackedSelfAttention(SelfAttention):
    """Megatron's, with rotary positions and attention on the padded block of a micro-batch's sequences."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[T, 1, H] in and out. Raises ValueError for what is not packed."""
        packed = kwargs.get("packed_seq_params")
        if packed is None:
            raise ValueError("PackedSelfAttention needs packed_seq_params (thd); every batch here is packed.")
        query, key, value = (x.squeeze(1) for x in self.get_query_key_value_tensors(hidden_states))
        out = self.core_attention(query, key, value, packed, kwargs["rotary_pos_emb"])
        return self.linear_proj(out)


class PackedAttention(torch.nn.Module):
    """Causal attention on packed sequences: [T, heads, D] in, [T, 1, heads * D] out.

    The sequences are gathered into a padded [S, heads, L, D] block, so that cost grows with the sum of
    squared lengths and not with the square of T, and a token's position is its row.
    """

    def __init__(self, config: Any, softmax_scale: float | None = None, **_unused: Any) -> None:
        super().__init__()
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams, angles: Tensor
    ) -> Tensor:
        """`angles` are [L or more, 1, 1, D]."""
        length = packed.max_seqlen_q
        of_query, of_key = (_padding(packed.cu_seqlens_q, length, x.shape[1]) for x in (query, key))
        turn = _rotation(angles, length, query.dtype)
        query_SHLD, key_SGLD = (
            _Rotate.apply(_Pad.apply(x, *of), *turn) for x, of in ((query, of_query), (key, of_key))
        )
        out = _attend(query_SHLD, key_SGLD, _Pad.apply(value, *of_key), self.scale)
        return _Unpad.apply(out, *of_query).view(query.shape[0], 1, -1)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention [S, G * R, L, D], of keys and values [S, G, L, D]."""
    # In bf16 torch's keeps the scores in fp32.
    if query.shape[2] > LONGEST_DENSE or query.dtype == torch.bfloat16:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    (rows, groups, length, width), shared = key.shape, query.shape[1] // key.shape[1]
    mask = query.new_full((length, length), -math.inf).triu_(1).repeat(shared, 1)
    # A group's heads lie one below the other, and share one product.
    query = query.view(rows * groups, shared * length, width)
    key, value = (x.view(rows * groups, length, width) for x in (key, value))
    weight = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scale).softmax(-1)
    return torch.bmm(weight, value).view(rows, groups * shared, length, width)


@lru_cache(maxsize=4)
def _padding(
    cu_seqlens: Tensor, length: int, heads: int
) -> tuple[tuple[int, int, int], Tensor, Tensor, Tensor]:
    """Between [T * heads] rows of packed tokens and [S * heads * L] slots of the padded block: (S, heads, L);
    the slot of each row; the row in each slot, behind a sequence's end that of its last token; the slots of
    no token. The same tensor of starts, which nobody changes, gives the same object: layers share it."""
    lengths, starts = cu_seqlens.diff().long(), cu_seqlens[:-1].long()
    place, head = (torch.arange(n, device=cu_seqlens.device) for n in (length, heads))
    token = starts[:, None] + torch.minimum(place, lengths[:, None] - 1)
    rows = (token[:, None] * heads + head[:, None]).flatten()
    inside = (place < lengths[:, None])[:, None].expand(-1, heads, -1).flatten()
    filled, empty = (which.nonzero()[:, 0] for which in (inside, ~inside))
    slots = torch.empty_like(filled).index_copy_(0, rows[filled], filled)
    return (len(lengths), heads, length), slots, rows, empty


class _Pad(torch.autograd.Function):
    """[T, heads, D] -> [S, heads, L, D]. Behind a sequence's end nobody looks, causality forbids it, and no
    gradient comes back from there; a NaN stays in its sequence."""

    @staticmethod
    def forward(ctx, x, shape, slots, rows, _empty):
        ctx.shape, ctx.slots = x.shape, slots
        return x.reshape(-1, x.shape[-1]).index_select(0, rows).view(*shape, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.reshape(-1, grad.shape[-1]).index_select(0, ctx.slots)
        return grad.view(ctx.shape), None, None, None, None


class _Unpad(torch.autograd.Function):
    """[S, heads, L, D] -> [T * heads, D]; the gradient of a slot of no token is 0."""

    @staticmethod
    def forward(ctx, x, shape, slots, rows, empty):
        ctx.shape, ctx.rows, ctx.empty = x.shape, rows, empty
        return x.reshape(-1, x.shape[-1]).index_select(0, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.index_select(0, ctx.rows).index_fill_(0, ctx.empty, 0.0)
        return grad.view(ctx.shape), None, None, None, None


@lru_cache(maxsize=16)
def _rotation(angles: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) [L, D], the first half of sin negative: see `_Rotate`."""
    angles = angles[:length, 0, 0]
    low, high = angles.sin().chunk(2, -1)
    return angles.cos().to(dtype), torch.cat([-low, high], -1).to(dtype)


class _Rotate(torch.autograd.Function):
    """x cos + swap(x) sin, where swap exchanges the halves of the last axis."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _swap(x).mul_(sin).addcmul_(x, cos)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _swap(grad * sin).addcmul_(grad, cos), None, None


def _swap(x: Tensor) -> Tensor:
    return x.roll(x.shape[-1] // 2, -1)
