"""Overlap and KL of two distributions whose logits are split over tensor-parallel ranks by vocabulary.

Shapes and arguments as in vocab.py: T tokens, logits [T, V/TP], padding columns belong to no softmax,
the temperature divides both models' logits. The first may be given by its factors (linear.py). The other may
be a function from a slice of tokens to their logits: it is called chunk by chunk, without gradient, for the
same slices on every rank, so that its [T, V] never exists. The first sets the precision: fp64 or else fp32.
NaN logits make NaN results.
On CUDA Triton's kernels read both logits (dispatch.py), all tokens at once where both are tensors.
"""

import math
from collections.abc import Callable, Iterator
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_jackpot.algorithm.obrs import check_lam, overlap_limit
from megatron_jackpot.parallel import dispatch
from megatron_jackpot.parallel.linear import Logits, factors, gradients, joined
from megatron_jackpot.parallel.slices import all_reduce, chunk_tokens, cut, scaled_rows
from megatron_jackpot.parallel.vocab_spec import Columns, VocabSpec
from megatron_jackpot.records import Direction

Other = Tensor | Callable[[slice], Tensor]
"""Logits [T, V/TP], or what computes those of a slice of tokens, the same ones at every call."""

FUSED_ELEMENTS = 2**27
"""Logits that a function is asked for at a time where kernels read them: 256 MB in bf16."""


@torch.no_grad()
def vocab_parallel_overlap(
    target_logits: Other,
    server_logits: Logits,
    vocab: VocabSpec,
    *,
    lam: float,
    chunk: int | None = None,
) -> Tensor:
    """Z = sum over the vocabulary of min(q, p_target / lam), [T], at most min(1, 1/lam); no gradient.

    All-reduces: max [2, T], sum [2, T], sum [T]. Reads both logits twice: a function is called twice per
    chunk. Raises ValueError for a bad lam, a vocabulary wider than the slices, and slices of different width.
    """
    check_lam(lam)
    pair = _Pair(server_logits, target_logits, vocab, chunk)
    # Two passes: the smaller of two probabilities is not known before both are normalised.
    lse_2T = pair.per_token(2)
    for rows, server, target in pair:
        lse_2T[0, rows], lse_2T[1, rows] = pair.lse(server, target)
    peak_2T = all_reduce(lse_2T.clone(), dist.ReduceOp.MAX, vocab.group)
    log_z_2T = peak_2T + all_reduce((lse_2T - peak_2T).exp_(), dist.ReduceOp.SUM, vocab.group).log_()
    # lam belongs to the normaliser: p / lam = exp(logit - log Z - log lam), at no cost per logit.
    log_z_2T[1] += math.log(lam)
    overlap_T = pair.per_token(1)[0]
    for rows, server, target in pair:
        overlap_T[rows] = pair.overlap(server, target, log_z_2T[:, rows])
    # Rounding may carry the sum over its bound, and Z is used as a probability.
    return all_reduce(overlap_T, dist.ReduceOp.SUM, vocab.group).clamp_(max=overlap_limit(lam))


def vocab_parallel_kl(
    student_logits_TV: Logits,
    teacher_logits: Other,
    vocab: VocabSpec,
    *,
    direction: Direction,
    chunk: int | None = None,
) -> Tensor:
    """KL over the vocabulary, [T], with gradient into the student's slice; the teacher is a constant.

    forward is KL(teacher || student), reverse KL(student || teacher); inf where the second has probability 0
    and the first has not. All-reduces: max [2, T], sum [3, T]; none in backward, which reads both logits once
    more and allocates the gradient [T, V/TP] in the student's dtype (from factors: of one block of tokens,
    and all-reduces sum [T, H]). A function is called once per chunk in forward and once in backward. Raises
    ValueError for an unknown direction, for a vocabulary wider than the slices, and for slices of different
    width.
    """
    if direction not in get_args(Direction):
        raise ValueError(
            f"direction = {direction!r}: must be 'forward' or 'reverse'. "
            "Use 'forward' for KL(teacher || student)."
        )
    if isinstance(teacher_logits, Tensor):
        teacher_logits = teacher_logits.detach()
    blocks, tensors = factors(student_logits_TV)
    return _KL.apply(teacher_logits, direction == "forward", vocab, chunk, blocks, *tensors)


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, teacher_logits, forward_kl, vocab, chunk, blocks, *tensors):
        ctx.forward_kl, ctx.vocab, ctx.chunk, ctx.blocks = forward_kl, vocab, chunk, blocks
        pair = _Pair(joined(blocks, tensors), teacher_logits, vocab, chunk)
        log_z_student_T, log_z_teacher_T, kl_T = _kl(pair, forward_kl)
        # A tensor is saved so that autograd notices when it is changed before backward.
        is_tensor = isinstance(teacher_logits, Tensor)
        ctx.teacher_logits = None if is_tensor else teacher_logits
        teacher_TV = teacher_logits if is_tensor else None
        ctx.save_for_backward(teacher_TV, log_z_student_T, log_z_teacher_T, kl_T, *tensors)
        return kl_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T):
        """forward: student - teacher; reverse: student * (log(student / teacher) - KL); then / temperature.

        Where a reverse KL is inf its gradient is NaN.
        """
        teacher_TV, log_z_student_T, log_z_teacher_T, kl_T, *tensors = ctx.saved_tensors
        student = joined(ctx.blocks, tensors)
        teacher = ctx.teacher_logits if teacher_TV is None else teacher_TV
        pair = _Pair(student, teacher, ctx.vocab, ctx.chunk)
        grad_T = grad_T / ctx.vocab.temperature
        log_z_2T = torch.stack([log_z_student_T, log_z_teacher_T])

        def slope(span: slice, logits: Tensor, columns: Columns) -> Tensor:
            out_TV = torch.empty_like(logits)
            for rows in pair.chunks(span):
                here = slice(rows.start - span.start, rows.stop - span.start)
                at_rows = (log_z_2T[:, rows], kl_T[rows], grad_T[rows], out_TV[here])
                pair.kl_grad(logits[here], pair.other(rows), *at_rows, forward_kl=ctx.forward_kl)
            return out_TV

        return *[None] * 5, *gradients(student, ctx.vocab, slope, wide=True)


