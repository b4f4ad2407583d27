"""Triton's kernels, in its interpreter where there is no GPU, against the torch form and against fp64."""

import math
import random
from functools import partial

import pytest
import torch

from megatron_jackpot.parallel import dispatch
from megatron_jackpot.parallel.divergence import vocab_parallel_kl, vocab_parallel_overlap
from megatron_jackpot.parallel.vocab import (
    vocab_parallel_argmax,
    vocab_parallel_entropy,
    vocab_parallel_logp_at,
    vocab_parallel_scores,
)
from megatron_jackpot.parallel.vocab_spec import VocabSpec
from tests.kernels.forms import DEVICE, form, make_ids, make_logits

# The interpreter computes both sides of every where; infinities meet zeros in the side that is dropped.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DIRECTIONS = ("forward", "reverse")


def random_case(seed):
    """A shape nobody chose: odd vocabularies, rows of several blocks, k beyond a group, every dtype."""
    choose = random.Random(seed)
    vocab = choose.choice([1, 63, 65, 129, 200, 511, 777])
    # The interpreter takes a millisecond for each of the k rounds of a token: many of both only now and then.
    many = seed % 6 == 0
    return dict(
        num_tokens=choose.randint(1, 2 if many else 7),
        vocab=vocab,
        padded=vocab + choose.choice([0, 1, 40, 130]),
        k=min(vocab, 70) if many else choose.randint(1, min(vocab, 12)),
        num=choose.choice([2, 3, 9, 41]),
        dtype=choose.choice([torch.float32, torch.bfloat16, torch.float16]),
        temperature=choose.choice([1.0, 0.7, 1.9]),
        block=choose.choice([64, 128, 4096]),
        ties=choose.random() < 0.5,
        holes=choose.random() < 0.5,
        seed=seed,
    )


def logits_of(case, offset=0):
    names = ("num_tokens", "padded", "vocab", "dtype", "ties", "holes")
    return make_logits(seed=case["seed"] + offset, **{name: case[name] for name in names})


def vocab_of(case):
    return VocabSpec(case["vocab"], None, case["temperature"])


