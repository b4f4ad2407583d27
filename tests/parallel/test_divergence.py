"""Parallel equals serial: overlap, KL and log-probs at ids on 2 and 4 ranks, and the bytes they send."""

import pytest
import torch
import torch.distributed as dist

from megatron_jackpot.parallel.divergence import vocab_parallel_kl, vocab_parallel_overlap
from megatron_jackpot.parallel.vocab import vocab_parallel_logp_at
from megatron_jackpot.parallel.vocab_spec import VocabSpec
from tests.parallel.spawn import run_ranks
from tests.parallel.test_vocab import Sent

T, PADDED, K = 29, 64, 5
CASES = {
    # On 4 ranks of 16 columns: 50 leaves 2 true columns to the last rank, 20 leaves none to two of them.
    "uneven": dict(vocab_size=50, dtype=torch.float32, temperature=1.0, chunk=None),
    "ranks of padding": dict(vocab_size=20, dtype=torch.float32, temperature=0.7, chunk=8),
    "bf16": dict(vocab_size=64, dtype=torch.bfloat16, temperature=1.3, chunk=3),
    "one-hot": dict(vocab_size=50, dtype=torch.float32, temperature=1.0, chunk=4),
    "slices without probability": dict(vocab_size=50, dtype=torch.float32, temperature=1.0, chunk=4),
}


def inputs(name):
    generator = torch.Generator().manual_seed(0)
    vocab_size, dtype = CASES[name]["vocab_size"], CASES[name]["dtype"]
    student = torch.randn(T, PADDED, generator=generator) * 3
    teacher = student + torch.randn(T, PADDED, generator=generator)
    if name == "one-hot":
        student[:, :vocab_size] = teacher[:, :vocab_size] = -1e4
        student[:, 3] = 0.0
        teacher[:, 45] = 0.0
        teacher[::2, 3] = 1.0
    if name == "slices without probability":
        student[:, :16] = teacher[:, :16] = -float("inf")
        student[:, 33:] -= 500.0
    student[:, vocab_size:], teacher[:, vocab_size:] = 90.0, 50.0
    ids_TK = torch.randint(0, vocab_size, (T, K), generator=generator)
    ids_TK[::4, 1] = -1
    ids_TK[:, 3] = ids_TK[:, 2]
    return student.to(dtype), teacher.to(dtype), ids_TK


def compute(name, group, rank, size):
    """What the module gives from one slice of the logits: name -> tensor, name -> Sent."""
    student, teacher, ids_TK = inputs(name)
    student, teacher = (x.chunk(size, -1)[rank].clone() for x in (student, teacher))
    student.requires_grad_()
    case = CASES[name]
    vocab, each = VocabSpec(case["vocab_size"], group, case["temperature"]), dict(chunk=case["chunk"])
    calls = {
        "overlap": lambda: vocab_parallel_overlap(teacher, student, vocab, lam=1.4, **each),
        "lazy overlap": lambda: vocab_parallel_overlap(
            lambda rows: teacher[rows], student, vocab, lam=1.4, **each
        ),
        "forward": lambda: vocab_parallel_kl(student, teacher, vocab, direction="forward", **each),
        "reverse": lambda: vocab_parallel_kl(
            student, lambda rows: teacher[rows], vocab, direction="reverse", **each
        ),
        "logp_at": lambda: vocab_parallel_logp_at(student, ids_TK, vocab, **each),
    }
    results, sent = {}, {}
    for key, call in calls.items():
        with Sent() as sent[key]:
            result = call()
        results[key] = result.detach()
        if result.requires_grad:
            upstream = torch.linspace(-1, 1, result.numel()).view_as(result)
            with Sent() as sent[f"grad {key}"]:
                (results[f"grad {key}"],) = torch.autograd.grad(result, student, upstream)
    return results, sent


def on_one_rank(rank, world):
    return {name: compute(name, dist.group.WORLD, rank, world) for name in CASES}


@pytest.fixture(scope="module", params=[2, 4], ids=["tp2", "tp4"])
def ranks(request):
    return run_ranks(on_one_rank, request.param)


@pytest.fixture(params=CASES)
def outcomes(request, ranks):
    """(name of the case, serial results, [(results, sent) per rank])."""
    return request.param, compute(request.param, None, 0, 1)[0], [rank[request.param] for rank in ranks]


VALUES = ("overlap", "lazy overlap", "forward", "reverse", "logp_at")
GRADIENTS = ("grad forward", "grad reverse", "grad logp_at")


def test_every_rank_gets_the_serial_values_and_the_same_bits(outcomes):
    _, serial, parallel = outcomes
    for key in VALUES:
        for results, _ in parallel:
            torch.testing.assert_close(results[key], serial[key], rtol=1e-5, atol=1e-5)
            assert torch.equal(results[key], parallel[0][0][key])


def test_the_serial_values_are_the_dense_formulas(outcomes):
    name, serial, _ = outcomes
    student, teacher, _ = inputs(name)
    vocab_size, temperature = CASES[name]["vocab_size"], CASES[name]["temperature"]
    q, p = ((x[:, :vocab_size].double() / temperature).log_softmax(-1) for x in (student, teacher))
    present = (p > -float("inf")) & (q > -float("inf"))
    terms = {
        "overlap": torch.minimum(q.exp(), p.exp() / 1.4),
        "forward": torch.where(present, p.exp() * (p - q), 0.0),
        "reverse": torch.where(present, q.exp() * (q - p), 0.0),
    }
    for key, terms_TV in terms.items():
        torch.testing.assert_close(serial[key].double(), terms_TV.sum(-1), rtol=1e-5, atol=1e-5)


def test_gradient_slices_together_are_the_serial_gradient(outcomes):
    name, serial, parallel = outcomes
    tight = dict(rtol=1e-5, atol=2e-6 if name != "one-hot" else 1e-3)
    for key in GRADIENTS:
        whole = torch.cat([results[key] for results, _ in parallel], -1)
        tolerance = tight if CASES[name]["dtype"] == torch.float32 else dict(rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(whole, serial[key], **tolerance)
        assert (whole[:, CASES[name]["vocab_size"] :] == 0).all()


def test_collectives_are_those_of_the_docstrings_and_backward_has_none(outcomes):
    numbers_per_token = {"overlap": 5, "lazy overlap": 5, "forward": 5, "reverse": 5, "logp_at": 2 + K}
    calls = {"overlap": 3, "lazy overlap": 3, "forward": 2, "reverse": 2, "logp_at": 2}
    for _, sent in outcomes[2]:
        for key in VALUES:
            assert sent[key].all_reduce == T * numbers_per_token[key] * 4 and sent[key].calls == calls[key]
            assert sent[key].all_gather == 0
        assert all(sent[key].calls == 0 for key in GRADIENTS)
