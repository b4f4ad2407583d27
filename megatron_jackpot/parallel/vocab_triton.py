"""What vocab.py and divergence.py read from a slice of logits, by Triton kernels: one program per token.

Shapes and columns as in vocab.py. Nothing of the size of the logits is allocated but a gradient; the top-k
pass keeps the largest logit of every group of 64 columns, 1/64 of the slice in fp32. Under
TRITON_INTERPRET=1, set before the first import, the same kernels run on the CPU.
"""

import torch
import triton
from torch import Tensor

from megatron_jackpot.parallel import vocab_kernels as kernels
from megatron_jackpot.parallel import vocab_kernels_pair as pair_kernels

GROUP = 64
"""Columns that share one maximum in the top-k pass."""
READ_BLOCK = 2048
"""Columns in flight per program that follows a running maximum: 8 per thread, 16 bytes of bf16."""
LARGEST_BLOCK = 4096
"""Columns in flight per program that knows its normaliser."""
NUM_WARPS = 8


def read(
    logits_TV: Tensor,
    first: int,
    width: int,
    temperature: float,
    *,
    ids_TN: Tensor | None = None,
    k: int = 0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | tuple[None, None], Tensor | None]:
    """(logsumexp [T], logits at ids [T, N], top-k values and ids [T, k], entropy [T]), as vocab.py reads
    them."""
    num_tokens, num_groups = logits_TV.shape[0], triton.cdiv(width, GROUP)
    lse_T, entropy_T = _fp32(logits_TV, num_tokens), _fp32(logits_TV, num_tokens if entropy else 0)
    num_ids = 0 if ids_TN is None else ids_TN.shape[1]
    picked_TN = _fp32(logits_TV, num_tokens, num_ids)
    peak_TG = _fp32(logits_TV, num_tokens, num_groups if k else 0)
    if num_tokens:
        kernels.read_kernel[(num_tokens,)](
            logits_TV,
            logits_TV.stride(0),
            lse_T if ids_TN is None else ids_TN.contiguous(),
            lse_T,
            picked_TN,
            entropy_T,
            peak_TG,
            first,
            width,
            logits_TV.shape[1],
            num_ids,
            num_groups,
            1 / temperature,
            HAS_IDS=num_ids > 0,
            ENTROPY=entropy,
            GROUPS=k > 0,
            BLOCK_N=triton.next_power_of_2(max(num_ids, 1)),
            GROUP=GROUP,
            **_tile(width, logits_TV),
            num_warps=NUM_WARPS,
        )
    top = _top_of_groups(logits_TV, peak_TG, k, first, width, temperature) if k else (None, None)
    return lse_T, None if ids_TN is None else picked_TN, top, entropy_T if entropy else None


def logp_backward(
    logits_TV: Tensor,
    ids_TN: Tensor,
    grad_TN: Tensor,
    log_z_T: Tensor,
    first: int,
    width: int,
    temperature: float,
) -> Tensor:
    """sum one_hot(id) * grad - softmax * sum grad, [T, V/TP]; `grad_TN` is 0 at ids that count for
    nothing."""
    scale_T = -grad_TN.sum(-1)
    grad_logits_TV = _softmax_grad(logits_TV, log_z_T, scale_T, None, width, temperature)
    num_tokens, num_ids = ids_TN.shape
    if num_tokens and num_ids:
        kernels.ids_grad_kernel[(num_tokens,)](
            logits_TV,
            logits_TV.stride(0),
            grad_logits_TV,
            grad_logits_TV.stride(0),
            ids_TN.contiguous(),
            grad_TN.contiguous(),
            log_z_T,
            scale_T,
            first,
            width,
            num_ids,
            1 / temperature,
            BLOCK_N=triton.next_power_of_2(num_ids),
            num_warps=1,
        )
    return grad_logits_TV


def entropy_backward(
    logits_TV: Tensor, log_z_T: Tensor, entropy_T: Tensor, grad_T: Tensor, width: int, temperature: float
) -> Tensor:
    """-softmax * (log softmax + entropy) * grad, [T, V/TP]."""
    return _softmax_grad(logits_TV, log_z_T, -grad_T, entropy_T, width, temperature)


def pair_lse(first_TV: Tensor, second_TV: Tensor, width: int, temperature: float) -> tuple[Tensor, Tensor]:
    """(logsumexp of the first, of the second), [T]."""
    return _pair(first_TV, second_TV, width, temperature, kl=False)[:2]


