"""Vocabulary functions on one shard of logits: time, share of copy bandwidth, peak bytes.

    PYTHONPATH=. python benchmarks/gpu_vocab.py [--tiny]

T = 16,384 tokens, bf16 logits of 151,936 columns (TP 1) and of 18,992 (TP 8), k = 20. `bytes` is what must
move:
every logit read once per pass (Z reads both models' twice), a gradient written once. The dense form is
log_softmax in fp32; an all-gather of bf16 logits would hold V x 2 bytes per token on every rank. Peak bytes
are beside the logits and a gradient. `gap` is the largest difference to the torch form on the first tokens.
`ms` is what a caller waits for, `busy_ms` the device's own time: narrow slices end before the host has
launched the next, and in a step it runs ahead. copy_share is that of the device's time. `--tune` asks for
other block sizes and warps of the kernels that follow a running maximum.
"""

import itertools
from functools import partial
from unittest import mock

import torch

from benchmarks.gpu_common import DEVICE, Report, busy_seconds, copy_bandwidth, parser, peak_bytes, seconds
from megatron_jackpot.parallel import dispatch, vocab_triton
from megatron_jackpot.parallel.divergence import vocab_parallel_kl, vocab_parallel_overlap
from megatron_jackpot.parallel.linear import LinearLogits
from megatron_jackpot.parallel.vocab import vocab_parallel_logp, vocab_parallel_scores
from megatron_jackpot.parallel.vocab_spec import VocabSpec

VOCAB, TOKENS, K, HIDDEN = 151_936, 16_384, 20, 1024
COMPARED = 64


def calls(first, second, ids_TK, rows=slice(None)):
    """name -> (call, passes over a model's logits, gradients written)."""
    first, second, ids_TK = first[rows], second[rows], ids_TK[rows]
    vocab = VocabSpec(first.shape[1], None)

    def with_gradient(function):
        leaf = first.detach().requires_grad_()
        value = function(leaf)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    kl = partial(vocab_parallel_kl, teacher_logits=second, vocab=vocab, direction="forward")
    scores = partial(vocab_parallel_scores, first, ids_TK[:, 0], vocab, ids_TK=ids_TK)
    return {
        "logp, 20 ids, entropy": (lambda: scores(entropy=True).entropy_T, 1, 0),
        "the same and top-20": (lambda: scores(entropy=True, k=K).topk_logp_TK, 1, 0),
        "logp and gradient": (
            lambda: with_gradient(lambda x: vocab_parallel_logp(x, ids_TK[:, 0], vocab))[1],
            2,
            1,
        ),
        "exact Z": (lambda: vocab_parallel_overlap(second, first, vocab, lam=1.0), 4, 0),
        "forward KL": (lambda: kl(first), 2, 0),
        "forward KL and gradient": (lambda: with_gradient(kl)[1], 4, 1),
    }


