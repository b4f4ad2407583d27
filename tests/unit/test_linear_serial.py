"""Log-probs from hidden states and weight on one rank: against the dense form, by gradcheck, and for the
memory."""

import math

import pytest
import torch

from megatron_jackpot.parallel.divergence import vocab_parallel_kl, vocab_parallel_overlap
from megatron_jackpot.parallel.linear import Blocks, LinearLogits
from megatron_jackpot.parallel.vocab import (
    vocab_parallel_entropy,
    vocab_parallel_logp_at,
    vocab_parallel_scores,
)
from megatron_jackpot.parallel.vocab_spec import VocabSpec
from tests.unit.test_vocab_serial import Allocations

T, H, PADDED, VOCAB, K = 23, 12, 64, 50, 4
SERIAL = VocabSpec(VOCAB, None)
WARM = VocabSpec(VOCAB, None, 0.7)


def factors(dtype=torch.float64, num_tokens=T, hidden=H, padded=PADDED):
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(num_tokens, hidden, generator=generator, dtype=torch.float64)
    weight_VH = torch.randn(padded, hidden, generator=generator, dtype=torch.float64)
    weight_VH[VOCAB:] *= 10 if padded == PADDED else 1
    return hidden_TH.to(dtype).requires_grad_(), weight_VH.to(dtype).requires_grad_()


def logp_at(hidden_TH, weight_VH, ids_TK, vocab, *, tokens=None, columns=None):
    logits = LinearLogits(hidden_TH, weight_VH, Blocks(tokens, columns))
    return vocab_parallel_logp_at(logits, ids_TK, vocab)


def make_ids(num_tokens=T):
    ids_TK = torch.randint(0, VOCAB, (num_tokens, K), generator=torch.Generator().manual_seed(1))
    ids_TK[:, 3] = ids_TK[:, 2]
    ids_TK[::3, 0], ids_TK[1::3, 1] = -1, VOCAB + 3
    return ids_TK


def dense(hidden_TH, weight_VH, ids_TK, temperature):
    """log softmax over the true columns, at ids, by torch's own autograd."""
    logp_TV = (hidden_TH @ weight_VH[:VOCAB].T / temperature).log_softmax(-1)
    outside = (ids_TK < 0) | (ids_TK >= VOCAB)
    return logp_TV.gather(-1, ids_TK.masked_fill(outside, 0)).masked_fill(outside, -math.inf)


