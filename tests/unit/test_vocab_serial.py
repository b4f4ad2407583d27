"""Vocabulary functions on one rank: against torch's softmax, by gradcheck, and for the memory they take."""

import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_jackpot.parallel.divergence import vocab_parallel_kl, vocab_parallel_overlap
from megatron_jackpot.parallel.reduce import make_sum_over, reduce_metrics
from megatron_jackpot.parallel.vocab import (
    vocab_parallel_argmax,
    vocab_parallel_entropy,
    vocab_parallel_gather_logp,
    vocab_parallel_logp,
    vocab_parallel_logp_at,
    vocab_parallel_scores,
)
from megatron_jackpot.parallel.vocab_spec import VocabSpec

T, PADDED, VOCAB, K = 37, 64, 50, 6
SERIAL = VocabSpec(VOCAB, None)


def make_logits(dtype=torch.float32, seed=0):
    """Logits whose padding columns are the largest of all: they must not matter."""
    generator = torch.Generator().manual_seed(seed)
    logits_TV = torch.randn(T, PADDED, generator=generator, dtype=torch.float64) * 3
    logits_TV[:, VOCAB:] = 50.0
    return logits_TV.to(dtype)


def make_ids(num=K):
    ids_TK = torch.randint(0, VOCAB, (T, num), generator=torch.Generator().manual_seed(1))
    ids_TK[::3, 0] = -1
    ids_TK[1::3, 1] = VOCAB + 2
    return ids_TK


def truth(logits_TV, temperature=1.0):
    return (logits_TV[:, :VOCAB].double() / temperature).log_softmax(-1)


def at(logp_TV, ids_TK):
    inside = (ids_TK >= 0) & (ids_TK < VOCAB)
    return logp_TV.gather(-1, ids_TK.clamp(0, VOCAB - 1)).masked_fill(~inside, -math.inf)


def top_k(logits_TV, k, vocab, **knobs):
    """(logp [T, k], ids [T, k]) of the k most probable ids."""
    scores = vocab_parallel_scores(
        logits_TV, torch.zeros(len(logits_TV), dtype=torch.int64), vocab, k=k, **knobs
    )
    return scores.topk_logp_TK, scores.topk_ids_TK


def assert_near(actual, wanted):
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 1, 5, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_function_agrees_with_log_softmax_over_the_true_vocabulary(dtype, temperature, chunk):
    logits_TV, ids_TK = make_logits(dtype), make_ids()
    want_TV = truth(logits_TV, temperature)
    vocab, each = VocabSpec(VOCAB, None, temperature), dict(chunk=chunk)
    assert_near(vocab_parallel_logp(logits_TV, ids_TK[:, 1], vocab, **each), at(want_TV, ids_TK)[:, 1])
    assert_near(vocab_parallel_gather_logp(logits_TV, ids_TK, vocab, **each), at(want_TV, ids_TK))
    assert_near(vocab_parallel_entropy(logits_TV, vocab, **each), -(want_TV.exp() * want_TV).sum(-1))
    logp_TK, top_ids_TK = top_k(logits_TV, K, vocab, **each)
    order = logits_TV[:, :VOCAB].float().sort(dim=-1, descending=True, stable=True).indices[:, :K]
    assert torch.equal(top_ids_TK, order)
    assert_near(logp_TK, want_TV.gather(-1, order))
    assert torch.equal(vocab_parallel_argmax(logits_TV, vocab, **each), order[:, 0])


def test_one_pass_gives_what_the_single_functions_give():
    logits_TV, ids_TK = make_logits(), make_ids()
    labels_T = ids_TK[:, 2]
    vocab = VocabSpec(VOCAB, None, 0.8)
    scores = vocab_parallel_scores(logits_TV, labels_T, vocab, ids_TK=ids_TK, k=K, entropy=True)
    assert torch.equal(scores.logp_T, vocab_parallel_logp(logits_TV, labels_T, vocab))
    assert torch.equal(scores.at_ids_TK, vocab_parallel_gather_logp(logits_TV, ids_TK, vocab))
    assert torch.equal(scores.entropy_T, vocab_parallel_entropy(logits_TV, vocab))
    bare = vocab_parallel_scores(logits_TV, labels_T, SERIAL)
    assert bare.at_ids_TK is bare.topk_logp_TK is bare.topk_ids_TK is bare.entropy_T is None


