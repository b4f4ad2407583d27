"""Log-probs, top-k, argmax and entropy from logits whose vocabulary is split over tensor-parallel ranks.

Shapes: T tokens, V the padded vocabulary, logits_TV this rank's equal slice [T, V / TP] in any float dtype,
or the factors it is made of (linear.py), N and K ids per token, k top entries. Every function takes a
VocabSpec (vocab_spec.py). Columns at or beyond its size are padding and belong to no softmax; an id outside
0 .. size - 1 has log-prob -inf. Logits are read in chunks of tokens, in fp32 (fp64 stays), so that no
second [T, V] exists; they are never modified. On CUDA Triton's kernels read them in one pass instead
(dispatch.py); `chunk` is then without effect. Gradient "into the logits" goes into both factors where they
are factors; backward then makes the logits once more, by blocks, and all-reduces sum [T, H].
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_jackpot.parallel.linear import Logits, factors, gradients, joined, read
from megatron_jackpot.parallel.slices import entropy_slope, logp_slope, normalise
from megatron_jackpot.parallel.topk import gather_top
from megatron_jackpot.parallel.vocab_spec import VocabSpec


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
    vocab: VocabSpec,
    *,
    chunk: int | None = None,
) -> Tensor:
    """log softmax(logits / temperature)[ids], [T], with gradient into this rank's slice.

    All-reduces: max [T], sum [2, T]; none in backward, which recomputes the softmax chunk by chunk (`chunk`
    tokens; default: by memory). Raises ValueError for a vocabulary wider than the slices.
    """
    blocks, tensors = factors(logits_TV)
    return _Logp.apply(ids_T[:, None], vocab, chunk, blocks, *tensors)[:, 0]


def vocab_parallel_logp_at(
    logits_TV: Logits,
    ids_TK: Tensor,
    vocab: VocabSpec,
    *,
    chunk: int | None = None,
) -> Tensor:
    """log softmax(logits / temperature) at ids [T, K], with gradient into this rank's slice.

    An id of -1 has log-prob -inf and no gradient; an id may occur twice. All-reduces: max [T], sum
    [1 + K, T]; none in backward. Raises ValueError for a vocabulary wider than the slices.
    """
    blocks, tensors = factors(logits_TV)
    return _Logp.apply(ids_TK, vocab, chunk, blocks, *tensors)


@torch.no_grad()
def vocab_parallel_gather_logp(
    logits_TV: Logits,
    ids_TK: Tensor,
    vocab: VocabSpec,
    *,
    chunk: int | None = None,
) -> Tensor:
    """log softmax(logits / temperature) at ids [T, K], no gradient. All-reduces: max [T], sum [1 + K, T]."""
    local = read(logits_TV, vocab, chunk, ids_TN=ids_TK)
    _, logp_TK, _ = normalise(local, ids_TK, vocab)
    assert logp_TK is not None, "it was asked at ids"
    return logp_TK


@torch.no_grad()
def vocab_parallel_argmax(logits_TV: Logits, vocab: VocabSpec, *, chunk: int | None = None) -> Tensor:
    """The most probable id [T], int64, the lowest of equal ones. All-gather: TP x 8 bytes per token."""
    # Not divided: rounding could make two logits equal, and the lower id would win.
    local = read(logits_TV, replace(vocab, temperature=1.0), chunk, k=1)
    return gather_top(local.top_TK, local.top_ids_TK, vocab.group)[1][:, 0]


def vocab_parallel_entropy(
    logits_TV: Logits,
    vocab: VocabSpec,
    *,
    chunk: int | None = None,
) -> Tensor:
    """Entropy of softmax(logits / temperature), nats, [T], with gradient into this rank's slice.

    All-reduces: max [T], sum [2, T]; none in backward, which recomputes the softmax chunk by chunk.
    """
    blocks, tensors = factors(logits_TV)
    return _Entropy.apply(vocab, chunk, blocks, *tensors)


@torch.no_grad()
def vocab_parallel_scores(
    logits_TV: Logits,
    labels_T: Tensor,
    vocab: VocabSpec,
    *,
    ids_TK: Tensor | None = None,
    k: int = 0,
    entropy: bool = False,
    chunk: int | None = None,
) -> VocabScores:
    """Labels, `ids_TK` [T, K], top-k (k > 0) and entropy from one pass over the logits, no gradient.

    All-reduces: max [T], sum [2 + K + entropy, T]. All-gather where k > 0: k x TP x 8 bytes per token
    (fp32 value and int32 id in one call). Raises ValueError for k outside 0 .. the vocabulary's size.
    """
    if not 0 <= k <= vocab.size:
        raise ValueError(
            f"k = {k}: must lie in 0 .. {vocab.size}, the size of the vocabulary. Lower "
            "algorithm.num_candidates."
        )
    all_ids_TN = labels_T[:, None] if ids_TK is None else torch.cat([labels_T[:, None], ids_TK], -1)
    local = read(logits_TV, vocab, chunk, ids_TN=all_ids_TN, k=k, entropy=entropy)
    log_z_T, logp_TN, entropy_T = normalise(local, all_ids_TN, vocab)
    top_TK = top_ids_TK = None
    if k:
        top_TK, top_ids_TK = gather_top(local.top_TK, local.top_ids_TK, vocab.group)
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
    def forward(ctx, ids_TN, vocab, chunk, blocks, *tensors):
        ctx.vocab, ctx.chunk, ctx.blocks = vocab, chunk, blocks
        local = read(joined(blocks, tensors), vocab, chunk, ids_TN=ids_TN)
        log_z_T, logp_TN, _ = normalise(local, ids_TN, vocab)
        ctx.save_for_backward(ids_TN, log_z_T, *tensors)
        return logp_TN

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TN):
        """(sum one_hot(id) * grad - softmax * sum grad) / temperature; ids outside count for nothing."""
        ids_TN, log_z_T, *tensors = ctx.saved_tensors
        temperature = ctx.vocab.temperature
        inside_TN = (ids_TN >= 0) & (ids_TN < ctx.vocab.size)
        grad_TN = torch.where(inside_TN, grad_TN, 0.0) / temperature

        def slope(rows, logits, columns):
            given = (ids_TN[rows], grad_TN[rows], log_z_T[rows], temperature, ctx.chunk)
            return logp_slope(logits, columns, *given)

        return *[None] * 4, *gradients(joined(ctx.blocks, tensors), ctx.vocab, slope)


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vocab, chunk, blocks, *tensors):
        ctx.vocab, ctx.chunk, ctx.blocks = vocab, chunk, blocks
        local = read(joined(blocks, tensors), vocab, chunk, entropy=True)
        log_z_T, _, entropy_T = normalise(local, None, vocab)
        ctx.save_for_backward(log_z_T, entropy_T, *tensors)
        return entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T):
        """-softmax * (log softmax + entropy) * grad / temperature."""
        log_z_T, entropy_T, *tensors = ctx.saved_tensors
        temperature = ctx.vocab.temperature
        grad_T = grad_T / temperature

        def slope(rows, logits, columns):
            given = (log_z_T[rows], entropy_T[rows], grad_T[rows], temperature, ctx.chunk)
            return entropy_slope(logits, columns, *given)

        return *[None] * 3, *gradients(joined(ctx.blocks, tensors), ctx.vocab, slope)
