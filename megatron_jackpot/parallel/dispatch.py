"""Which form of the vocabulary functions reads some logits: Triton's kernels or the torch reference."""

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fused(*logits: Tensor) -> ModuleType | None:
    """vocab_triton where all `logits` lie on CUDA in fp32, bf16 or fp16, rows contiguous; None: torch, by
    chunks.

    fp64 stays with torch, which keeps it fp64; so does a CUDA build of torch without triton.
    """
    if not all(x.is_cuda and x.dtype in FUSED_DTYPES and x.stride(-1) == 1 for x in logits):
        return None
    if not _have_triton():
        return None
    from megatron_jackpot.parallel import vocab_triton

    return vocab_triton


@cache
def _have_triton() -> bool:
    return find_spec("triton") is not None
