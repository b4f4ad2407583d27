"""Overlap, KL and log-probs at ids on one rank: against dense formulas in fp64, gradients, and memory."""

import math

import pytest
import torch

from megatron_jackpot.algorithm.obrs import exact_overlap_mass
from megatron_jackpot.parallel.divergence import vocab_parallel_kl, vocab_parallel_overlap
from megatron_jackpot.parallel.vocab import vocab_parallel_logp, vocab_parallel_logp_at
from megatron_jackpot.parallel.vocab_spec import VocabSpec
from tests.unit.test_vocab_serial import DENSE, Allocations, big

T, PADDED, VOCAB, K = 23, 64, 50, 5
SERIAL = VocabSpec(VOCAB, None)
DIRECTIONS = ("forward", "reverse")
EXTREMES = ("zeros", "one-hot", "opposite", "huge")


def make_pair(dtype=torch.float32, seed=0):
    """Two models' logits; the padding columns are the largest of all and differ: they must not matter."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(T, PADDED, generator=generator, dtype=torch.float64) * 3
    second = first + torch.randn(T, PADDED, generator=generator, dtype=torch.float64)
    first[:, VOCAB:], second[:, VOCAB:] = 50.0, 90.0
    return first.to(dtype), second.to(dtype)


def extreme_pair(name, dtype=torch.float32):
    first, second = make_pair(dtype)
    if name == "zeros":
        first[:, :VOCAB] = 0.0
    if name in ("one-hot", "opposite"):
        first[:, :VOCAB] = -1e4
        first[:, 7] = 0.0
    if name == "opposite":
        second[:, :VOCAB] = -1e4
        second[:, 8] = 3.0
    if name == "huge":
        first[:, :VOCAB] += 1024.0
        second[:, :VOCAB] -= 1024.0
    return first, second


def truth(logits_TV, temperature=1.0):
    return (logits_TV[:, :VOCAB].double() / temperature).log_softmax(-1)


def dense_overlap(target_TV, server_TV, lam, temperature=1.0):
    return torch.minimum(truth(server_TV, temperature).exp(), truth(target_TV, temperature).exp() / lam).sum(
        -1
    )


def dense_kl(student_TV, teacher_TV, direction, temperature=1.0):
    p, q = truth(teacher_TV, temperature), truth(student_TV, temperature)
    if direction == "reverse":
        p, q = q, p
    return (p.exp() * (p - q)).sum(-1)


def in_chunks(logits_TV):
    return lambda rows: logits_TV[rows].clone()


def assert_near(actual, wanted, tolerance=1e-5):
    torch.testing.assert_close(actual.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def gradient(call, logits_TV):
    leaf = logits_TV.detach().clone().requires_grad_()
    return torch.autograd.grad(call(leaf), leaf, torch.linspace(-2, 2, T, dtype=call(leaf).dtype))[0]


@pytest.mark.parametrize("chunk", [None, 1, 5, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_are_those_of_the_dense_formulas_in_fp64(dtype, temperature, chunk):
    first, second = make_pair(dtype)
    vocab = VocabSpec(VOCAB, None, temperature)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for lam in (0.3, 1.0, 2.5):
        overlap_T = vocab_parallel_overlap(second, first, vocab, lam=lam, chunk=chunk)
        assert_near(overlap_T, dense_overlap(second, first, lam, temperature), tolerance)
    for direction in DIRECTIONS:
        kl_T = vocab_parallel_kl(first, second, vocab, direction=direction, chunk=chunk)
        assert_near(kl_T, dense_kl(first, second, direction, temperature), tolerance)
        assert kl_T.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [None, 5])
def test_kl_gradient_is_that_of_autograd_through_the_dense_form(direction, temperature, chunk):
    student, teacher = make_pair(torch.float64)
    vocab, knobs = VocabSpec(VOCAB, None, temperature), dict(direction=direction, chunk=chunk)
    actual = gradient(lambda x: vocab_parallel_kl(x, teacher, vocab, **knobs), student)
    wanted = gradient(lambda x: dense_kl(x, teacher, direction, temperature), student)
    assert_near(actual, wanted, 1e-11)
    assert (actual[:, VOCAB:] == 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kl_passes_gradcheck(direction):
    student, teacher = (x[:4] for x in make_pair(torch.float64))
    vocab, knobs = VocabSpec(VOCAB, None, 0.7), dict(direction=direction, chunk=3)
    assert torch.autograd.gradcheck(
        lambda x: vocab_parallel_kl(x, teacher, vocab, **knobs), student.requires_grad_()
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_comes_in_the_dtype_of_the_student_and_never_reaches_the_teacher(dtype, direction):
    student, teacher = (x.requires_grad_() for x in make_pair(dtype))
    vocab_parallel_kl(student, teacher, SERIAL, direction=direction).sum().backward()
    wide = student.detach().double().requires_grad_()
    dense_kl(wide, teacher.detach(), direction).sum().backward()
    assert student.grad.dtype == dtype and teacher.grad is None
    assert_near(student.grad, wide.grad, 1e-5 if dtype == torch.float32 else 1e-2)
    assert not vocab_parallel_kl(student.detach(), teacher, SERIAL, direction=direction).requires_grad
    assert not vocab_parallel_overlap(teacher, student, SERIAL, lam=1.0).requires_grad


@pytest.mark.parametrize("chunk", [1, 5, None])
def test_a_function_of_the_tokens_gives_the_bits_of_the_tensor(chunk):
    first, second = make_pair(torch.bfloat16)
    vocab = VocabSpec(VOCAB, None, 0.8)
    overlap_T = vocab_parallel_overlap(second, first, vocab, lam=1.3, chunk=chunk)
    assert torch.equal(
        vocab_parallel_overlap(in_chunks(second), first, vocab, lam=1.3, chunk=chunk), overlap_T
    )
    for direction in DIRECTIONS:
        kl = [
            lambda x, given=given, direction=direction: vocab_parallel_kl(
                x, given, vocab, direction=direction, chunk=chunk
            )
            for given in (second, in_chunks(second))
        ]
        assert torch.equal(kl[0](first), kl[1](first))
        assert torch.equal(gradient(kl[0], first), gradient(kl[1], first))


def test_a_function_is_called_twice_per_chunk_for_overlap_and_once_per_pass_for_kl_without_gradient():
    first, second = make_pair()
    asked = []

    def compute(rows):
        assert not torch.is_grad_enabled()
        asked.append((rows.start, rows.stop))
        return second[rows]

    once = [(0, 10), (10, 20), (20, T)]
    vocab_parallel_overlap(compute, first, SERIAL, lam=1.0, chunk=10)
    assert asked == once * 2
    asked.clear()
    kl_T = vocab_parallel_kl(first.requires_grad_(), compute, SERIAL, direction="forward", chunk=10)
    assert asked == once
    kl_T.sum().backward()
    assert asked == once * 2


@pytest.mark.parametrize("name", EXTREMES)
def test_flat_one_hot_disjoint_and_huge_logits_err_by_no_more_than_rounding_of_the_largest_logit(name):
    for first, second in (extreme_pair(name), extreme_pair(name)[::-1]):
        largest = max(x[:, :VOCAB].abs().max().item() for x in (first, second))
        tolerance = 8 * torch.finfo(torch.float32).eps * largest
        for lam in (0.5, 1.0, 2.0):
            wanted_T = dense_overlap(first, second, lam)
            # A mass is relative to 1: at most 1e-3 of it, however large the logits.
            assert_near(
                vocab_parallel_overlap(first, second, SERIAL, lam=lam), wanted_T, min(tolerance, 1e-3)
            )
        for direction in DIRECTIONS:
            kl = [
                lambda x, form=form, second=second, knobs=knobs: form(x, second, **knobs)
                for form, knobs in (
                    (vocab_parallel_kl, dict(vocab=SERIAL, direction=direction)),
                    (dense_kl, dict(direction=direction)),
                )
            ]
            assert_near(kl[0](first), kl[1](first), tolerance)
            assert_near(gradient(kl[0], first), gradient(kl[1], first.double()), tolerance)


def test_minus_infinity_is_probability_zero_and_kl_is_infinite_only_where_it_must_be():
    first, second = make_pair(torch.float64)
    first[:, 3] = second[:, 3] = -math.inf
    without = [torch.cat([x[:, :3], x[:, 4:VOCAB]], -1) for x in (first, second)]
    fewer = VocabSpec(VOCAB - 1, None)
    assert_near(
        vocab_parallel_overlap(first, second, SERIAL, lam=1.2),
        vocab_parallel_overlap(*without, fewer, lam=1.2),
        1e-12,
    )
    for direction in DIRECTIONS:
        kl_T = vocab_parallel_kl(first, second, SERIAL, direction=direction)
        assert_near(kl_T, vocab_parallel_kl(*without, fewer, direction=direction), 1e-12)
        grad = gradient(
            lambda x, direction=direction: vocab_parallel_kl(x, second, SERIAL, direction=direction), first
        )
        assert grad.isfinite().all() and (grad[:, 3] == 0).all()
    second[:, 5] = -math.inf
    assert vocab_parallel_kl(first, second, SERIAL, direction="forward").isfinite().all()
    assert (vocab_parallel_kl(first, second, SERIAL, direction="reverse") == math.inf).all()


def test_equal_models_overlap_wholly_have_no_kl_and_no_gradient():
    first, _ = make_pair()
    for lam in (1e-3, 0.5, 1.0, 2.0, 1e3):
        overlap_T = vocab_parallel_overlap(first, first, SERIAL, lam=lam)
        assert (overlap_T <= min(1, 1 / lam)).all()
        assert_near(overlap_T, torch.full((T,), min(1, 1 / lam)))
    for direction in DIRECTIONS:
        kl_T = vocab_parallel_kl(first, first, SERIAL, direction=direction)
        assert (kl_T >= 0).all() and (kl_T <= 1e-6).all()
        grad = gradient(
            lambda x, direction=direction: vocab_parallel_kl(x, first, SERIAL, direction=direction), first
        )
        assert grad.abs().max() <= 2e-6


def test_overlap_is_one_minus_total_variation_and_the_serial_normaliser():
    target, server = make_pair(torch.float64)
    variation_T = (truth(target).exp() - truth(server).exp()).abs().sum(-1) / 2
    assert_near(vocab_parallel_overlap(target, server, SERIAL, lam=1.0), 1 - variation_T, 1e-12)
    serial_T = exact_overlap_mass(truth(target), truth(server), 1.7)
    assert_near(vocab_parallel_overlap(target, server, SERIAL, lam=1.7), serial_T, 1e-12)


def test_inputs_are_left_as_they_were_and_backward_runs_twice():
    student, teacher = make_pair()
    student.requires_grad_()
    before = student.detach().clone(), teacher.clone()
    for direction in DIRECTIONS:
        kl_T = vocab_parallel_kl(student, teacher, SERIAL, direction=direction)
        (once,) = torch.autograd.grad(kl_T.sum(), student, retain_graph=True)
        (twice,) = torch.autograd.grad(2 * kl_T.sum(), student)
        torch.testing.assert_close(twice, 2 * once)
    vocab_parallel_overlap(teacher, student, SERIAL, lam=1.0)
    assert torch.equal(student.detach(), before[0]) and torch.equal(teacher, before[1])


def test_a_teacher_changed_before_backward_is_noticed():
    student, teacher = make_pair()
    kl_T = vocab_parallel_kl(student.requires_grad_(), teacher, SERIAL, direction="forward")
    teacher += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kl_T.sum().backward()


def test_models_of_different_precision_meet_in_that_of_the_tensor():
    first, second = make_pair(torch.float64)
    for student, teacher in ((first.float(), second), (first, second.float()), (first.bfloat16(), second)):
        for direction in DIRECTIONS:
            kl_T = vocab_parallel_kl(student, in_chunks(teacher), SERIAL, direction=direction)
            assert_near(kl_T, dense_kl(student, teacher, direction))


def test_no_tokens_are_no_special_case():
    nothing = torch.zeros(0, PADDED, requires_grad=True)
    vocab_parallel_kl(nothing, in_chunks(nothing.detach()), SERIAL, direction="reverse").sum().backward()
    assert nothing.grad.shape == (0, PADDED)
    assert vocab_parallel_overlap(nothing, nothing, SERIAL, lam=1.0).shape == (0,)


def make_ids():
    ids_TK = torch.randint(0, VOCAB, (T, K), generator=torch.Generator().manual_seed(1))
    ids_TK[:, 3] = ids_TK[:, 2]
    ids_TK[::3, 0] = -1
    return ids_TK


@pytest.mark.parametrize("chunk", [None, 5])
def test_logp_at_is_log_softmax_with_its_gradient_ids_of_minus_one_apart(chunk):
    logits_TV, ids_TK = make_pair(torch.float64)[0].requires_grad_(), make_ids()
    vocab = VocabSpec(VOCAB, None, 0.7)
    upstream_TK = torch.randn(T, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logp_TK = vocab_parallel_logp_at(logits_TV, ids_TK, vocab, chunk=chunk)
    dense_TK = truth(logits_TV, 0.7).gather(-1, ids_TK.clamp(min=0))
    dense_TK = torch.where(ids_TK < 0, -math.inf, dense_TK)
    assert_near(logp_TK.detach(), dense_TK.detach(), 1e-12)
    (wanted,) = torch.autograd.grad(dense_TK, logits_TV, upstream_TK)
    (actual,) = torch.autograd.grad(
        logp_TK, logits_TV, torch.where(ids_TK < 0, math.nan, upstream_TK), retain_graph=True
    )
    assert_near(actual, wanted, 1e-12)
    assert (actual[:, VOCAB:] == 0).all()


def test_logp_at_one_id_is_logp_and_none_is_no_gradient():
    logits_TV, ids_TK = make_pair()[0], make_ids()
    assert torch.equal(
        vocab_parallel_logp_at(logits_TV, ids_TK[:, :1], SERIAL)[:, 0],
        vocab_parallel_logp(logits_TV, ids_TK[:, 0], SERIAL),
    )
    logits_TV.requires_grad_()
    vocab_parallel_logp_at(logits_TV, torch.full((T, K), -1), SERIAL).sum().backward()
    assert (logits_TV.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overlap_never_holds_more_than_a_sixteenth_of_a_dense_fp32_copy(dtype):
    target, server = big(dtype), big(dtype).flip(0)
    for given in (target, in_chunks(target)):
        with Allocations(target, server) as seen:
            vocab_parallel_overlap(given, server, VocabSpec(4000, None, 0.9), lam=1.1, chunk=16)
        assert 0 < seen.peak <= DENSE / 16 and max(seen.largest.values()) <= DENSE / 128
        assert seen.read <= 16 * 4096  # no op reads, and so none may copy, the whole [T, V]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_holds_the_gradient_and_chunks(dtype, direction):
    student, teacher = big(dtype).requires_grad_(), big(dtype).flip(0)
    gradient_bytes = student.numel() * student.element_size()
    vocab = VocabSpec(4000, None, 0.9)
    with Allocations(student, teacher) as forward:
        loss = vocab_parallel_kl(student, in_chunks(teacher), vocab, direction=direction, chunk=16).sum()
    with Allocations(student, teacher) as backward:
        (grad,) = torch.autograd.grad(loss, student)
    assert grad.dtype == dtype and forward.read <= 16 * 4096 and backward.read <= 16 * 4096
    assert forward.peak <= DENSE / 16 and backward.peak - gradient_bytes <= DENSE / 16
    assert sorted(backward.largest.values())[-2:][0] <= DENSE / 128  # one large storage: the gradient itself


@pytest.mark.parametrize("lam", [0.0, -1.0, math.inf, math.nan])
def test_lam_must_be_finite_and_positive(lam):
    with pytest.raises(ValueError, match="lam = .*: must be a finite number > 0"):
        vocab_parallel_overlap(*make_pair(), SERIAL, lam=lam)


def test_direction_and_the_shape_of_the_other_logits_are_checked():
    first, second = make_pair()
    with pytest.raises(ValueError, match="direction = 'both': must be 'forward' or 'reverse'"):
        vocab_parallel_kl(first, second, SERIAL, direction="both")
    for wrong in (second[:, :60], lambda rows: second[rows, :60], second[:-1]):
        with pytest.raises(ValueError, match="must have that of the other model"):
            vocab_parallel_kl(first, wrong, SERIAL, direction="forward")
        with pytest.raises(ValueError, match="must have that of the other model"):
            vocab_parallel_overlap(wrong, first, SERIAL, lam=1.0)
