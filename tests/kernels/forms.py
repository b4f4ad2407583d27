"""The two forms of the vocabulary functions, chosen by hand, and inputs that are hard on both."""

from contextlib import contextmanager
from unittest import mock

import torch

from megatron_jackpot.parallel import dispatch, vocab_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def takes(*logits):
    """dispatch.fused as on CUDA, for tensors on any device."""
    ours = all(x.dtype in dispatch.FUSED_DTYPES and x.stride(-1) == 1 for x in logits)
    return vocab_triton if ours else None


@contextmanager
def form(name, block=4096):
    """Within, logits are read by the kernels in blocks of `block` columns ("triton"), or by torch."""
    chosen = takes if name == "triton" else lambda *logits: None
    with (
        mock.patch.object(dispatch, "fused", chosen),
        mock.patch.multiple(
            vocab_triton, LARGEST_BLOCK=block, READ_BLOCK=min(block, vocab_triton.READ_BLOCK)
        ),
    ):
        yield


def make_logits(num_tokens, padded, vocab, dtype, seed, *, ties=False, holes=False):
    """Random logits with a large offset per row; padding is the largest of all; some rows of one value."""
    generator = torch.Generator().manual_seed(seed)
    logits_TV = torch.randn(num_tokens, padded, generator=generator) * 3
    logits_TV += torch.randn(num_tokens, 1, generator=generator) * 20
    if ties:
        logits_TV = logits_TV.round()
        logits_TV[0] = 0.0
        logits_TV[0, ::2] = -0.0
    if holes:
        logits_TV[torch.rand(num_tokens, padded, generator=generator) < 0.3] = -float("inf")
        logits_TV[:, vocab // 2] = 1.0
    logits_TV[:, vocab:] = 500.0
    return logits_TV.to(DEVICE, dtype)


def make_ids(num_tokens, num, vocab, seed):
    """Ids with absent ones, ids beyond the vocabulary, and one that occurs twice."""
    ids_TN = torch.randint(0, vocab, (num_tokens, num), generator=torch.Generator().manual_seed(seed))
    ids_TN[::3, 0] = -1
    ids_TN[1::3, -1] = vocab + 1
    ids_TN[:, num // 2] = ids_TN[:, num // 2 - 1]
    return ids_TN.to(DEVICE)