@pytest.mark.parametrize(("tokens", "columns"), [(None, None), (1, 1), (5, 7), (100, 50), (7, 16)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_both_gradients_are_those_of_the_dense_form(temperature, tokens, columns):
    hidden_TH, weight_VH = factors()
    ids_TK = make_ids()
    upstream_TK = torch.randn(T, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    vocab = VocabSpec(VOCAB, None, temperature)
    mine = logp_at(hidden_TH, weight_VH, ids_TK, vocab, tokens=tokens, columns=columns)
    theirs = dense(hidden_TH, weight_VH, ids_TK, temperature)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    inside = (ids_TK >= 0) & (ids_TK < VOCAB)
    wanted = torch.autograd.grad(theirs, (hidden_TH, weight_VH), upstream_TK * inside)
    # What arrives at an id that counts for nothing does not matter.
    given_TK = torch.where(inside, upstream_TK, math.nan)
    for actual, want in zip(torch.autograd.grad(mine, (hidden_TH, weight_VH), given_TK), wanted, strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-11, atol=1e-12)


def test_log_probs_and_entropy_pass_gradcheck_of_both_factors():
    both = factors(num_tokens=4, hidden=3)
    ids_TK = make_ids(4)[:, 2:]
    vocab = VocabSpec(VOCAB, None, 0.8)
    assert torch.autograd.gradcheck(lambda h, w: logp_at(h, w, ids_TK, vocab, tokens=3, columns=20), both)
    entropy = lambda h, w: vocab_parallel_entropy(LinearLogits(h, w, Blocks(3, 20)), WARM)  # noqa: E731
    assert torch.autograd.gradcheck(entropy, both)


@pytest.mark.parametrize(("tokens", "columns"), [(None, None), (5, 7), (100, 50)])
def test_the_entropy_of_factors_and_both_gradients_are_those_of_the_dense_form(tokens, columns):
    hidden_TH, weight_VH = factors()
    linear = LinearLogits(hidden_TH, weight_VH, Blocks(tokens, columns))
    logp_TV = (hidden_TH @ weight_VH[:VOCAB].T / 0.7).log_softmax(-1)
    upstream_T = torch.randn(T, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    results = [
        (entropy_T.detach(), *torch.autograd.grad(entropy_T, (hidden_TH, weight_VH), upstream_T))
        for entropy_T in (-(logp_TV.exp() * logp_TV).sum(-1), vocab_parallel_entropy(linear, WARM))
    ]
    for want, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_vocab_parallel_logp_on_the_output_layers_logits(dtype):
    hidden_TH, weight_VH = factors(dtype)
    ids_TK = make_ids()
    logits_TV = torch.nn.functional.linear(hidden_TH, weight_VH)
    theirs = vocab_parallel_logp_at(logits_TV, ids_TK, WARM)
    mine = logp_at(hidden_TH, weight_VH, ids_TK, WARM, tokens=4, columns=9)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-5)
    upstream_TK = torch.where((ids_TK >= 0) & (ids_TK < VOCAB), torch.linspace(-1, 1, K), 0.0)
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=4e-2)
    for factor in (hidden_TH, weight_VH):
        (actual,) = torch.autograd.grad(mine, factor, upstream_TK, retain_graph=True)
        (wanted,) = torch.autograd.grad(theirs, factor, upstream_TK, retain_graph=True)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, wanted, **tolerance)
    assert (torch.autograd.grad(mine, weight_VH, upstream_TK)[0][VOCAB:] == 0).all()


def test_logits_never_exist_and_the_peak_is_the_gradients_and_a_block():
    num_tokens, hidden, padded = 4096, 16, 8192
    hidden_TH, weight_VH = factors(torch.bfloat16, num_tokens, hidden, padded)
    ids_TK = make_ids(num_tokens)[:, 2:3]
    logits_bytes = num_tokens * padded * 2
    with Allocations(hidden_TH, weight_VH, ids_TK) as forward:
        logp = logp_at(hidden_TH, weight_VH, ids_TK, VocabSpec(8000, None), tokens=64, columns=512)
    with Allocations(hidden_TH, weight_VH, ids_TK) as backward:
        grads = torch.autograd.grad(logp.sum(), (hidden_TH, weight_VH))
    gradients = sum(grad.nbytes for grad in grads) + grads[0].numel() * 4
    assert 0 < forward.peak <= logits_bytes / 16
    assert backward.peak - gradients <= logits_bytes / 16
    assert max(forward.largest.values()) <= logits_bytes / 32
    with Allocations(hidden_TH, weight_VH, ids_TK) as whole:
        logits_TV = torch.nn.functional.linear(hidden_TH, weight_VH)
        at = vocab_parallel_logp_at(logits_TV, ids_TK, VocabSpec(8000, None))
        torch.autograd.grad(at.sum(), (hidden_TH, weight_VH))
    assert whole.peak >= 2 * logits_bytes  # the counter does see logits and their gradient


@pytest.mark.parametrize("tokens", [None, 1, 6])
def test_every_read_of_factors_is_that_of_the_logits_they_make(tokens):
    hidden_TH, weight_VH = factors(torch.float32)
    linear, ids_TK = LinearLogits(hidden_TH, weight_VH, Blocks(tokens)), make_ids()
    asked = dict(vocab=WARM, ids_TK=ids_TK, k=5, entropy=True)
    mine = vocab_parallel_scores(linear, ids_TK[:, 2], **asked)
    theirs = vocab_parallel_scores(linear[:].detach(), ids_TK[:, 2], **asked)
    assert torch.equal(mine.topk_ids_TK, theirs.topk_ids_TK)
    for name in ("logp_T", "at_ids_TK", "topk_logp_TK", "entropy_T"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-5, atol=1e-5)
    trained = vocab_parallel_logp_at(linear, ids_TK, WARM)
    assert torch.equal(trained, mine.at_ids_TK)  # bit for bit: training and scoring make the same blocks


@pytest.mark.parametrize("tokens", [None, 4])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_and_overlap_of_factors_are_those_of_the_logits_they_make(direction, tokens):
    hidden_TH, weight_VH = factors()
    other_TV = torch.randn(T, PADDED, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    upstream_T = torch.randn(T, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    linear = LinearLogits(hidden_TH, weight_VH, Blocks(tokens))
    results = []
    for student in (linear, linear[:]):
        for chunk, teacher in ((None, other_TV), (3, lambda rows: other_TV[rows])):
            kl_T = vocab_parallel_kl(student, teacher, WARM, direction=direction, chunk=chunk)
            grads = torch.autograd.grad(kl_T, (hidden_TH, weight_VH), upstream_T, retain_graph=True)
            results.append((kl_T.detach(), *grads))
    for result in results[:-1]:
        for actual, want in zip(result, results[-1], strict=True):
            torch.testing.assert_close(actual, want, rtol=1e-11, atol=1e-12)
    overlaps = [vocab_parallel_overlap(other_TV, x, WARM, lam=1.3) for x in (linear, linear[:].detach())]
    torch.testing.assert_close(*overlaps, rtol=1e-12, atol=1e-12)


def test_no_tokens_and_a_slice_of_padding_alone_are_no_special_case():
    hidden_TH, weight_VH = factors()
    nothing = logp_at(hidden_TH[:0], weight_VH, make_ids()[:0], SERIAL)
    (grad,) = torch.autograd.grad(nothing.sum(), weight_VH)
    assert nothing.shape == (0, K) and (grad == 0).all()


def test_factors_that_do_not_fit_are_named():
    hidden_TH, weight_VH = factors()
    with pytest.raises(ValueError, match=r"hidden states \(23, 12\) in torch.float64 and weight \(64, 11\)"):
        logp_at(hidden_TH, weight_VH[:, :11], make_ids(), SERIAL)
    with pytest.raises(ValueError, match="must agree in dtype"):
        logp_at(hidden_TH.float(), weight_VH, make_ids(), SERIAL)
    with pytest.raises(ValueError, match="VocabSpec.size = 65: must be at most 64"):
        logp_at(hidden_TH, weight_VH, make_ids(), VocabSpec(65, None))
