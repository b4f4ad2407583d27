"""Hidden states and a weight that is split over ranks: log-probs and both gradients are those of one rank."""

import pytest
import torch
import torch.distributed as dist

from megatron_jackpot.parallel.divergence import vocab_parallel_kl
from megatron_jackpot.parallel.linear import Blocks, LinearLogits
from megatron_jackpot.parallel.vocab import vocab_parallel_entropy, vocab_parallel_logp_at
from megatron_jackpot.parallel.vocab_spec import VocabSpec
from tests.parallel.spawn import run_ranks
from tests.parallel.test_vocab import Sent
from tests.unit.test_linear_serial import PADDED, H, K, T, dense, factors, make_ids

VOCABULARIES = (50, 20)
"""On 4 ranks of 16 columns: 2 true columns for the last one; none for two of them."""


def compute(vocab_size, group, rank, size):
    hidden_TH, weight_VH = factors()
    mine_VH = weight_VH.detach().chunk(size)[rank].clone().requires_grad_()
    ids_TK = make_ids() % vocab_size
    vocab = VocabSpec(vocab_size, group, 0.7)
    logits = LinearLogits(hidden_TH, mine_VH, Blocks(tokens=6, columns=7))
    with Sent() as forward:
        logp_TK = vocab_parallel_logp_at(logits, ids_TK, vocab)
    with Sent() as backward:
        grads = torch.autograd.grad(logp_TK, (hidden_TH, mine_VH), torch.ones_like(logp_TK) * 0.5)
    # The teacher: the same factors, turned around.
    teacher = LinearLogits(-hidden_TH.detach(), mine_VH.detach())
    kl_T = vocab_parallel_kl(logits, lambda rows: teacher[rows], vocab, direction="forward")
    kl = (kl_T.detach(), *torch.autograd.grad(kl_T.sum(), (hidden_TH, mine_VH)))
    # In the place of a KL: as it, one number per token of the whole vocabulary.
    entropy_T = vocab_parallel_entropy(logits, vocab)
    entropy = (entropy_T.detach(), *torch.autograd.grad(entropy_T.sum(), (hidden_TH, mine_VH)))
    return (
        logp_TK.detach(),
        *grads,
        [kl, entropy],
        (forward.all_reduce, forward.calls, backward.all_reduce, backward.calls),
    )


def on_one_rank(rank, world):
    return [compute(vocab_size, dist.group.WORLD, rank, world) for vocab_size in VOCABULARIES]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_every_rank_has_the_serial_log_probs_the_whole_hidden_gradient_and_its_slice_of_the_weights(world):
    ranks = run_ranks(on_one_rank, world)
    for index, vocab_size in enumerate(VOCABULARIES):
        logp_TK, grad_hidden, grad_weight, wide, _ = compute(vocab_size, None, 0, 1)
        for rank in ranks:
            torch.testing.assert_close(rank[index][0], logp_TK, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(rank[index][1], grad_hidden, rtol=1e-11, atol=1e-12)
            # fp64: max [T] and sum [1 + K, T] forward, sum [T, H] backward.
            for got, want in zip(rank[index][3], wide, strict=True):
                torch.testing.assert_close(got[:2], want[:2], rtol=1e-10, atol=1e-11)
            assert rank[index][4] == (T * (2 + K) * 8, 2, T * H * 8, 1)
        whole = torch.cat([rank[index][2] for rank in ranks])
        torch.testing.assert_close(whole, grad_weight, rtol=1e-11, atol=1e-12)
        assert whole.shape == (PADDED, H)
        for kind, want in enumerate(wide):
            whole = torch.cat([rank[index][3][kind][2] for rank in ranks])
            torch.testing.assert_close(whole, want[2], rtol=1e-10, atol=1e-11)
    hidden_TH, weight_VH = factors()
    wanted = dense(hidden_TH, weight_VH, make_ids() % 50, 0.7)
    torch.testing.assert_close(ranks[0][0][0], wanted.detach(), rtol=1e-12, atol=1e-12)