def measure(tokens: int, columns: int, bandwidth: float) -> list[dict]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    first = torch.randn(tokens, columns, generator=generator, device=DEVICE, dtype=torch.bfloat16) * 3
    second = first + torch.randn(tokens, columns, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    ids_TK = torch.randint(0, columns, (tokens, K), generator=generator, device=DEVICE)
    few = slice(0, min(COMPARED, tokens))
    with mock.patch.object(dispatch, "fused", lambda *logits: None):
        truth = {name: call() for name, (call, _, _) in calls(first, second, ids_TK, few).items()}
    logits_bytes, dense = first.nbytes, tokens * columns * 4
    rows = []
    for name, (call, passes, gradients) in calls(first, second, ids_TK).items():
        time_s, peak = seconds(call), peak_bytes(call)
        busy_s = busy_seconds(call) or time_s
        moved = (passes + gradients) * logits_bytes
        peak = None if peak is None else peak - gradients * logits_bytes
        rows.append(
            dict(
                what=name,
                columns=columns,
                ms=time_s * 1e3,
                busy_ms=busy_s * 1e3,
                bytes=moved,
                copy_share=moved / busy_s / bandwidth,
                peak_mb=None if peak is None else peak / 1e6,
                peak_of_dense=None if peak is None else peak / dense,
                gathered_mb=tokens * VOCAB * 2 / 1e6,
                gap=(call()[few].float() - truth[name].float()).abs().max().item(),
            )
        )
    del second
    form = lambda: first.log_softmax(-1, dtype=torch.float32)  # noqa: E731
    peak = peak_bytes(form)
    rows.append(
        dict(
            what="dense log_softmax",
            columns=columns,
            ms=seconds(form) * 1e3,
            peak_mb=None if peak is None else peak / 1e6,
            peak_of_dense=None if peak is None else peak / dense,
        )
    )
    return rows


def measure_linear(tokens: int, columns: int, hidden: int) -> list[dict]:
    """Log-prob of labels from hidden states, both gradients included: in blocks, and through whole logits."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    make = partial(torch.randn, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    hidden_TH, weight_VH = make(tokens, hidden), make(columns, hidden) * 0.1
    ids_T1 = torch.randint(0, columns, (tokens, 1), generator=generator, device=DEVICE)
    vocab = VocabSpec(columns, None)

    def blocks(h, w):
        return vocab_parallel_logp(LinearLogits(h, w), ids_T1[:, 0], vocab)

    def whole(h, w):
        return vocab_parallel_logp(torch.nn.functional.linear(h, w), ids_T1[:, 0], vocab)

    def step(function):
        leaves = [x.detach().requires_grad_() for x in (hidden_TH, weight_VH)]
        return torch.autograd.grad(function(*leaves).sum(), leaves)

    # Logits once in forward; two products in backward; blocks make the logits once more.
    flops = 2.0 * tokens * columns * hidden
    rows = []
    for name, function, products in (("linear in blocks", blocks, 4), ("linear, whole logits", whole, 3)):
        time_s, peak = seconds(partial(step, function), repeats=3), peak_bytes(partial(step, function))
        rows.append(
            dict(
                what=name,
                columns=columns,
                ms=time_s * 1e3,
                tflops=products * flops / time_s / 1e12,
                peak_mb=None if peak is None else peak / 1e6,
            )
        )
    return rows


def tune(tokens: int, columns: int, bandwidth: float) -> list[dict]:
    """Device time and share of the copy's bandwidth of the kernels with a running maximum, at other sizes."""
    first = torch.randn(tokens, columns, device=DEVICE, dtype=torch.bfloat16) * 3
    second = first + 0.5
    ids_TK = torch.randint(0, columns, (tokens, K), device=DEVICE)
    rows = []
    for warps, block in itertools.product((4, 8), (1024, 2048, 4096)):
        with mock.patch.multiple(vocab_triton, NUM_WARPS=warps, READ_BLOCK=block):
            for name, (call, passes, gradients) in calls(first, second, ids_TK).items():
                if gradients or name == "exact Z":
                    continue
                call()
                busy_s = busy_seconds(call) or seconds(call)
                share = passes * first.nbytes / busy_s / bandwidth
                where = dict(what=name, columns=columns, warps=warps, block=block)
                rows.append(dict(**where, busy_ms=busy_s * 1e3, copy_share=share))
    return rows


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--tune", action="store_true", help="other block sizes and warps")
    args = made.parse_args()
    tokens, widths, hidden = (64, (512, 64), 32) if args.tiny else (TOKENS, (VOCAB, VOCAB // 8), HIDDEN)
    bandwidth = copy_bandwidth(2**20 if args.tiny else 2**32)
    report = Report("gpu_vocab", tiny=args.tiny)
    report.add(dict(what="device copy", copy_share=1.0, gb_s=bandwidth / 1e9))
    for columns in widths:
        if args.tune:
            report.add(*tune(tokens, columns, bandwidth))
        report.add(*measure(tokens, columns, bandwidth))
        report.add(*measure_linear(tokens, columns, hidden))
    report.close()


if __name__ == "__main__":
    main()
