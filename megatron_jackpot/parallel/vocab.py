"""Log-probs, top-k, argmax and entropy from logits whose vocabulary is split over tensor-parallel ranks.

Shapes: T tokens, V the padded vocabulary, logits_TV this rank's equal slice [T, V / TP] in any float dtype, N
and K ids per token, k top entries. Every function takes its group; None is one rank. Columns at or beyond
`vocab_size` are padding and belong to no softmax; ids outside 0 .. vocab_size - 1 have log-prob -inf. Logits
are read in chunks of tokens, in fp32 (fp64 stays), so that no second [T, V] exists; they are never modified.
On CUDA Triton's kernels read them in one pass instead (dispatch.py); `chunk` is then without effect.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_jackpot.parallel import dispatch
from megatron_jackpot.parallel.topk import gather_top, local_top

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
    logits_TV: Tensor,
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
    return _Logp.apply(logits_TV, ids_T[:, None], vocab_size, group, temperature, chunk)[:, 0]


def vocab_parallel_logp_at(
    logits_TV: Tensor,
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
    return _Logp.apply(logits_TV, ids_TK, vocab_size, group, temperature, chunk)


@torch.no_grad()
def vocab_parallel_gather_logp(
    logits_TV: Tensor,
    ids_TK: Tensor,
    *,
    vocab_size: int,
    group: ProcessGroup | None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """log softmax(logits / temperature) at ids [T, K], no gradient. All-reduces: max [T], sum [1 + K, T]."""
    columns = own_columns(logits_TV, vocab_size, group, temperature)
    local = read_slice(logits_TV, columns, temperature, chunk, ids_TN=ids_TK)
    _, logp_TK, _ = normalise(local, ids_TK, vocab_size, group)
    return logp_TK


@torch.no_grad()
def vocab_parallel_topk(
    logits_TV: Tensor,
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
    local = read_slice(logits_TV, columns, temperature, chunk, k=_checked_k(k, vocab_size))
    log_z_T, _, _ = normalise(local, None, vocab_size, group)
    top_TK, ids_TK = gather_top(local.top_TK, local.top_ids_TK, group)
    return top_TK - log_z_T[:, None], ids_TK


@torch.no_grad()
def vocab_parallel_argmax(
    logits_TV: Tensor, *, vocab_size: int, group: ProcessGroup | None, chunk: int | None = None
) -> Tensor:
    """The most probable id [T], int64, the lowest of equal ones. All-gather: TP x 8 bytes per token."""
    columns = own_columns(logits_TV, vocab_size, group, 1.0)
    local = read_slice(logits_TV, columns, 1.0, chunk, k=1)
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
    logits_TV: Tensor,
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
    local = read_slice(logits_TV, columns, temperature, chunk, ids_TN=all_ids_TN, k=num_top, entropy=entropy)
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
    def forward(ctx, logits_TV, ids_TN, vocab_size, group, temperature, chunk):
        ctx.columns = own_columns(logits_TV, vocab_size, group, temperature)
        ctx.vocab_size, ctx.temperature, ctx.chunk = vocab_size, temperature, chunk
        local = read_slice(logits_TV, ctx.columns, temperature, chunk, ids_TN=ids_TN)
        log_z_T, logp_TN, _ = normalise(local, ids_TN, vocab_size, group)
        ctx.save_for_backward(logits_TV, ids_TN, log_z_T)
        return logp_TN

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TN):
        """(sum one_hot(id) * grad - softmax * sum grad) / temperature; ids outside count for nothing."""
        logits_TV, ids_TN, log_z_T = ctx.saved_tensors
        columns = ctx.columns
        inside_TN = (ids_TN >= 0) & (ids_TN < ctx.vocab_size)
        grad_TN = torch.where(inside_TN, grad_TN, 0.0) / ctx.temperature
        slope = logp_slope(logits_TV, columns, ids_TN, grad_TN, log_z_T, ctx.temperature, ctx.chunk)
        return slope, None, None, None, None, None


def logp_slope(
    logits_TV: Tensor,
    columns: "Columns",
    ids_TN: Tensor,
    grad_TN: Tensor,
    log_z_T: Tensor,
    temperature: float,
    chunk: int | None = None,
) -> Tensor:
    """sum one_hot(id) * grad - softmax * sum grad, in the dtype of the logits, 0 on padding; new memory."""
    kernels = dispatch.fused(logits_TV)
    if kernels is not None:
        place = (columns.first, columns.width, temperature)
        return kernels.logp_backward(logits_TV, ids_TN, grad_TN, log_z_T, *place)
    sum_T1 = grad_TN.sum(-1, keepdim=True)
    slope_TV = torch.empty_like(logits_TV)
    for rows in token_chunks(logits_TV, chunk):
        softmax = scaled_rows(logits_TV[rows], columns, temperature) - log_z_T[rows, None]
        softmax.exp_().mul_(-sum_T1[rows])
        if columns.width:
            local_id, owned = columns.locate(ids_TN[rows])
            softmax.scatter_add_(1, local_id, torch.where(owned, grad_TN[rows], 0.0))
        slope_TV[rows, : columns.width] = softmax
        slope_TV[rows, columns.width :] = 0
    return slope_TV


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV, vocab_size, group, temperature, chunk):
        ctx.columns = own_columns(logits_TV, vocab_size, group, temperature)
        ctx.temperature, ctx.chunk = temperature, chunk
        local = read_slice(logits_TV, ctx.columns, temperature, chunk, entropy=True)
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


@dataclass(frozen=True)
class Columns:
    """The true vocabulary in this rank's slice: its first `width` columns, ids from `first` on."""

    first: int
    width: int

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(column, owned): the column is valid to gather from even where the id is not owned."""
        column = ids - self.first
        owned = (column >= 0) & (column < self.width)
        return column.clamp(0, max(self.width - 1, 0)), owned


@dataclass(frozen=True)
class Local:
    """What this rank reads from its slice, before any communication."""

    lse_T: Tensor
    picked_TN: Tensor | None
    top_TK: Tensor | None
    top_ids_TK: Tensor | None
    entropy_T: Tensor | None


def own_columns(
    logits_TV: Tensor, vocab_size: int, group: ProcessGroup | None, temperature: float
) -> Columns:
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    per_rank = logits_TV.shape[-1]
    if not 0 < vocab_size <= per_rank * size:
        raise ValueError(
            f"vocab_size = {vocab_size}: must lie in 1 .. {per_rank * size}, the columns of {size} logit "
            f"slices of {per_rank}. Pass the vocabulary size of the model's config.json."
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"temperature = {temperature}: must be a finite number > 0. Use the sampling temperature."
        )
    first = rank * per_rank
    return Columns(first, min(max(vocab_size - first, 0), per_rank))


def _checked_k(k: int, vocab_size: int) -> int:
    if not 0 < k <= vocab_size:
        raise ValueError(f"k = {k}: must lie in 1 .. vocab_size = {vocab_size}. Lower rollout.top_k_logp.")
    return k


def token_chunks(logits_TV: Tensor, chunk: int | None) -> Iterator[slice]:
    """Slices of tokens. The default holds an fp32 chunk to 8 MB on CPU and 64 MB on CUDA."""
    num_tokens, per_rank = logits_TV.shape
    elements = 2**24 if logits_TV.is_cuda else 2**21
    chunk = chunk or max(1, elements // per_rank)
    for start in range(0, num_tokens, chunk):
        yield slice(start, min(start + chunk, num_tokens))


def scaled_rows(logits: Tensor, columns: Columns, temperature: float) -> Tensor:
    """The true columns divided by the temperature, at least fp32. Only here is anything divided by it.

    May be a view of the logits: not to be modified.
    """
    logits = logits[:, : columns.width]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if temperature == 1.0 else logits / temperature


def _allocate_top(logits_TV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (logits_TV.shape[0], k)
    return logits_TV.new_empty(shape, dtype=torch.float32), logits_TV.new_empty(shape, dtype=torch.int32)


def read_slice(
    logits_TV: Tensor,
    columns: Columns,
    temperature: float,
    chunk: int | None,
    *,
    ids_TN: Tensor | None = None,
    k: int = 0,
    entropy: bool = False,
) -> Local:
    """One pass over this rank's slice: logsumexp, logits at ids (0 where not owned), top-k, entropy."""
    kernels = dispatch.fused(logits_TV)
    if kernels is not None:
        asked = dict(ids_TN=ids_TN, k=k, entropy=entropy)
        lse_T, picked_TN, top, entropy_T = kernels.read(
            logits_TV, columns.first, columns.width, temperature, **asked
        )
        return Local(lse_T, picked_TN, *top, entropy_T)
    num_tokens = logits_TV.shape[0]
    dtype = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
    lse_T = logits_TV.new_empty(num_tokens, dtype=dtype)
    picked_TN = None if ids_TN is None else logits_TV.new_zeros(ids_TN.shape, dtype=dtype)
    top_TK, top_ids_TK = _allocate_top(logits_TV, k) if k else (None, None)
    entropy_T = torch.zeros_like(lse_T) if entropy else None
    for rows in token_chunks(logits_TV, chunk):
        scaled = scaled_rows(logits_TV[rows], columns, temperature)
        lse_T[rows] = scaled.logsumexp(-1)
        if ids_TN is not None and columns.width:
            column, owned = columns.locate(ids_TN[rows])
            picked_TN[rows] = torch.where(owned, scaled.gather(-1, column), 0.0)
        if k:
            top_TK[rows], top_ids_TK[rows] = local_top(scaled, k, columns.first)
        if entropy and columns.width:
            entropy_T[rows] = torch.special.entr((scaled - lse_T[rows, None]).exp_()).sum(-1)
    return Local(lse_T, picked_TN, top_TK, top_ids_TK, entropy_T)