def pair_kl(
    first_TV: Tensor, second_TV: Tensor, width: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(logsumexp of the first, of the second, KL(first || second) within the slice), [T]."""
    return _pair(first_TV, second_TV, width, temperature, kl=True)


def overlap(
    first_TV: Tensor,
    second_TV: Tensor,
    first_log_z_T: Tensor,
    second_log_z_T: Tensor,
    width: int,
    temperature: float,
) -> Tensor:
    """sum over the slice of min(exp(first - its log Z), exp(second - its log Z)), [T]."""
    overlap_T = _fp32(first_TV, first_TV.shape[0])
    if overlap_T.numel():
        pair_kernels.overlap_kernel[(overlap_T.shape[0],)](
            first_TV,
            first_TV.stride(0),
            second_TV,
            second_TV.stride(0),
            first_log_z_T,
            second_log_z_T,
            overlap_T,
            width,
            first_TV.shape[1],
            1 / temperature,
            BLOCK_V=_block(width),
            num_warps=NUM_WARPS,
        )
    return overlap_T


def kl_backward(
    student_TV: Tensor,
    teacher_TV: Tensor,
    log_z_2T: tuple[Tensor, Tensor],
    kl_T: Tensor,
    grad_T: Tensor,
    width: int,
    temperature: float,
    *,
    forward_kl: bool,
    out_TV: Tensor,
) -> None:
    """The gradient of a KL with respect to the student's logits over the temperature, into `out_TV`."""
    num_tokens, per_rank = student_TV.shape
    block = _block(per_rank)
    if num_tokens:
        pair_kernels.kl_grad_kernel[(num_tokens, triton.cdiv(per_rank, block))](
            student_TV,
            student_TV.stride(0),
            teacher_TV,
            teacher_TV.stride(0),
            out_TV,
            out_TV.stride(0),
            *log_z_2T,
            kl_T,
            grad_T,
            width,
            per_rank,
            1 / temperature,
            FORWARD=forward_kl,
            BLOCK_V=block,
            num_warps=NUM_WARPS,
        )


def _softmax_grad(
    logits_TV: Tensor,
    log_z_T: Tensor,
    scale_T: Tensor,
    entropy_T: Tensor | None,
    width: int,
    temperature: float,
) -> Tensor:
    num_tokens, per_rank = logits_TV.shape
    grad_TV = torch.empty_like(logits_TV, memory_format=torch.contiguous_format)
    block = _block(per_rank)
    if num_tokens:
        kernels.softmax_grad_kernel[(num_tokens, triton.cdiv(per_rank, block))](
            logits_TV,
            logits_TV.stride(0),
            grad_TV,
            grad_TV.stride(0),
            log_z_T,
            scale_T.contiguous(),
            log_z_T if entropy_T is None else entropy_T,
            width,
            per_rank,
            1 / temperature,
            ENTROPY=entropy_T is not None,
            BLOCK_V=block,
            num_warps=NUM_WARPS,
        )
    return grad_TV


def _pair(
    first_TV: Tensor, second_TV: Tensor, width: int, temperature: float, *, kl: bool
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens = first_TV.shape[0]
    lse_first_T, lse_second_T = _fp32(first_TV, num_tokens), _fp32(first_TV, num_tokens)
    kl_T = _fp32(first_TV, num_tokens if kl else 0)
    if num_tokens:
        pair_kernels.pair_kernel[(num_tokens,)](
            first_TV,
            first_TV.stride(0),
            second_TV,
            second_TV.stride(0),
            lse_first_T,
            lse_second_T,
            kl_T,
            width,
            first_TV.shape[1],
            1 / temperature,
            KL=kl,
            **_tile(width, first_TV),
            num_warps=NUM_WARPS,
        )
    return lse_first_T, lse_second_T, kl_T


def _top_of_groups(
    logits_TV: Tensor, peak_TG: Tensor, k: int, first: int, width: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """The k best of a slice, [T, k], from the maximum of every group."""
    num_tokens, num_groups = peak_TG.shape
    top_TK = _fp32(logits_TV, num_tokens, k)
    top_ids_TK = torch.empty(num_tokens, k, dtype=torch.int32, device=logits_TV.device)
    if num_tokens:
        kernels.top_kernel[(num_tokens,)](
            logits_TV,
            logits_TV.stride(0),
            peak_TG,
            top_TK,
            top_ids_TK,
            first,
            width,
            num_groups,
            k,
            1 / temperature,
            GROUP=GROUP,
            CHUNKS=triton.next_power_of_2(max(1, triton.cdiv(num_groups, 8 * GROUP))),
            BLOCK_K=triton.next_power_of_2(k),
            num_warps=1,
        )
    return top_TK, top_ids_TK


def _block(columns: int) -> int:
    return min(LARGEST_BLOCK, max(GROUP, triton.next_power_of_2(max(columns, 1))))


def _tile(columns: int, like: Tensor) -> dict[str, int]:
    """ROWS, LANES and EACH of a block: 16 bytes side by side, one lane per thread."""
    block, each = min(READ_BLOCK, _block(columns)), 16 // like.element_size()
    lanes = min(32 * NUM_WARPS, block // each)
    return dict(ROWS=block // (lanes * each), LANES=lanes, EACH=each)


def _fp32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)
