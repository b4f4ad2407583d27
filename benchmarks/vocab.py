"""Exact Z and forward KL from vocabulary slices, beside a dense form that gathers the logits of every rank.

    PYTHONPATH=. python benchmarks/vocab.py [--tokens 4096] [--vocab 32768] [--tp 2] [--chunk 64]

Spawns gloo ranks of one CPU thread each; logits are bf16. Peak bytes are what one rank allocates beyond its
slices, in an own run; KL is the forward pass alone. Bytes sent are those the collectives hand to one rank.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jackpot.parallel.divergence import vocab_parallel_kl, vocab_parallel_overlap
from megatron_jackpot.parallel.vocab_spec import VocabSpec
from tests.parallel.spawn import run_ranks
from tests.parallel.test_vocab import Sent
from tests.unit.test_vocab_serial import Allocations

LARGEST_SHARE = 1 / 8
"""Of the dense form's peak memory; more is an error."""


def gathered_logp(logits_TV: Tensor, size: int) -> Tensor:
    """log softmax of the logits of all ranks, fp32 [T, V]."""
    num_tokens, per_rank = logits_TV.shape
    slices = logits_TV.new_empty(size * num_tokens, per_rank)
    # Bytes: gloo need not know bf16.
    dist.all_gather_into_tensor(slices.view(torch.uint8), logits_TV.view(torch.uint8))
    whole_TV = slices.view(size, num_tokens, per_rank).transpose(0, 1).reshape(num_tokens, -1)
    del slices
    return whole_TV.log_softmax(-1, dtype=torch.float32)


def dense_overlap(target_TV: Tensor, server_TV: Tensor, size: int) -> Tensor:
    logp_TV = gathered_logp(target_TV, size)
    return torch.minimum(logp_TV, gathered_logp(server_TV, size), out=logp_TV).exp_().sum(-1)


def dense_kl(student_TV: Tensor, teacher_TV: Tensor, size: int) -> Tensor:
    teacher_logp_TV = gathered_logp(teacher_TV, size)
    log_ratio_TV = teacher_logp_TV - gathered_logp(student_TV, size)
    return teacher_logp_TV.exp_().mul_(log_ratio_TV).sum(-1)


def measure(call: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """Time of the faster of two runs, then memory and traffic of a third."""
    times_s = []
    for _ in range(2):
        dist.barrier()
        start = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - start)
    with Allocations(*inputs) as memory, Sent() as sent:
        result = call()
    return dict(time_s=min(times_s), peak=memory.peak, sent=sent.all_reduce + sent.all_gather, result=result)


def on_one_rank(rank: int, world: int, tokens: int, vocab: int, chunk: int) -> dict[str, dict[str, dict]]:
    generator = torch.Generator().manual_seed(rank)
    first = (torch.randn(tokens, vocab // world, generator=generator) * 3).bfloat16()
    second = (first + torch.randn(tokens, vocab // world, generator=generator) * 0.5).bfloat16()
    spec = VocabSpec(vocab, dist.group.WORLD)
    forms = {
        "exact Z": {
            "sliced": lambda: vocab_parallel_overlap(second, first, spec, lam=1.0, chunk=chunk),
            "dense": lambda: dense_overlap(second, first, world),
        },
        "forward KL": {
            "sliced": lambda: vocab_parallel_kl(first, second, spec, direction="forward", chunk=chunk),
            "dense": lambda: dense_kl(first, second, world),
        },
    }
    return {
        name: {form: measure(call, (first, second)) for form, call in pair.items()}
        for name, pair in forms.items()
    }


def report(results: dict[str, dict[str, dict]]) -> None:
    header = ("", "form", "time s", "peak MB", "sent MB", "mean", "max error")
    print("".join(f"{cell:>12}" for cell in header))
    for name, pair in results.items():
        error = (pair["sliced"]["result"] - pair["dense"]["result"]).abs().max().item()
        for form, row in pair.items():
            numbers = f"{row['time_s']:12.3f}{row['peak'] / 1e6:12.2f}{row['sent'] / 1e6:12.3f}"
            print(f"{name:>12}{form:>12}{numbers}{row['result'].mean().item():12.6f}{error:12.1e}")
        ratios = [pair["sliced"][key] / pair["dense"][key] for key in ("time_s", "peak", "sent")]
        print(f"{name:>12}{'ratio':>12}" + "".join(f"{ratio:12.5f}" for ratio in ratios))
        if ratios[1] > LARGEST_SHARE:
            raise SystemExit(f"{name}: peak memory is {ratios[1]:.3f} of the dense form's, above 1/8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=64, help="tokens read at a time")
    args = parser.parse_args()
    if args.vocab % args.tp:
        raise SystemExit(f"--vocab {args.vocab}: must be a multiple of --tp {args.tp}.")
    print(f"T = {args.tokens}, V = {args.vocab}, TP = {args.tp}, chunk = {args.chunk}, rank 0 of {args.tp}")
    report(run_ranks(on_one_rank, args.tp, 300.0, args.tokens, args.vocab, args.chunk)[0])


if __name__ == "__main__":
    main()
