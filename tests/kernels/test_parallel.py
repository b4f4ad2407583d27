"""The kernels on slices of the vocabulary: two ranks together give what the torch form gives on one."""

import pytest
import torch
import torch.distributed as dist

from megatron_jackpot.parallel.divergence import vocab_parallel_kl, vocab_parallel_overlap
from megatron_jackpot.parallel.vocab_spec import VocabSpec
from tests.parallel.spawn import run_ranks
from tests.parallel.test_vocab import CASES, compute, inputs

FEW = {name: {**case, "tokens": min(case.get("tokens", 3), 3)} for name, case in CASES.items()}
"""The interpreter takes a millisecond for each of the k rounds of a token. Of three, the first has an absent
id, the second one beyond the vocabulary."""


def everything(case, group, rank, size, read="triton"):
    """All of vocab.py and divergence.py from one slice, read by the kernels or by torch."""
    from tests.kernels.forms import form

    logits_TV, _ = inputs(case)
    first = logits_TV.chunk(size, -1)[rank].contiguous()
    second = (logits_TV * 0.5 + 1).chunk(size, -1)[rank].contiguous()
    vocab = VocabSpec(case["vocab_size"], group, case["temperature"])
    with form(read):
        results, sent = compute(case, group, rank, size)
        results["overlap"] = vocab_parallel_overlap(second, first, vocab, lam=1.2)
        for direction in ("forward", "reverse"):
            leaf = first.detach().clone().requires_grad_()
            kl_T = vocab_parallel_kl(leaf, second, vocab, direction=direction)
            results[direction] = kl_T.detach()
            results[f"{direction} backward"] = torch.autograd.grad(kl_T.sum(), leaf)[0]
    return results, {name: counter.calls for name, counter in sent.items()}


def on_one_rank(rank, world):
    # A spawned child reads no conftest; the variable is looked up when the kernels are defined.
    import tests.kernels.conftest  # noqa: F401

    return {name: everything(case, dist.group.WORLD, rank, world) for name, case in FEW.items()}


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_two_ranks_give_what_torch_gives_on_one_and_send_what_the_torch_form_sends():
    ranks = run_ranks(on_one_rank, 2)
    for name, case in FEW.items():
        serial, _ = everything(case, None, 0, 1, "torch")
        tolerance = dict(rtol=1e-5, atol=1e-5)
        if case["dtype"] == torch.bfloat16:
            tolerance = dict(rtol=1e-2, atol=1e-3)
        for rank in ranks:
            results, calls = rank[name]
            for key in ("logp", "gather", "entropy", "overlap", "forward", "reverse"):
                torch.testing.assert_close(results[key], serial[key], rtol=1e-5, atol=1e-5)
            assert torch.equal(results["topk"]["topk_ids_TK"], serial["topk"]["topk_ids_TK"])
            assert torch.equal(results["argmax"], serial["argmax"])
            # Of no token there is no top-k to gather.
            assert (
                calls["scores"] == (3 if results["argmax"].numel() else 2)
                and calls["logp"] == 2
                and calls["backward alone"] == 0
            )
        for key in ("backward", "entropy backward", "forward backward", "reverse backward"):
            whole = torch.cat([rank[name][0][key] for rank in ranks], -1)
            torch.testing.assert_close(whole, serial[key], **tolerance)
