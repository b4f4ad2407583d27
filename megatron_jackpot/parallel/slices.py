"""What vocab.py, linear.py and divergence.py share: how a rank's slice of logits is read, and how the ranks'
results meet.

Shapes as in vocab.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_jackpot.parallel import dispatch
from megatron_jackpot.parallel.topk import local_top
from megatron_jackpot.parallel.vocab_spec import Columns, VocabSpec

LOGP_FLOOR = -1e30
"""Where a probability is 0 its logarithm is cut here, so that their product is 0."""


@dataclass(frozen=True)
class Local:
    """What this rank reads from its slice, before any communication."""

    lse_T: Tensor
    picked_TN: Tensor | None
    top_TK: Tensor | None
    top_ids_TK: Tensor | None
    entropy_T: Tensor | None


def logp_slope(
    logits_TV: Tensor,
    columns: Columns,
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


def entropy_slope(
    logits_TV: Tensor,
    columns: Columns,
    log_z_T: Tensor,
    entropy_T: Tensor,
    grad_T: Tensor,
    temperature: float,
    chunk: int | None = None,
) -> Tensor:
    """-softmax * (log softmax + entropy) * grad, in the dtype of the logits, 0 on padding; new memory."""
    kernels = dispatch.fused(logits_TV)
    if kernels is not None:
        args = (logits_TV, log_z_T, entropy_T, grad_T, columns.width, temperature)
        return kernels.entropy_backward(*args)
    slope_TV = torch.zeros_like(logits_TV)
    for rows in token_chunks(logits_TV, chunk):
        logp = scaled_rows(logits_TV[rows], columns, temperature) - log_z_T[rows, None]
        slope = (logp.clamp(min=LOGP_FLOOR) + entropy_T[rows, None]).mul_(logp.exp())
        slope_TV[rows, : columns.width] = slope.mul_(-grad_T[rows, None])
    return slope_TV


def token_chunks(logits_TV: Tensor, chunk: int | None) -> Iterator[slice]:
    """Slices of tokens, `chunk_tokens` of them by default."""
    num_tokens, per_rank = logits_TV.shape
    yield from cut(0, num_tokens, chunk or chunk_tokens(per_rank, logits_TV.is_cuda))


def chunk_tokens(per_rank: int, is_cuda: bool) -> int:
    """So many that their logits in fp32 hold 8 MB on CPU and 64 MB on CUDA."""
    return max(1, (2**24 if is_cuda else 2**21) // max(1, per_rank))


def cut(start: int, stop: int, each: int) -> Iterator[slice]:
    """start .. stop - 1 in pieces of at most `each`."""
    for first in range(start, stop, each):
        yield slice(first, min(first + each, stop))


def scaled_rows(logits: Tensor, columns: Columns, temperature: float) -> Tensor:
    """The true columns divided by the temperature, at least fp32. Only here is anything divided by it.

    May be a view of the logits: not to be modified.
    """
    logits = logits[:, : columns.width]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if temperature == 1.0 else logits / temperature


def _allocate_top(logits_TV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (logits_TV.shape[0], k)
    dtype = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
    return logits_TV.new_empty(shape, dtype=dtype), logits_TV.new_empty(shape, dtype=torch.int32)


def read_slice(
    logits_TV: Tensor,
    vocab: VocabSpec,
    chunk: int | None,
    *,
    ids_TN: Tensor | None = None,
    k: int = 0,
    entropy: bool = False,
) -> Local:
    """One pass over this rank's slice: logsumexp, logits at ids (0 where not owned), top-k, entropy."""
    columns, temperature = vocab.columns(logits_TV.shape[-1]), vocab.temperature
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
        if ids_TN is not None and picked_TN is not None and columns.width:
            column, owned = columns.locate(ids_TN[rows])
            picked_TN[rows] = torch.where(owned, scaled.gather(-1, column), 0.0)
        if top_TK is not None and top_ids_TK is not None:
            top_TK[rows], top_ids_TK[rows] = local_top(scaled, k, columns.first)
        if entropy_T is not None and columns.width:
            entropy_T[rows] = torch.special.entr((scaled - lse_T[rows, None]).exp_()).sum(-1)
    return Local(lse_T, picked_TN, top_TK, top_ids_TK, entropy_T)


def normalise(
    local: Local, ids_TN: Tensor | None, vocab: VocabSpec
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(log normaliser [T], log-probs at ids [T, N], entropy [T]).

    All-reduces: max [T], sum [1 + N + entropy, T].

    Entropy by the chain rule: sum over slices of w (h - log w), w a slice's probability, h its entropy.
    """
    peak_T = all_reduce(local.lse_T.clone(), dist.ReduceOp.MAX, vocab.group)
    share_T = (local.lse_T - peak_T).exp()
    parts = [share_T[None]]
    if local.picked_TN is not None:
        parts.append(local.picked_TN.T)
    if local.entropy_T is not None:
        # A slice of padding alone has lse -inf and share 0.
        parts.append(torch.where(share_T > 0, share_T * (local.entropy_T - local.lse_T), 0.0)[None])
    sums = all_reduce(torch.cat(parts), dist.ReduceOp.SUM, vocab.group)
    log_z_T = peak_T + sums[0].log()
    logp_TN = entropy_T = None
    if ids_TN is not None:
        inside_TN = (ids_TN >= 0) & (ids_TN < vocab.size)
        logits_TN = sums[1 : 1 + ids_TN.shape[1]].T
        logp_TN = torch.where(inside_TN, logits_TN - log_z_T[:, None], -float("inf"))
    if local.entropy_T is not None:
        entropy_T = log_z_T + sums[-1] / sums[0]
    return log_z_T, logp_TN, entropy_T


def all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType, group: ProcessGroup | None) -> Tensor:
    """In place; nothing on one rank."""
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor
