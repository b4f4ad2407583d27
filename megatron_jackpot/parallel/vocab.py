"""Log-probs, top-k, argmax and entropy from logits whose vocabulary is split over tensor-parallel ranks.

Shapes: T tokens, V the padded vocabulary, logits_TV this rank's equal slice [T, V / TP] in any float dtype,
or the factors it is made of (linear.py), N and K ids per token, k top entries. Every function takes its
group; None is one rank. Columns at or beyond `vocab_size` are padding and belong to no softmax; ids outside 0
..
vocab_size - 1 have log-prob -inf. Logits are read in chunks of tokens, in fp32 (fp64 stays), so that no
second [T, V] exists; they are never modified. On CUDA Triton's kernels read them in one pass instead
(dispatch.py); `chunk` is then without effect. Gradient "into the logits" goes into both factors where they
are factors; backward then makes the logits once more, by blocks, and all-reduces sum [T, H].
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_jackpot.parallel import dispatch
from megatron_jackpot.parallel.linear import Logits, factors, gradients, joined, read
from megatron_jackpot.parallel.slices import (
    logp_slope,
    normalise,
    own_columns,
    scaled_rows,
    token_chunks,
)
from megatron_jackpot.parallel.topk import gather_top

LOGP_FLOOR = -1e30
"""Where a probability is 0 its logarithm is cut here, so that their product is 0."""


@dataclass(frozen=True, kw_only=True)
class VocabScores:
    """What one no-grad pass over the logits yields; None where it was not asked for."""

    logp_T: Tensor
    """log-prob of the labels."""
    at_ids_TK: Tensor | None
    """log-prob at the given ids, -inf where an id is -1."""
    topk_logp_TK: Tensor | None
    """The k largest log-probs, best first."""
    topk_ids_TK: Tensor | None
    """int64, their ids; equal logits come in order of id."""
    entropy_T: Tensor | None
    """Entropy in nats."""


def vocab_parallel_logp(
    logits_TV: Logits,
    ids_T: Tensor,
    *,
    vocab_size: int,
    group: ProcessGroup | None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """log softmax(logits / temperature)[ids], [T], with gradient into this rank's slice.

    All-reduces: max [T], sum [2, T]; none in backward, which recomputes the softmax chunk by chunk (`chunk`
    tokens; default: by memory). Raises ValueError for a bad vocab_size or temperature.
    """
    own_columns(logits_TV, vocab_size, group, temperature)
    blocks, tensors = factors(logits_TV)
    return _Logp.apply(ids_T[:, None], vocab_size, group, temperature, chunk, blocks, *tensors)[:, 0]


def vocab_parallel_logp_at(
    logits_TV: Logits,
    ids_TK: Tensor,
    *,
    vocab_size: int,
    group: ProcessGroup | None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """log softmax(logits / temperature) at ids [T, K], with gradient into this rank's slice.

    An id of -1 has log-prob -inf and no gradient; an id may occur twice. All-reduces: max [T], sum
    [1 + K, T]; none in backward. Raises ValueError for a bad vocab_size or temperature.
    """
    own_columns(logits_TV, vocab_size, group, temperature)
    blocks, tensors = factors(logits_TV)
    return _Logp.apply(ids_TK, vocab_size, group, temperature, chunk, blocks, *tensors)


@torch.no_grad()
def vocab_parallel_gather_logp(
    logits_TV: Logits,
    ids_TK: Tensor,
    *,
    vocab_size: int,
    group: ProcessGroup | None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """log softmax(logits / temperature) at ids [T, K], no gradient. All-reduces: max [T], sum [1 + K, T]."""
    columns = own_columns(logits_TV, vocab_size, group, temperature)
    local = read(logits_TV, columns, temperature, chunk, ids_TN=ids_TK)
    _, logp_TK, _ = normalise(local, ids_TK, vocab_size, group)
    return logp_TK


@torch.no_grad()
def vocab_parallel_topk(
    logits_TV: Logits,
    k: int,
    *,
    vocab_size: int,
    group: ProcessGroup | None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(logp [T, k], ids [T, k] int64), best first, equal logits by lowest id; no gradient.

    All-reduces: max [T], sum [1, T]. All-gather: k x TP x 8 bytes per token (fp32 value and int32 id in one
    call). Raises ValueError for k outside 1 .. vocab_size.
    """
    columns = own_columns(logits_TV, vocab_size, group, temperature)
    local = read(logits_TV, columns, temperature, chunk, k=_checked_k(k, vocab_size))
    log_z_T, _, _ = normalise(local, None, vocab_size, group)
    top_TK, ids_TK = gather_top(local.top_TK, local.top_ids_TK, group)
    return top_TK - log_z_T[:, None], ids_TK


@torch.no_grad()
def vocab_parallel_argmax(
    logits_TV: Logits, *, vocab_size: int, group: ProcessGroup | None, chunk: int | None = None
) -> Tensor:
    """The most probable id [T], int64, the lowest of equal ones. All-gather: TP x 8 bytes per token."""
    columns = own_columns(logits_TV, vocab_size, group, 1.0)
    local = read(logits_TV, columns, 1.0, chunk, k=1)
    return gather_top(local.top_TK, local.top_ids_TK, group)[1][:, 0]


