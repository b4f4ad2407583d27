"""One optimizer step of a policy with logits that exist and with logits made in blocks: seconds and peak
memory.

    PYTHONPATH=. python benchmarks/linear.py [--tokens 4096] [--vocab 49152] [--hidden 512] [--layers 4]

Random Qwen3-shaped weights, one micro-batch on one CPU thread, every form in a process of its own. Peak is
that of the process beyond what it holds before the step, from the kernel's accounting
(megatron_jackpot/monitor/peak_memory.py); `score` is the no-grad pass with top-20.
"""

import argparse
import time
from functools import partial

from benchmarks.gpu_models import correct, make_batch, make_config, make_trainer, update_policy
from megatron_jackpot.monitor.peak_memory import PeakAnonymous
from megatron_jackpot.train.losses import policy_loss
from tests.parallel.spawn import run_ranks

REPEATS = 3


def measure(rank: int, world: int, fused: bool, shape: dict, tokens: int) -> dict[str, tuple[float, int]]:
    """score and update: the fastest of REPEATS in seconds, and the largest peak in bytes."""
    config = make_config(tokens, dict(dtype="float32", fused_linear=fused))
    trainer = make_trainer(config, dict(policy=shape, actor={**shape, "num_hidden_layers": 1}))
    batch = make_batch(trainer, [tokens // 4] * 4, shape["vocab_size"])
    parts: dict[str, tuple[float, int]] = {}

    def timed(name, call):
        with PeakAnonymous() as memory:
            started = time.perf_counter()
            result = call()
            seconds = time.perf_counter() - started
        best_s, most = parts.get(name, (seconds, 0))
        parts[name] = (min(best_s, seconds), max(most, memory.added))
        return result

    def score_policy():
        return trainer.policy.score(batch, partial(trainer.scorer._read_policy, batch))

    mini, aggregated, agreed = correct(trainer, batch)
    loss = policy_loss(
        mini.scores,
        aggregated,
        agreed.num_policy,
        trainer.methods.objective,
        trainer.scorer.vocab(trainer.policy),
    )
    update_policy(trainer, mini, aggregated, agreed)
    for _ in range(REPEATS):
        timed("score", score_policy)
        timed("update", lambda: trainer.policy.update(batch, loss))
    return parts


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("tokens", 4096), ("vocab", 49152), ("hidden", 512), ("layers", 4)):
        made.add_argument(f"--{name}", type=int, default=size)
    args = made.parse_args()
    shape = dict(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64, head_dim=64,
    )  # fmt: skip
    found = {f: run_ranks(measure, 1, 900, f, shape, args.tokens)[0] for f in (False, True)}
    logits = args.tokens * args.vocab * 4
    print(f"{args.tokens} tokens, {args.vocab} columns, hidden {args.hidden}, {args.layers} layers, fp32")
    print(f"logits: {logits / 2**20:.0f} MiB")
    print(f"{'':8}{'form':>10}{'s':>8}{'peak MiB':>10}{'of logits':>11}")
    for part in ("score", "update"):
        for fused, name in ((False, "logits"), (True, "blocks")):
            time_s, peak = found[fused][part]
            print(f"{part:8}{name:>10}{time_s:8.2f}{peak / 2**20:10.0f}{peak / logits:11.2f}")
        ratio = found[True][part][0] / found[False][part][0]
        print(f"{part:8}{'ratio':>10}{ratio:8.2f}{'':10}{found[True][part][1] / found[False][part][1]:11.2f}")


if __name__ == "__main__":
    main()
