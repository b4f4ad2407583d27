"""How many tokens a micro-batch may have: the fewest micro-batches that a GPU's memory allows."""

import math

from megatron_jackpot.config import Config
from megatron_jackpot.plan.formulas import GIB, TRAINER_RESERVE_GIB, make_plan

STEP = 1024
"""packing.tokens is looked for in multiples of it."""
PER_STAGE = 4
"""Micro-batches per pipeline stage that keep the idle share near a fifth, (pp - 1) / (M + pp - 1)."""


def largest_microbatch(config: Config, gpus: int, mean_tokens: float | None = None) -> int | None:
    """The largest useful packing.tokens on `gpus` GPUs of cluster.gpu_memory_gib, a multiple of 1024.

    Useful: not more than a rank's share of a mini-batch, with pp > 1 a 4 pp-th of it. None on a cluster of
    CPUs, or where not even the longest sequence fits. A launch costs the host the same whatever it works on,
    so few large micro-batches are what keeps a GPU busy (docs/gpu.md). Raises ValueError as make_plan does.
    """
    cluster, pp = config.cluster, config.parallel.pp
    if cluster.gpus_per_node == 0:
        return None
    plan = make_plan(config, gpus, mean_tokens)
    share = plan.tokens / plan.dp / config.algorithm.num_minibatches / (PER_STAGE * pp if pp > 1 else 1)
    least = math.ceil(plan.longest / STEP)
    room = (cluster.gpu_memory_gib - TRAINER_RESERVE_GIB) * GIB

    def fits(steps: int) -> bool:
        packing = config.packing.model_copy(update={"tokens": steps * STEP})
        changed = config.model_copy(update={"packing": packing})
        return make_plan(changed, gpus, mean_tokens).trainer_bytes <= room

    if not fits(least):
        return None
    low, high = least, max(least, math.ceil(share / STEP))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * STEP


def microbatch_advice(config: Config, gpus: int, mean_tokens: float | None = None) -> str | None:
    """A line for `plan` where packing.tokens is less than half of what would fit."""
    most = largest_microbatch(config, gpus, mean_tokens)
    if most is None or 2 * config.packing.tokens > most:
        return None
    return (
        f"packing.tokens = {config.packing.tokens}: up to {most} fit. Few large ones keep a GPU busy: "
        "one micro-batch of 16,384 tokens trained a 0.6B model 7 times as fast as eight of 2048 did (H200)."
    )
