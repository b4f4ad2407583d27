"""Log-probs straight from hidden states and the output weight: the logits [T, V/TP] never exist, nor their gradient.

Shapes and keyword arguments as in vocab.py; H hidden, weight_VH this rank's slice of the output layer, in the dtype of
the hidden states. A block of logits has that dtype too, as the output layer would give them, so that the results are
those of vocab.py on its logits; on CUDA the blocks are read by Triton's kernels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_jackpot.parallel.vocab import (
    Columns,
    Local,
    all_reduce,
    logp_slope,
    normalise,
    own_columns,
    read_slice,
)


def linear_logp_at(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    ids_TK: Tensor,
    *,
    vocab_size: int,
    group: ProcessGroup | None,
    temperature: float = 1.0,
    tokens: int | None = None,
    columns: int | None = None,
) -> Tensor:
    """log softmax(hidden @ weight.T / temperature) at ids [T, K], with gradient into both factors.

    An id of -1 has log-prob -inf and no gradient. Blocks of `tokens` x `columns` logits are made in forward and once
    more in backward (default: by memory); beside them backward holds the gradients, [T, H] in fp32 and [V/TP, H].
    All-reduces: max [T], sum [1 + K, T]; in backward sum [T, H] in fp32, so that every rank has the whole gradient of
    the hidden states that all of them share. Raises ValueError for a bad vocab_size or temperature, and for factors
    that do not fit.
    """
    if hidden_TH.dtype != weight_VH.dtype or hidden_TH.shape[-1] != weight_VH.shape[-1]:
        raise ValueError(
            f"hidden states {tuple(hidden_TH.shape)} in {hidden_TH.dtype} and weight {tuple(weight_VH.shape)} in "
            f"{weight_VH.dtype}: must agree in dtype and last dimension. Pass the output layer's own weight."
        )
    blocks = _Blocks(hidden_TH, weight_VH, vocab_size, group, temperature, tokens, columns)
    return _LinearLogp.apply(hidden_TH, weight_VH, ids_TK, blocks)


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, ids_TK, blocks):
        lse_T, picked_TK = blocks.per_token(), blocks.per_token(ids_TK.shape[1])
        lse_T.fill_(-float("inf"))
        picked_TK.zero_()
        for part in blocks.parts():
            for rows in blocks.rows():
                logits = F.linear(hidden_TH[rows], weight_VH[part.slice])
                local = read_slice(logits, part.columns, blocks.temperature, None, ids_TN=ids_TK[rows])
                lse_T[rows] = torch.logaddexp(lse_T[rows], local.lse_T)
                picked_TK[rows] += local.picked_TN
        local = Local(lse_T, picked_TK, None, None, None)
        log_z_T, logp_TK, _ = normalise(local, ids_TK, blocks.vocab_size, blocks.group)
        ctx.blocks = blocks
        ctx.save_for_backward(hidden_TH, weight_VH, ids_TK, log_z_T)
        return logp_TK

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TK):
        """slope = (sum one_hot(id) * grad - softmax * sum grad) / temperature; slope @ weight, slope.T @ hidden."""
        hidden_TH, weight_VH, ids_TK, log_z_T = ctx.saved_tensors
        blocks = ctx.blocks
        inside_TK = (ids_TK >= 0) & (ids_TK < blocks.vocab_size)
        grad_TK = torch.where(inside_TK, grad_TK, 0.0) / blocks.temperature
        grad_hidden_TH = torch.zeros(hidden_TH.shape, dtype=blocks.dtype, device=hidden_TH.device)
        grad_weight_VH = torch.zeros_like(weight_VH)
        for part in blocks.parts():
            grad_part = torch.zeros_like(weight_VH[part.slice], dtype=blocks.dtype)
            for rows in blocks.rows():
                logits = F.linear(hidden_TH[rows], weight_VH[part.slice])
                given = (ids_TK[rows], grad_TK[rows], log_z_T[rows], blocks.temperature)
                slope = logp_slope(logits, part.columns, *given)
                grad_hidden_TH[rows] += slope @ weight_VH[part.slice]
                grad_part += slope.T @ hidden_TH[rows]
            grad_weight_VH[part.slice] = grad_part
        all_reduce(grad_hidden_TH, dist.ReduceOp.SUM, blocks.group)
        return grad_hidden_TH.to(hidden_TH.dtype), grad_weight_VH, None, None


@dataclass(frozen=True)
class _Part:
    """Consecutive columns of this rank's slice."""

    slice: slice
    columns: Columns


class _Blocks:
    """How the logits of a rank are cut: blocks of at most 8 MB in fp32 on CPU and 256 MB on CUDA by default."""

    def __init__(
        self,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        vocab_size: int,
        group: ProcessGroup | None,
        temperature: float,
        tokens: int | None,
        columns: int | None,
    ) -> None:
        self.hidden_TH, self.num_tokens = hidden_TH, hidden_TH.shape[0]
        self.vocab_size, self.group, self.temperature = vocab_size, group, temperature
        self.dtype = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
        # Only the shape of the logits is asked for: an empty tensor has it too.
        self.own = own_columns(weight_VH.new_empty(0, weight_VH.shape[0]), vocab_size, group, temperature)
        elements = 2**26 if hidden_TH.is_cuda else 2**21
        self.columns_each = columns or 2**13
        self.tokens_each = tokens or max(1, elements // self.columns_each)

    def parts(self) -> Iterator[_Part]:
        """The true columns; padding is never multiplied."""
        for start in range(0, self.own.width, self.columns_each):
            stop = min(start + self.columns_each, self.own.width)
            yield _Part(slice(start, stop), Columns(self.own.first + start, stop - start))

    def rows(self) -> Iterator[slice]:
        for start in range(0, self.num_tokens, self.tokens_each):
            yield slice(start, min(start + self.tokens_each, self.num_tokens))

    def per_token(self, *shape: int) -> Tensor:
        """Empty [T, ...] in the precision of the results."""
        return self.hidden_TH.new_empty((self.num_tokens, *shape), dtype=self.dtype)