def _kl(pair: "_Pair", forward_kl: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(log normaliser of the first, of the second, KL), each [T]. All-reduces: max [2, T], sum [3, T].

    By the chain rule, KL = sum over slices of w (KL within the slice + log(w / v)), w and v the probabilities
    of a slice: each logit meets the normaliser of its own slice, and a small KL is a sum of small terms.
    """
    lse_2T, within_T = pair.per_token(2), pair.per_token(1)[0]
    for rows, first, second in pair:
        lse_2T[0, rows], lse_2T[1, rows], within_T[rows] = pair.kl(first, second, forward_kl)
    peak_2T = all_reduce(lse_2T.clone(), dist.ReduceOp.MAX, pair.vocab.group)
    log_share_2T = lse_2T - peak_2T
    share_2T = log_share_2T.exp()
    w, v = (1, 0) if forward_kl else (0, 1)
    # Shares are still relative to the peak, so that normalisers and KL travel in one sum; a slice of padding
    # alone has share 0, and what is -inf or NaN there is not added.
    kl_T = _weighted(share_2T[w].clone(), within_T + log_share_2T[w] - log_share_2T[v])
    sums_3T = all_reduce(torch.cat([share_2T, kl_T[None]]), dist.ReduceOp.SUM, pair.vocab.group)
    log_sum_2T = sums_3T[:2].log()
    # Models that are equal to rounding would have a KL a little under 0.
    kl_T = (sums_3T[2] / sums_3T[w] - log_sum_2T[w] + log_sum_2T[v]).clamp_(min=0.0)
    log_z_2T = peak_2T + log_sum_2T
    return log_z_2T[0], log_z_2T[1], kl_T


class _Pair:
    """Two models' logits: iterating yields (rows, first, second), and what is read of them.

    The first is a tensor and knows the number of tokens.
    """

    def __init__(self, first_TV: Logits, second: Other, vocab: VocabSpec, chunk: int | None) -> None:
        self.columns = vocab.columns(first_TV.shape[-1])
        self.first_TV, self.second, self.vocab = first_TV, second, vocab
        self.dtype = torch.float64 if first_TV.dtype == torch.float64 else torch.float32
        if isinstance(second, Tensor):
            self._check(second, first_TV.shape[0])
        self.chunk = self._default_chunk() if chunk is None else chunk

    def _default_chunk(self) -> int:
        """Tokens read at a time; kernels read all of them where both models' logits exist."""
        first, (num_tokens, per_rank) = self.first_TV, self.first_TV.shape
        if dispatch.fused(first if isinstance(first, Tensor) else first.hidden_TH) is None:
            return chunk_tokens(per_rank, first.is_cuda)
        exist = isinstance(first, Tensor) and isinstance(self.second, Tensor)
        return max(1, num_tokens if exist else FUSED_ELEMENTS // per_rank)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for span in self.spans():
            first = self.first_TV[span]
            for rows in self.chunks(span):
                yield rows, first[rows.start - span.start : rows.stop - span.start], self.other(rows)

    def spans(self) -> Iterator[slice]:
        """Tokens whose first logits are made together: all where they exist."""
        if isinstance(self.first_TV, Tensor):
            yield slice(0, self.first_TV.shape[0])
        else:
            yield from self.first_TV.rows()

    def chunks(self, span: slice) -> Iterator[slice]:
        """The tokens that are read together."""
        return cut(span.start, span.stop, self.chunk)

    def other(self, rows: slice) -> Tensor:
        """The second logits of some tokens."""
        if isinstance(self.second, Tensor):
            return self.second[rows]
        return self._check(self.second(rows), rows.stop - rows.start)

    def per_token(self, num: int) -> Tensor:
        """Empty [num, T] in the precision of the results."""
        return self.first_TV.new_empty((num, self.first_TV.shape[0]), dtype=self.dtype)

    def lse(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """logsumexp of both slices."""
        kernels = dispatch.fused(first, second)
        if kernels is not None:
            return kernels.pair_lse(first, second, self.columns.width, self.vocab.temperature)
        return self._read(first).logsumexp(-1), self._read(second).logsumexp(-1)

    def overlap(self, first: Tensor, second: Tensor, log_z_2T: Tensor) -> Tensor:
        """sum over the slice of the smaller of exp(logit - log_z)."""
        kernels = dispatch.fused(first, second)
        if kernels is not None:
            return kernels.overlap(first, second, *log_z_2T, self.columns.width, self.vocab.temperature)
        # These subtractions make new memory (`_read` may be a view of the logits): from here on in place.
        first_logp = self._read(first) - log_z_2T[0, :, None]
        second_logp = self._read(second) - log_z_2T[1, :, None]
        # The smaller logarithm first: one exponential per pair instead of two.
        return torch.minimum(first_logp, second_logp, out=first_logp).exp_().sum(-1)

    def kl(self, first: Tensor, second: Tensor, forward_kl: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(logsumexp of the first, of the second, KL within the slice)."""
        kernels = dispatch.fused(first, second)
        if kernels is not None:
            pair = (second, first) if forward_kl else (first, second)
            *lse, within_T = kernels.pair_kl(*pair, self.columns.width, self.vocab.temperature)
            return *(lse[::-1] if forward_kl else lse), within_T
        first, second = self._read(first), self._read(second)
        first_lse_T, second_lse_T = first.logsumexp(-1), second.logsumexp(-1)
        # Each model's logits meet their own normaliser before they meet each other: offsets, which may be
        # large and differ, are gone by then, and where the mass lies the ratio is a difference of small
        # numbers.
        logp = first - _finite(first_lse_T[:, None])
        other_logp = second - _finite(second_lse_T[:, None])
        if forward_kl:
            logp, other_logp = other_logp, logp
        log_ratio = torch.sub(logp, other_logp, out=other_logp)
        return first_lse_T, second_lse_T, _weighted(logp.exp_(), log_ratio).sum(-1)

    def kl_grad(
        self,
        student: Tensor,
        teacher: Tensor,
        log_z_2T: Tensor,
        kl_T: Tensor,
        grad_T: Tensor,
        out_TV: Tensor,
        *,
        forward_kl: bool,
    ) -> None:
        """The gradient with respect to the student's logits over the temperature, into `out_TV`."""
        width = self.columns.width
        kernels = dispatch.fused(student, teacher)
        if kernels is not None:
            given = (student, teacher, tuple(log_z_2T), kl_T, grad_T.contiguous())
            where = (width, self.vocab.temperature)
            kernels.kl_backward(*given, *where, forward_kl=forward_kl, out_TV=out_TV)
            return
        # New memory, then in place, as in `overlap`. Normalisers of the whole vocabulary: no collective is
        # left.
        student_logp = self._read(student) - log_z_2T[0, :, None]
        teacher_logp = self._read(teacher) - log_z_2T[1, :, None]
        if forward_kl:
            slope = student_logp.exp_().sub_(teacher_logp.exp_())
        else:
            excess = torch.sub(student_logp, teacher_logp, out=teacher_logp).sub_(kl_T[:, None])
            slope = _weighted(student_logp.exp_(), excess)
        # Scaled in fp32 and rounded to the student's dtype once. `out_TV` comes uninitialised.
        out_TV[:, :width] = slope.mul_(grad_T[:, None])
        out_TV[:, width:] = 0

    def _read(self, logits: Tensor) -> Tensor:
        """The true columns over the temperature; may be a view of the logits."""
        return scaled_rows(logits, self.columns, self.vocab.temperature).to(self.dtype)

    def _check(self, logits: Tensor, num_tokens: int) -> Tensor:
        wanted = (num_tokens, self.first_TV.shape[1])
        if tuple(logits.shape) != wanted:
            raise ValueError(
                f"logits of shape {tuple(logits.shape)}: must have that of the other model, {wanted}. Pad "
                "both vocabularies to one size, so that a rank's slices hold the same ids."
            )
        return logits


def _weighted(prob: Tensor, value: Tensor) -> Tensor:
    """prob * value in place of prob, 0 where prob is 0 even if the value is not finite."""
    absent = prob == 0
    return prob.mul_(value).masked_fill_(absent, 0.0)


def _finite(lse: Tensor) -> Tensor:
    """0 in place of -inf: in a slice without probability every log-prob stays -inf instead of NaN."""
    return lse.masked_fill(lse == -float("inf"), 0.0)