def test_equal_logits_come_in_order_of_id_zeros_of_either_sign_included():
    logits_TV = torch.zeros(3, VOCAB)
    logits_TV[0, ::2] = -0.0
    logits_TV[1, [7, 3, 40]] = 2.0
    logits_TV[2] = torch.tensor([1.0, -1.0] * 25)
    _, ids_TK = top_k(logits_TV, 5, SERIAL)
    assert ids_TK.tolist() == [[0, 1, 2, 3, 4], [3, 7, 40, 0, 1], [0, 2, 4, 6, 8]]


def test_fp64_logits_are_ordered_as_fp64():
    """One is larger by what fp32 cannot hold; equal ones still come in order of id."""
    logits_TV = torch.zeros(1, VOCAB, dtype=torch.float64)
    logits_TV[0, 30] = 1.0 + 1e-12
    logits_TV[0, [4, 9]] = 1.0
    logp_TK, ids_TK = top_k(logits_TV, 4, SERIAL)
    assert ids_TK.tolist() == [[30, 4, 9, 0]] and logp_TK.dtype == torch.float64


def test_k_up_to_the_whole_vocabulary_sums_to_one():
    logp_TK, ids_TK = top_k(make_logits(), VOCAB, SERIAL)
    assert_near(logp_TK.exp().sum(-1), torch.ones(T, dtype=torch.float64))
    assert (ids_TK.sort(-1).values == torch.arange(VOCAB)).all() and (logp_TK.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logp_passes_gradcheck(temperature):
    logits_TV = make_logits(torch.float64)[:6].requires_grad_()
    ids_T = torch.tensor([0, 3, 49, 17, 17, 8])
    vocab = VocabSpec(VOCAB, None, temperature)
    assert torch.autograd.gradcheck(lambda x: vocab_parallel_logp(x, ids_T, vocab, chunk=4), logits_TV)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_passes_gradcheck_and_a_vanishing_probability_has_no_gradient(temperature):
    logits_TV = make_logits(torch.float64)[:6].requires_grad_()
    vocab = VocabSpec(VOCAB, None, temperature)
    assert torch.autograd.gradcheck(lambda x: vocab_parallel_entropy(x, vocab, chunk=4), logits_TV)
    sharp_TV = make_logits()[:6].masked_fill(torch.arange(make_logits().shape[1]) == 3, -math.inf)
    sharp_TV.requires_grad_()
    vocab_parallel_entropy(sharp_TV, vocab, chunk=4).sum().backward()
    assert sharp_TV.grad.isfinite().all() and (sharp_TV.grad[:, 3] == 0).all()
    assert (sharp_TV.grad[:, VOCAB:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_that_of_log_softmax_zero_on_padding_and_in_the_dtype_of_the_logits(dtype):
    logits_TV = make_logits(dtype).requires_grad_()
    ids_T = make_ids()[:, 2]
    upstream_T = torch.linspace(-2, 2, T)
    vocab_parallel_logp(logits_TV, ids_T, VocabSpec(VOCAB, None, 0.7), chunk=5).backward(upstream_T)
    wide = logits_TV.detach().double().requires_grad_()
    (truth(wide, 0.7).gather(-1, ids_T[:, None])[:, 0] * upstream_T).sum().backward()
    assert logits_TV.grad.dtype == dtype
    tolerance = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(logits_TV.grad.double(), wide.grad, **tolerance)
    assert (logits_TV.grad[:, VOCAB:] == 0).all()


def test_an_id_outside_the_vocabulary_has_no_gradient_even_from_a_nan():
    logits_TV = make_logits().requires_grad_()
    ids_T = torch.full((T,), 3)
    ids_T[::2] = VOCAB + 1
    logp_T = vocab_parallel_logp(logits_TV, ids_T, SERIAL)
    assert (logp_T[::2] == -math.inf).all()
    logp_T.backward(torch.where(ids_T == 3, 1.0, math.nan))
    assert (
        (logits_TV.grad[::2] == 0).all()
        and logits_TV.grad.isfinite().all()
        and (logits_TV.grad[1] != 0).any()
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_left_as_they_were(dtype, temperature):
    logits_TV = make_logits(dtype).requires_grad_()
    before, version = logits_TV.detach().clone(), logits_TV._version
    vocab = VocabSpec(VOCAB, None, temperature)
    vocab_parallel_logp(logits_TV, make_ids()[:, 0], vocab).nan_to_num(neginf=0.0).sum().backward()
    vocab_parallel_scores(logits_TV, make_ids()[:, 2], vocab, ids_TK=make_ids(), k=K, entropy=True)
    assert torch.equal(logits_TV.detach(), before) and logits_TV._version == version


def test_logp_can_be_used_twice_and_backward_runs_on_each_use():
    logits_TV = make_logits().requires_grad_()
    ids_T = make_ids()[:, 2]
    logp_T = vocab_parallel_logp(logits_TV, ids_T, SERIAL)
    (once,) = torch.autograd.grad(logp_T.sum(), logits_TV, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * logp_T.sum(), logits_TV)
    torch.testing.assert_close(twice, 2 * once)


def test_views_as_megatron_hands_them_out_work():
    logits_T1V = make_logits()[:, None]
    sliced = torch.cat([logits_T1V, logits_T1V], -1)[:, 0, :PADDED]
    ids_T = make_ids()[:, 2]
    want = vocab_parallel_logp(make_logits(), ids_T, SERIAL)
    assert torch.equal(vocab_parallel_logp(sliced, ids_T, SERIAL), want)


def test_no_tokens_are_no_special_case():
    nothing = torch.zeros(0, PADDED, requires_grad=True)
    vocab_parallel_logp(nothing, torch.zeros(0, dtype=torch.int64), SERIAL).sum().backward()
    assert nothing.grad.shape == (0, PADDED)
    assert top_k(nothing, K, SERIAL)[1].shape == (0, K)


ALLOCATORS = ("new_empty", "new_zeros", "new_full", "empty_like")


class Allocations(TorchDispatchMode):
    """Bytes of storage that appear inside: each one, the peak alive at once; and what one op reads."""

    def __init__(self, *inputs):
        super().__init__()
        self.known = {StorageWeakRef(x.untyped_storage()).cdata for x in inputs}
        self.alive, self.largest, self.peak, self.read = {}, {}, 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        storages = {x.untyped_storage().data_ptr() for x in given}
        fresh = [x for x in made if x.untyped_storage().data_ptr() not in storages]
        if fresh and op.overloadpacket.__name__ not in ALLOCATORS:  # nor does a view read anything
            self.read = max([self.read, *(x.numel() for x in given)])
        for x in fresh:
            storage = x.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference.cdata not in self.known:
                self.alive[reference.cdata] = (reference, storage.nbytes())
                self.largest[reference.cdata] = storage.nbytes()
        self.alive = {key: pair for key, pair in self.alive.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def big(dtype, num_tokens=2048, vocab=4096):
    return torch.randn(num_tokens, vocab, generator=torch.Generator().manual_seed(0)).to(dtype)


DENSE = 2048 * 4096 * 4
"""Bytes of the fp32 [T, V] that must never exist."""

NO_GRAD = {
    "gather": lambda x, ids, vocab: vocab_parallel_gather_logp(x, ids, vocab, chunk=16),
    "argmax": lambda x, ids, vocab: vocab_parallel_argmax(x, vocab, chunk=16),
    "entropy": lambda x, ids, vocab: vocab_parallel_entropy(x, vocab, chunk=16),
    "top-k": lambda x, ids, vocab: vocab_parallel_scores(x, ids[:, 0], vocab, k=20, chunk=16),
    "scores": lambda x, ids, vocab: vocab_parallel_scores(
        x, ids[:, 0], vocab, ids_TK=ids, k=20, entropy=True, chunk=16
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NO_GRAD)
def test_scoring_never_holds_more_than_a_sixteenth_of_a_dense_fp32_copy(name, dtype):
    logits_TV = big(dtype)
    ids_TK = torch.randint(0, 4000, (2048, 20))
    with Allocations(logits_TV, ids_TK) as seen:
        NO_GRAD[name](logits_TV, ids_TK, VocabSpec(4000, None, 0.9))
    # Also [T, 20] results: 20 ids and log-probs per token are not [T, V].
    assert 0 < seen.peak <= DENSE / 16 and max(seen.largest.values()) <= DENSE / 64
    assert seen.read <= max(16 * 4096, 2048 * 41)  # no op reads, and so none may copy, the whole [T, V]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logp_with_gradient_holds_the_gradient_and_chunks(dtype):
    logits_TV = big(dtype).requires_grad_()
    ids_T = torch.randint(0, 4000, (2048,))
    gradient = logits_TV.numel() * logits_TV.element_size()
    with Allocations(logits_TV, ids_T) as forward:
        loss = vocab_parallel_logp(logits_TV, ids_T, VocabSpec(4000, None, 0.9), chunk=16).sum()
    with Allocations(logits_TV, ids_T) as backward:
        (grad_TV,) = torch.autograd.grad(loss, logits_TV)
    assert forward.peak <= DENSE / 32 and forward.read <= 16 * 4096
    assert backward.peak - gradient <= DENSE / 32 and backward.read <= 16 * 4096
    assert sorted(backward.largest.values())[-2:][0] <= DENSE / 128  # one large storage: the gradient itself
    assert grad_TV.dtype == dtype


def test_the_counter_does_see_a_dense_copy():
    logits_TV = big(torch.bfloat16)
    with Allocations(logits_TV) as seen:
        logits_TV.float().logsumexp(-1)
    assert seen.peak >= DENSE and seen.read == 2048 * 4096


def test_the_default_chunk_holds_at_most_8_mb_of_fp32_on_a_cpu():
    logits_TV = big(torch.bfloat16, num_tokens=1024, vocab=8192)
    with Allocations(logits_TV) as seen:
        vocab_parallel_entropy(logits_TV, VocabSpec(8192, None))
    assert max(seen.largest.values()) <= 8 * 2**20


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(size=0), "VocabSpec.size = 0: must be >= 1"),
        (dict(temperature=0.0), "VocabSpec.temperature = 0.0: must be a finite number > 0"),
        (dict(temperature=-1.0), "VocabSpec.temperature = -1.0: must be a finite number > 0"),
        (dict(temperature=math.inf), "VocabSpec.temperature = inf: must be a finite number > 0"),
        (dict(temperature=math.nan), "VocabSpec.temperature = nan: must be a finite number > 0"),
    ],
)
def test_a_vocabulary_that_no_softmax_can_have_is_named_with_its_rule(knobs, message):
    with pytest.raises(ValueError) as caught:
        VocabSpec(**{"size": VOCAB, "group": None, **knobs})
    assert str(caught.value).startswith(message)


def test_every_function_refuses_a_vocabulary_that_is_wider_than_the_logits():
    logits_TV, wide = make_logits(), VocabSpec(PADDED + 1, None)
    for call in (
        lambda: vocab_parallel_logp(logits_TV, make_ids()[:, 0], wide),
        lambda: vocab_parallel_logp_at(logits_TV, make_ids(), wide),
        lambda: vocab_parallel_gather_logp(logits_TV, make_ids(), wide),
        lambda: vocab_parallel_argmax(logits_TV, wide),
        lambda: vocab_parallel_entropy(logits_TV, wide),
        lambda: vocab_parallel_scores(logits_TV, make_ids()[:, 0], wide),
        lambda: vocab_parallel_overlap(logits_TV, logits_TV, wide, lam=1.0),
        lambda: vocab_parallel_kl(logits_TV, logits_TV, wide, direction="forward"),
    ):
        with pytest.raises(
            ValueError, match="VocabSpec.size = 65: must be at most 64, the columns of 1 logit"
        ):
            call()


@pytest.mark.parametrize("k", [-1, VOCAB + 1])
def test_k_outside_the_vocabulary_is_an_error(k):
    with pytest.raises(ValueError, match=f"k = {k}: must lie in 0 .. 50"):
        top_k(make_logits(), k, SERIAL)


def test_one_rank_reductions_divide_once_and_leave_out_empty_metrics():
    given = torch.ones(3)
    total = make_sum_over(None)(given)
    assert total.dtype == torch.float64 and torch.equal(given, torch.ones(3)) and total.tolist() == [1, 1, 1]
    pairs = {"b": (3.0, 4.0), "a": (1.0, 8.0), "empty": (0.0, 0.0)}
    metrics = {name: tuple(map(torch.tensor, pair)) for name, pair in pairs.items()}
    assert reduce_metrics(metrics, None) == {"a": 0.125, "b": 0.75}