def vocab_parallel_entropy(
    logits_TV: Tensor,
    *,
    vocab_size: int,
    group: ProcessGroup | None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Entropy of softmax(logits / temperature), nats, [T], with gradient into this rank's slice.

    All-reduces: max [T], sum [2, T]; none in backward, which recomputes the softmax chunk by chunk.
    """
    own_columns(logits_TV, vocab_size, group, temperature)
    return _Entropy.apply(logits_TV, vocab_size, group, temperature, chunk)


@torch.no_grad()
def vocab_parallel_scores(
    logits_TV: Logits,
    labels_T: Tensor,
    *,
    vocab_size: int,
    group: ProcessGroup | None,
    ids_TK: Tensor | None = None,
    k: int = 0,
    entropy: bool = False,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> VocabScores:
    """Labels, `ids_TK` [T, K], top-k (k > 0) and entropy from one pass over the logits, no gradient.

    All-reduces: max [T], sum [2 + K + entropy, T]. All-gather where k > 0: k x TP x 8 bytes per token.
    """
    columns = own_columns(logits_TV, vocab_size, group, temperature)
    all_ids_TN = labels_T[:, None] if ids_TK is None else torch.cat([labels_T[:, None], ids_TK], -1)
    num_top = _checked_k(k, vocab_size) if k else 0
    local = read(logits_TV, columns, temperature, chunk, ids_TN=all_ids_TN, k=num_top, entropy=entropy)
    log_z_T, logp_TN, entropy_T = normalise(local, all_ids_TN, vocab_size, group)
    top_TK = top_ids_TK = None
    if k:
        top_TK, top_ids_TK = gather_top(local.top_TK, local.top_ids_TK, group)
        top_TK = top_TK - log_z_T[:, None]
    return VocabScores(
        logp_T=logp_TN[:, 0],
        at_ids_TK=None if ids_TK is None else logp_TN[:, 1:],
        topk_logp_TK=top_TK,
        topk_ids_TK=top_ids_TK,
        entropy_T=entropy_T,
    )


class _Logp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids_TN, vocab_size, group, temperature, chunk, blocks, *tensors):
        logits_TV = joined(blocks, tensors)
        ctx.columns = own_columns(logits_TV, vocab_size, group, temperature)
        ctx.vocab_size, ctx.group, ctx.temperature, ctx.chunk = vocab_size, group, temperature, chunk
        ctx.blocks = blocks
        local = read(logits_TV, ctx.columns, temperature, chunk, ids_TN=ids_TN)
        log_z_T, logp_TN, _ = normalise(local, ids_TN, vocab_size, group)
        ctx.save_for_backward(ids_TN, log_z_T, *tensors)
        return logp_TN

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TN):
        """(sum one_hot(id) * grad - softmax * sum grad) / temperature; ids outside count for nothing."""
        ids_TN, log_z_T, *tensors = ctx.saved_tensors
        inside_TN = (ids_TN >= 0) & (ids_TN < ctx.vocab_size)
        grad_TN = torch.where(inside_TN, grad_TN, 0.0) / ctx.temperature

        def slope(rows, logits, columns):
            given = (ids_TN[rows], grad_TN[rows], log_z_T[rows], ctx.temperature, ctx.chunk)
            return logp_slope(logits, columns, *given)

        logits_TV = joined(ctx.blocks, tensors)
        return *[None] * 6, *gradients(logits_TV, ctx.columns, slope, ctx.group)


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV, vocab_size, group, temperature, chunk):
        ctx.columns = own_columns(logits_TV, vocab_size, group, temperature)
        ctx.temperature, ctx.chunk = temperature, chunk
        local = read(logits_TV, ctx.columns, temperature, chunk, entropy=True)
        log_z_T, _, entropy_T = normalise(local, None, vocab_size, group)
        ctx.save_for_backward(logits_TV, log_z_T, entropy_T)
        return entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T):
        """-softmax * (log softmax + entropy) * grad / temperature."""
        logits_TV, log_z_T, entropy_T = ctx.saved_tensors
        grad_T = grad_T / ctx.temperature
        kernels = dispatch.fused(logits_TV)
        if kernels is not None:
            args = (logits_TV, log_z_T, entropy_T, grad_T, ctx.columns.width, ctx.temperature)
            return kernels.entropy_backward(*args), None, None, None, None
        grad_logits_TV = torch.zeros_like(logits_TV)
        for rows in token_chunks(logits_TV, ctx.chunk):
            logp = scaled_rows(logits_TV[rows], ctx.columns, ctx.temperature) - log_z_T[rows, None]
            slope = (logp.clamp(min=LOGP_FLOOR) + entropy_T[rows, None]).mul_(logp.exp())
            grad_logits_TV[rows, : ctx.columns.width] = slope.mul_(-grad_T[rows, None])
        return grad_logits_TV, None, None, None, None


def _checked_k(k: int, vocab_size: int) -> int:
    if not 0 < k <= vocab_size:
        raise ValueError(f"k = {k}: must lie in 1 .. vocab_size = {vocab_size}. Lower rollout.top_k_logp.")
    return k
