"""Logits [T, V/TP] = hidden @ weight.T that never exist whole, nor does their gradient.

Shapes as in vocab.py; H hidden, weight_VH this rank's slice of the output layer. A block of logits has the
dtype that the output layer would give it, so that results are those of logits that exist; on CUDA Triton's
kernels read the blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_jackpot.parallel.block_sizes import GRADIENT_ELEMENTS, READ_ELEMENTS
from megatron_jackpot.parallel.slices import Local, all_reduce, cut, read_slice
from megatron_jackpot.parallel.vocab_spec import Columns, VocabSpec

Slope = Callable[[slice, Tensor, Columns], Tensor]
"""(tokens, their logits at some columns, those columns) -> the gradient of these logits, in new memory."""


class Blocks(NamedTuple):
    """How logits are cut; None leaves a size to the device."""

    tokens: int | None = None
    columns: int | None = None
    """Of a block in backward; forward reads all columns of a block of tokens."""


class LinearLogits:
    """Stands where vocab.py and divergence.py take logits; indexing by a slice of tokens makes theirs, `[:]`
    all.

    Raises ValueError for factors that do not fit.
    """

    def __init__(self, hidden_TH: Tensor, weight_VH: Tensor, blocks: Blocks = Blocks()) -> None:  # noqa: B008
        if hidden_TH.dtype != weight_VH.dtype or hidden_TH.shape[-1] != weight_VH.shape[-1]:
            raise ValueError(
                f"hidden states {tuple(hidden_TH.shape)} in {hidden_TH.dtype} and weight "
                f"{tuple(weight_VH.shape)} in "
                f"{weight_VH.dtype}: must agree in dtype and last dimension. Pass the output layer's own "
                "weight."
            )
        self.hidden_TH, self.weight_VH, self.blocks = hidden_TH, weight_VH, blocks
        self.shape = (hidden_TH.shape[0], weight_VH.shape[0])
        self.dtype, self.is_cuda = hidden_TH.dtype, hidden_TH.is_cuda
        self.device_type = "cuda" if hidden_TH.is_cuda else "cpu"
        self.new_empty = hidden_TH.new_empty

    def __getitem__(self, rows: slice) -> Tensor:
        return F.linear(self.hidden_TH[rows], self.weight_VH)

    @property
    def tokens_each(self) -> int:
        """Tokens that are read at a time; depends on the shapes alone, so that every pass makes the same
        blocks."""
        return self.blocks.tokens or max(1, READ_ELEMENTS[self.device_type] // self.shape[1])

    def rows(self) -> Iterator[slice]:
        """At least one, which may be empty."""
        return cut(0, self.shape[0], self.tokens_each) if self.shape[0] else iter([slice(0, 0)])


Logits = Tensor | LinearLogits


def read(
    logits: Logits,
    vocab: VocabSpec,
    chunk: int | None,
    *,
    ids_TN: Tensor | None = None,
    k: int = 0,
    entropy: bool = False,
) -> Local:
    """`read_slice` of logits in either form."""
    if isinstance(logits, Tensor):
        return read_slice(logits, vocab, chunk, ids_TN=ids_TN, k=k, entropy=entropy)
    parts = []
    for rows in logits.rows():
        ids = None if ids_TN is None else ids_TN[rows]
        parts.append(read_slice(logits[rows], vocab, chunk, ids_TN=ids, k=k, entropy=entropy))
    columns_of = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Local)}
    return Local(**{name: None if each[0] is None else torch.cat(each) for name, each in columns_of.items()})


def factors(logits: Logits) -> tuple[Blocks | None, tuple[Tensor, ...]]:
    """What an autograd function takes and saves in place of `logits`; `joined` makes them again."""
    return (
        (None, (logits,))
        if isinstance(logits, Tensor)
        else (logits.blocks, (logits.hidden_TH, logits.weight_VH))
    )


def joined(blocks: Blocks | None, tensors: Sequence[Tensor]) -> Logits:
    return tensors[0] if blocks is None else LinearLogits(*tensors, blocks)


def gradients(logits: Logits, vocab: VocabSpec, slope: Slope, *, wide: bool = False) -> tuple[Tensor, ...]:
    """Gradients of `factors(logits)` from that of the logits: slope, or slope @ weight and slope.T @ hidden.

    Logits that do not exist are made once more, in blocks of tokens x columns, or of all columns where
    `wide`. Beside the gradients this holds [T, H] and a block of columns of the weight in fp32. All-reduces:
    sum [T, H] in fp32, so that every rank has the whole gradient of the hidden states that all of them share;
    none for logits that exist.
    """
    columns = vocab.columns(logits.shape[-1])
    if isinstance(logits, Tensor):
        return (slope(slice(0, logits.shape[0]), logits, columns),)
    hidden_TH, weight_VH = logits.hidden_TH, logits.weight_VH
    # Both gradients are sums over many blocks. In bf16, of 8 bits, a block's share would vanish beside the
    # sum of those before it, and the result would depend on the sizes of the blocks.
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    grad_hidden_TH = torch.zeros(hidden_TH.shape, dtype=dtype, device=hidden_TH.device)
    # Zeros: the loop does not come to the columns of padding, and their rows must not move.
    grad_weight_VH = torch.zeros_like(weight_VH)
    columns_each = max(1, columns.width if wide else logits.blocks.columns or 2**13)
    # Columns outside, tokens inside: the weight's sum over tokens is then finished before the next block of
    # columns, and its fp32 holds one block. The other way round all [V/TP, H] would have to exist in fp32.
    # `wide` gives that up for one block of all columns: KL's slope reads the teacher, whose logits come whole
    # rows at a time and would be computed again for every block of columns. Its tokens are cut as in forward.
    square = logits.blocks.tokens or max(1, GRADIENT_ELEMENTS[logits.device_type] // columns_each)
    for part in cut(0, columns.width, columns_each):
        weight = weight_VH[part]
        grad_part = torch.zeros_like(weight, dtype=dtype)
        for rows in cut(0, logits.shape[0], logits.tokens_each if wide else square):
            own = Columns(columns.first + part.start, part.stop - part.start)
            # The slope is in the dtype of the logits, as it would leave the backward of logits that exist:
            # the products run on tensor cores, and only their sums are wide.
            found = slope(rows, F.linear(hidden_TH[rows], weight), own)
            grad_hidden_TH[rows] += found @ weight
            grad_part += found.T @ hidden_TH[rows]
        grad_weight_VH[part] = grad_part
    # Each rank has the part of its own columns. Before the cast, so that it is rounded once whatever the
    # number of ranks; outside the loop, so that a rank with padding alone, which has no block, comes here
    # too.
    all_reduce(grad_hidden_TH, dist.ReduceOp.SUM, vocab.group)
    return grad_hidden_TH.to(hidden_TH.dtype), grad_weight_VH