def near(actual, wanted, dtype=torch.float32):
    """Within rounding of logits of size 100 in fp32; gradients come in the dtype of the logits."""
    tolerance = dict(rtol=2e-5, atol=2e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(actual.double(), wanted.double(), **tolerance)


def both(case, call):
    with form("triton", case["block"]):
        mine = call()
    with form("torch"):
        return mine, call()


def seeds(first: int, num: int) -> pytest.MarkDecorator:
    """`num` random shapes, and as many others with --full."""
    more = [pytest.param(first + num + i, marks=pytest.mark.full) for i in range(num)]
    return pytest.mark.parametrize("seed", [*range(first, first + num), *more])


@seeds(0, 12)
def test_one_pass_equals_the_torch_form_on_random_shapes(seed):
    case = random_case(seed)
    logits_TV = logits_of(case)
    ids_TN = make_ids(case["num_tokens"], case["num"], case["vocab"], seed)

    def call():
        return vocab_parallel_scores(
            logits_TV, ids_TN[:, 1], vocab_of(case), ids_TK=ids_TN, k=case["k"], entropy=True
        )

    mine, theirs = both(case, call)
    for name in ("logp_T", "at_ids_TK", "topk_logp_TK", "entropy_T"):
        near(getattr(mine, name), getattr(theirs, name))
    assert torch.equal(mine.topk_ids_TK, theirs.topk_ids_TK)
    argmax = both(case, lambda: vocab_parallel_argmax(logits_TV, vocab_of(case)))
    assert torch.equal(*argmax) and torch.equal(argmax[0], mine.topk_ids_TK[:, 0])


@seeds(100, 6)
def test_gradients_equal_the_torch_form_and_come_in_the_dtype_of_the_logits(seed):
    case = random_case(seed)
    ids_TN = make_ids(case["num_tokens"], case["num"], case["vocab"], seed)
    upstream_TN = torch.randn(ids_TN.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    forms = {
        "logp": lambda x: (vocab_parallel_logp_at(x, ids_TN, vocab_of(case)), upstream_TN),
        "entropy": lambda x: (vocab_parallel_entropy(x, vocab_of(case)), upstream_TN[:, 0]),
    }
    for call in forms.values():

        def gradient(call=call):
            logits_TV = logits_of(case).requires_grad_()
            value, upstream = call(logits_TV)
            return torch.autograd.grad(value, logits_TV, upstream)[0]

        mine, theirs = both(case, gradient)
        assert mine.dtype == case["dtype"] and (mine[:, case["vocab"] :] == 0).all()
        near(mine, theirs, case["dtype"])


def kl_and_gradient(student, teacher, vocab, direction):
    leaf = student.detach().clone().requires_grad_()
    kl_T = vocab_parallel_kl(leaf, teacher, vocab, direction=direction)
    return kl_T.detach(), torch.autograd.grad(kl_T, leaf, torch.linspace(-1, 2, len(kl_T), device=DEVICE))[0]


@seeds(200, 8)
def test_overlap_and_kl_of_two_models_equal_the_torch_form(seed):
    case = random_case(seed)
    first, second = logits_of(case), logits_of({**case, "holes": False}, offset=1)
    vocab = vocab_of(case)
    for target in (second, lambda rows: second[rows].clone()):
        call = partial(vocab_parallel_overlap, target, first, vocab, lam=1.3)
        near(*both(case, call))
    for direction in DIRECTIONS:
        for student, teacher in ((first, second), (second, first)):
            call = partial(kl_and_gradient, student, teacher, vocab, direction)
            mine, theirs = both(case, call)
            near(mine[0], theirs[0])
            # Where a KL is infinite its gradient is not defined.
            finite = theirs[0].isfinite()
            near(mine[1][finite], theirs[1][finite], case["dtype"])
            assert (mine[1][finite][:, case["vocab"] :] == 0).all()


def test_values_are_those_of_fp64_and_a_small_kl_keeps_its_digits():
    first = make_logits(5, 300, 257, torch.float32, 0)
    second = first + 0.01 * torch.randn(first.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    second += 37.0
    p, q = (x[:, :257].double().log_softmax(-1) for x in (second, first))
    with form("triton", 64):
        vocab = VocabSpec(257, None)
        overlap_T = vocab_parallel_overlap(second, first, vocab, lam=1.0)
        kl_T = vocab_parallel_kl(first, second, vocab, direction="forward")
        entropy_T = vocab_parallel_entropy(first, vocab)
    near(overlap_T, torch.minimum(p.exp(), q.exp()).sum(-1))
    near(entropy_T, -(q.exp() * q).sum(-1))
    torch.testing.assert_close(kl_T.double(), (p.exp() * (p - q)).sum(-1), rtol=0.05, atol=3e-6)


def test_a_hole_in_the_second_makes_kl_infinite_in_whichever_block_it_lies():
    first = make_logits(3, 200, 200, torch.float32, 0)
    for column in (0, 100, 199):
        holed = first.clone()
        holed[:, column] = -math.inf
        with form("triton", 64):
            vocab = VocabSpec(200, None)
            assert (vocab_parallel_kl(first, holed, vocab, direction="reverse") == math.inf).all()
            assert vocab_parallel_kl(first, holed, vocab, direction="forward").isfinite().all()


def test_a_hole_under_a_probability_that_has_vanished_counts_for_nothing():
    first, second = torch.zeros(2, 200, device=DEVICE), torch.zeros(2, 200, device=DEVICE)
    first[:, :64] = -200.0
    second[:, 5] = -math.inf
    vocab = VocabSpec(200, None)
    near(*both(dict(block=64), lambda: vocab_parallel_kl(first, second, vocab, direction="reverse")))


def test_padding_has_no_gradient_even_from_a_nan():
    logits_TV = make_logits(2, 200, 150, torch.float32, 0).requires_grad_()
    with form("triton", 64):
        vocab = VocabSpec(150, None)
        for value in (
            vocab_parallel_entropy(logits_TV, vocab),
            vocab_parallel_kl(logits_TV, logits_TV.detach() * 0.5, vocab, direction="forward"),
        ):
            nan_T = torch.full((2,), math.nan, device=DEVICE)
            (grad,) = torch.autograd.grad(value, logits_TV, nan_T)
            assert (grad[:, 150:] == 0).all() and grad[:, :150].isnan().all()


def test_a_block_or_a_slice_without_any_probability_is_no_special_case():
    logits_TV = torch.full((2, 200), -math.inf, device=DEVICE)
    logits_TV[:, 150] = 3.0
    ids_TN = torch.tensor([[150, 0], [7, 150]], device=DEVICE)
    case = dict(block=64)
    mine, theirs = both(
        case,
        lambda: vocab_parallel_scores(
            logits_TV, ids_TN[:, 0], VocabSpec(200, None), ids_TK=ids_TN, k=3, entropy=True
        ),
    )
    for name in ("logp_T", "at_ids_TK", "topk_logp_TK", "entropy_T"):
        near(getattr(mine, name), getattr(theirs, name))
    assert torch.equal(mine.topk_ids_TK, theirs.topk_ids_TK) and mine.topk_ids_TK[0].tolist() == [150, 0, 1]


@pytest.mark.parametrize("where", [0, 130])
def test_nan_logits_make_nan_results(where):
    logits_TV, other = (make_logits(2, 200, 200, torch.float32, seed) for seed in (0, 1))
    logits_TV[1, where] = math.nan
    with form("triton", 64):
        vocab = VocabSpec(200, None)
        results = [vocab_parallel_entropy(logits_TV, vocab)]
        results += [vocab_parallel_overlap(other, logits_TV, vocab, lam=1.0)]
        results += [vocab_parallel_kl(logits_TV, other, vocab, direction=name) for name in DIRECTIONS]
    for result in results:
        assert result[0].isfinite() and result[1].isnan()


def test_rows_that_are_a_view_are_read_through_their_stride_and_left_as_they_were():
    wide = make_logits(6, 400, 400, torch.float32, 0)
    view, before = wide[::2, 50:250], wide.clone()
    labels_T, vocab = torch.arange(3, device=DEVICE), VocabSpec(190, None)
    mine, theirs = both(dict(block=64), lambda: vocab_parallel_scores(view, labels_T, vocab, k=70))
    near(mine.topk_logp_TK, theirs.topk_logp_TK)
    assert torch.equal(mine.topk_ids_TK, theirs.topk_ids_TK) and torch.equal(wide, before)


def test_no_tokens_are_no_special_case():
    nothing = torch.zeros(0, 64, device=DEVICE, requires_grad=True)
    with form("triton"):
        vocab = VocabSpec(50, None)
        vocab_parallel_entropy(nothing, vocab).sum().backward()
        vocab_parallel_kl(nothing, nothing.detach(), vocab, direction="forward").sum().backward()
        labels_T = torch.zeros(0, dtype=torch.int64, device=DEVICE)
        assert vocab_parallel_scores(nothing, labels_T, vocab, k=3).topk_ids_TK.shape == (0, 3)
    assert nothing.grad.shape == (0, 64)


def test_the_torch_form_reads_what_is_not_on_cuda_and_fp64():
    logits_TV = torch.zeros(2, 8)
    assert dispatch.fused(logits_TV) is None and dispatch.fused(logits_TV.double().to(DEVICE)) is None
    assert (dispatch.fused(logits_TV.to(DEVICE)) is not None) == torch.cuda.is_available()