def normalise(
    local: Local, ids_TN: Tensor | None, vocab_size: int, group: ProcessGroup | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(log normaliser [T], log-probs at ids [T, N], entropy [T]).

    All-reduces: max [T], sum [1 + N + entropy, T].

    Entropy by the chain rule: sum over slices of w (h - log w), w a slice's probability, h its entropy.
    """
    peak_T = all_reduce(local.lse_T.clone(), dist.ReduceOp.MAX, group)
    share_T = (local.lse_T - peak_T).exp()
    parts = [share_T[None]]
    if ids_TN is not None:
        parts.append(local.picked_TN.T)
    if local.entropy_T is not None:
        # A slice of padding alone has lse -inf and share 0.
        parts.append(torch.where(share_T > 0, share_T * (local.entropy_T - local.lse_T), 0.0)[None])
    sums = all_reduce(torch.cat(parts), dist.ReduceOp.SUM, group)
    log_z_T = peak_T + sums[0].log()
    logp_TN = entropy_T = None
    if ids_TN is not None:
        inside_TN = (ids_TN >= 0) & (ids_TN < vocab_size)
        logits_TN = sums[1 : 1 + ids_TN.shape[1]].T
        logp_TN = torch.where(inside_TN, logits_TN - log_z_T[:, None], -float("inf"))
    if local.entropy_T is not None:
        entropy_T = log_z_T + sums[-1] / sums[0]
    return log_z_T, logp_TN, entropy_T


def all_reduce(tensor: Tensor, op: dist.ReduceOp, group: ProcessGroup | None) -> Tensor:
    """In place; nothing on one rank."""
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor
