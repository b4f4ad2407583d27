"""Parallel equals serial: every vocabulary function on 2 and 4 ranks, the bytes it sends, and reductions."""

import math
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_jackpot.algorithm.obrs import kappa
from megatron_jackpot.parallel.reduce import make_sum_over, reduce_metrics, with_all_names
from megatron_jackpot.parallel.vocab import (
    vocab_parallel_argmax,
    vocab_parallel_entropy,
    vocab_parallel_gather_logp,
    vocab_parallel_logp,
    vocab_parallel_scores,
)
from megatron_jackpot.parallel.vocab_spec import VocabSpec
from tests.parallel.spawn import run_ranks

T, PADDED, N = 29, 64, 7
CASES = {
    # On 4 ranks of 16 columns: 50 leaves 2 true columns to the last rank, 20 leaves none to two of them.
    "uneven": dict(vocab_size=50, k=6, dtype=torch.float32, temperature=1.0, chunk=None),
    "ranks of padding": dict(vocab_size=20, k=20, dtype=torch.float32, temperature=0.7, chunk=8),
    "bf16 with ties": dict(vocab_size=50, k=30, dtype=torch.bfloat16, temperature=1.3, chunk=3),
    # Equal in fp32, ordered by what only fp64 holds.
    "fp64": dict(vocab_size=50, k=30, dtype=torch.float64, temperature=1.0, chunk=None),
    "no token": dict(vocab_size=50, k=6, dtype=torch.float32, temperature=1.0, chunk=None, tokens=0),
}


def inputs(case):
    generator = torch.Generator().manual_seed(0)
    num = case.get("tokens", T)
    logits_TV = (torch.randn(num, PADDED, generator=generator) * 3).to(case["dtype"])
    logits_TV[:, case["vocab_size"] :] = 90.0
    if case["dtype"] == torch.bfloat16:
        logits_TV[:, : case["vocab_size"]] = logits_TV[:, : case["vocab_size"]].round()
    if case["dtype"] == torch.float64:
        logits_TV = logits_TV.round() + torch.rand(num, PADDED, generator=generator).double() * 1e-9
    ids_TN = torch.randint(0, case["vocab_size"], (num, N), generator=generator)
    ids_TN[::4, 1] = -1
    ids_TN[1::4, 1] = case["vocab_size"] + 1
    return logits_TV, ids_TN


class Sent:
    """Bytes that the collectives called inside hand to every rank, by kind."""

    def __enter__(self):
        self.all_reduce = self.all_gather = self.calls = 0
        real_reduce, real_gather = dist.all_reduce, dist.all_gather_into_tensor

        def reduce(tensor, **kwargs):
            self.calls += 1
            self.all_reduce += tensor.nbytes
            return real_reduce(tensor, **kwargs)

        def gather(output, tensor, **kwargs):
            self.calls += 1
            self.all_gather += output.nbytes
            return real_gather(output, tensor, **kwargs)

        self.patches = [mock.patch.object(dist, "all_reduce", reduce)]
        self.patches.append(mock.patch.object(dist, "all_gather_into_tensor", gather))
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()
        self.patches = self.reals = None


def compute(case, group, rank, size):
    """Everything the module offers, from one slice of the logits: name -> tensors, name -> Sent."""
    logits_TV, ids_TN = inputs(case)
    slice_TV = logits_TV.chunk(size, -1)[rank].clone().requires_grad_()
    vocab, each = VocabSpec(case["vocab_size"], group, case["temperature"]), dict(chunk=case["chunk"])
    ramp_T = torch.linspace(-1, 1, len(ids_TN))
    calls = {
        "logp": lambda: vocab_parallel_logp(slice_TV, ids_TN[:, 0], vocab, **each),
        "gather": lambda: vocab_parallel_gather_logp(slice_TV, ids_TN, vocab, **each),
        "topk": lambda: vars(vocab_parallel_scores(slice_TV, ids_TN[:, 0], vocab, k=case["k"], **each)),
        "argmax": lambda: vocab_parallel_argmax(slice_TV, vocab, **each),
        "entropy": lambda: vocab_parallel_entropy(slice_TV, vocab, **each),
        "scores": lambda: vars(
            vocab_parallel_scores(
                slice_TV, ids_TN[:, 0], vocab, ids_TK=ids_TN, k=case["k"], entropy=True, **each
            )
        ),
        "backward": lambda: torch.autograd.grad(
            vocab_parallel_logp(slice_TV, ids_TN[:, 0], vocab, **each),
            slice_TV,
            torch.linspace(-1, 1, len(ids_TN)),
        )[0],
        "entropy backward": lambda: torch.autograd.grad(
            vocab_parallel_entropy(slice_TV, vocab, **each), slice_TV, ramp_T
        )[0],
    }
    results, sent = {}, {}
    for name, call in calls.items():
        with Sent() as sent[name]:
            results[name] = call()
    logp_T = results["logp"]
    with Sent() as sent["backward alone"]:
        logp_T.sum().backward()
    results["logp"], results["entropy"] = logp_T.detach(), results["entropy"].detach()
    return results, sent


def metrics_of(rank):
    return {
        "b": (torch.tensor(float(rank)), torch.tensor(2.0)),
        "a": (torch.tensor(1.0), torch.tensor(rank + 1.0)),
    }


def on_one_rank(rank, world):
    """All checks of one world size in one start of its processes."""
    group = dist.group.WORLD
    results = {name: compute(case, group, rank, world) for name, case in CASES.items()}
    with Sent() as metrics_sent:
        means = reduce_metrics(metrics_of(rank), group)
    many = {f"{index:04d}": (torch.tensor(float(index)), torch.tensor(1.0)) for index in range(1200)}
    assert [*reduce_metrics(many, group).values()] == [*range(1200)]
    own = {
        f"own/{rank}": (torch.tensor(3.0), torch.tensor(2.0)),
        "own/both": (torch.ones([]), torch.ones([])),
    }
    shared = reduce_metrics(with_all_names({**metrics_of(rank), **own}, "own/", group), group)
    assert shared == {**means, "own/both": 1.0, **{f"own/{one}": 1.5 for one in range(world)}}
    wrong = metrics_of(rank)
    if rank == 0:
        wrong["c"] = wrong.pop("b")
    try:
        reduce_metrics(wrong, group)
        disagreement = None
    except ValueError as error:
        disagreement = str(error)
    accept, overlap, mask = kappa_inputs()
    mine = torch.arange(len(accept)) % world == rank
    ratio = kappa(accept[mine], overlap[mine], mask[mine], make_sum_over(group))
    place = (rank, group.rank(), os.environ["RANK"], os.environ["WORLD_SIZE"])
    return dict(
        place=place,
        results=results,
        means=means,
        calls=metrics_sent.calls,
        disagreement=disagreement,
        kappa=ratio,
    )


def kappa_inputs():
    accept, overlap = torch.rand(2, 101, generator=torch.Generator().manual_seed(4))
    return accept, overlap, torch.arange(101) % 5 > 0


@pytest.fixture(scope="module", params=[2, 4], ids=["tp2", "tp4"])
def ranks(request):
    return run_ranks(on_one_rank, request.param)


@pytest.fixture(params=CASES)
def outcomes(request, ranks):
    """(case, serial results, [(results, sent) per rank])."""
    case = CASES[request.param]
    return case, compute(case, None, 0, 1)[0], [rank["results"][request.param] for rank in ranks]


def test_results_come_back_in_order_of_rank(ranks):
    assert [rank["place"] for rank in ranks] == [(i, i, str(i), str(len(ranks))) for i in range(len(ranks))]


def near(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


def test_every_rank_gets_the_serial_result(outcomes):
    _, serial, parallel = outcomes
    for results, _ in parallel:
        near(results["logp"], serial["logp"])
        near(results["gather"], serial["gather"])
        near(results["entropy"], serial["entropy"])
        near(results["topk"]["topk_logp_TK"], serial["topk"]["topk_logp_TK"])
        assert torch.equal(results["topk"]["topk_ids_TK"], serial["topk"]["topk_ids_TK"])
        assert torch.equal(results["argmax"], serial["argmax"])
        for name, wanted in serial["scores"].items():
            near(results["scores"][name], wanted)


def test_the_serial_result_is_log_softmax(outcomes):
    case, serial, _ = outcomes
    logits_TV, ids_TN = inputs(case)
    true_TV = logits_TV[:, : case["vocab_size"]]
    true_TV = true_TV if case["dtype"] == torch.float64 else true_TV.float()
    logp_TV = (true_TV / case["temperature"]).log_softmax(-1)
    outside = (ids_TN < 0) | (ids_TN >= case["vocab_size"])
    near(serial["gather"], logp_TV.gather(-1, ids_TN.masked_fill(outside, 0)).masked_fill(outside, -math.inf))
    order = true_TV.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(serial["topk"]["topk_ids_TK"], order[:, : case["k"]])


def test_all_ranks_hold_the_same_bits(outcomes):
    _, _, parallel = outcomes
    first = parallel[0][0]
    for results, _ in parallel[1:]:
        for name in ("logp", "gather", "entropy", "argmax"):
            assert torch.equal(results[name], first[name])
        for name in ("logp_T", "topk_logp_TK", "topk_ids_TK"):
            assert torch.equal(results["topk"][name], first["topk"][name])


def test_gradient_slices_together_are_the_serial_gradient(outcomes):
    case, serial, parallel = outcomes
    # log p + entropy cancels where the entropy's gradient is small: a few roundings of a logit of size 10.
    tolerance = dict(rtol=1e-2, atol=1e-3) if case["dtype"] == torch.bfloat16 else dict(rtol=1e-5, atol=5e-6)
    for name in ("backward", "entropy backward"):
        whole = torch.cat([results[name] for results, _ in parallel], -1)
        torch.testing.assert_close(whole, serial[name], **tolerance)
        assert (whole[:, case["vocab_size"] :] == 0).all()


def test_topk_gathers_k_times_tp_times_two_numbers_per_token(outcomes):
    case, _, parallel = outcomes
    per_token = len(parallel) * 2 * (8 if case["dtype"] == torch.float64 else 4)
    num = case.get("tokens", T)
    for _, sent in parallel:
        assert sent["topk"].all_gather == sent["scores"].all_gather == num * case["k"] * per_token
        assert sent["argmax"].all_gather == num * per_token
        assert sent["logp"].all_gather == sent["gather"].all_gather == sent["entropy"].all_gather == 0


def test_collectives_are_those_of_the_docstrings_and_backward_has_none(outcomes):
    case, _, parallel = outcomes
    num, size = case.get("tokens", T), 8 if case["dtype"] == torch.float64 else 4
    numbers_per_token = dict(
        logp=1 + 2, gather=1 + 1 + N, topk=1 + 2, argmax=0, entropy=1 + 2, scores=1 + 3 + N
    )
    # Of no token, no top-k is sent.
    top = int(num > 0)
    calls = dict(logp=2, gather=2, topk=2 + top, argmax=top, entropy=2, scores=2 + top)
    for _, sent in parallel:
        for name, numbers in numbers_per_token.items():
            assert sent[name].all_reduce == num * numbers * size, name
            assert sent[name].calls == calls[name], name
        assert sent["backward alone"].calls == 0


def test_metrics_are_global_sums_over_global_counts_in_one_all_reduce(ranks):
    world = len(ranks)
    for rank in ranks:
        assert rank["means"] == {"a": world / sum(range(1, world + 1)), "b": sum(range(world)) / (2 * world)}
        assert rank["calls"] == 1


def test_every_rank_learns_that_metric_names_differ(ranks):
    for rank in ranks:
        assert rank["disagreement"].startswith("metric names differ between ranks")


def test_kappa_of_data_spread_over_ranks_is_the_serial_kappa(ranks):
    want = kappa(*kappa_inputs(), make_sum_over(None))
    for rank in ranks:
        torch.testing.assert_close(rank["kappa"], want, rtol=1e-12, atol=0)
