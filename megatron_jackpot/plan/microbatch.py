"""How many tokens a micro-batch has under `packing.tokens: auto`: what makes the predicted step shortest.

A pure function of configuration, shapes of the models, number of ranks and memory of a GPU; the formula, what
its numbers were read on and what they leave out: docs/planning.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_jackpot.config import Config
from megatron_jackpot.config.placement import data_parallel
from megatron_jackpot.data.bins import fill, padded
from megatron_jackpot.plan.formulas import GIB, TRAINER_RESERVE_GIB, Plan, make_plan
from megatron_jackpot.plan.seconds import Assumptions, work_seconds
from megatron_jackpot.plan.timeline import Work

UNIT = 1024
"""Sizes on a GPU are multiples of it."""
FINENESS = 8
"""From one size to the next it is a unit, or this part of it where that is more."""
PER_STAGE = 4
"""Micro-batches per pipeline stage that keep the idle share near a fifth, (pp - 1) / (M + pp - 1)."""
CPU_TOKENS = 1024
"""Of a rank on a CPU, where a launch costs little: the fastest of five sizes
(benchmarks/results/2026-11-27-micro-batches.md)."""
SCORE_LAYER_S, UPDATE_LAYER_S = 2.1e-3, 5.4e-3
"""What the host takes to launch a layer of a micro-batch, forward alone and both ways: one H200, 28 layers of
0.6B and of half of it (benchmarks/results/2026-11-27-h200-later.md, the third machine: score .117 s for both,
the smaller one's update .152 s)."""
ASSUMED = Assumptions()
"""The device's rates; the H200's were 300 to 470 TFLOP/s."""
MEANS, SPREAD = (1 / 8, 1 / 4, 1 / 2), 0.8
"""Nobody knows the lengths before the run: what a sequence may have on average, in longest sequences, and the
standard deviation of its logarithm."""
NEAR = 1.02
"""Of sizes whose steps differ by less the smallest is taken: neither times nor bytes are known better."""
SAMPLED = 512
"""Sequences that are laid into micro-batches to count them; of more, this many stand for all."""


@dataclass(frozen=True)
class Size:
    """One choice. Example: Size(16384, 4.6e10, (2, 3, 6), 5.1, 0.08, True)."""

    tokens: int
    trainer_bytes: float
    """On the fullest GPU, by the plan's formulas."""
    microbatches: tuple[int, ...]
    """Per optimizer step and data-parallel rank, for each of MEANS."""
    seconds: float
    """Training of a step, the mean over MEANS."""
    padding: float
    """Share of what is computed that is padding, over all MEANS."""
    fills_pipeline: bool
    """Whether there are PER_STAGE micro-batches for each stage."""


@dataclass(frozen=True)
class Choice:
    """What `auto` takes, and of which sizes; none were looked at on a CPU."""

    tokens: int
    sizes: tuple[Size, ...]
    why: str
    trouble: str | None = None
    """Set where not even the longest sequence fits."""


def choose(config: Config, gpus: int, memory: float | None) -> Choice:
    """What `auto` takes on `gpus` ranks with `memory` bytes each, None on CPUs. Raises ValueError like
    make_plan."""
    longest = config.longest_sequence
    if memory is None:
        tokens = _on_cpus(config, gpus, padded(longest, config.parallel.tp))
        return Choice(tokens, (), f"on CPUs {CPU_TOKENS}, and the longest sequence at least")
    room = memory - TRAINER_RESERVE_GIB * GIB
    smallest = math.ceil(longest / UNIT)
    tried = [predict(config, gpus, smallest * UNIT)]
    units = smallest
    # One micro-batch holds all: a larger one adds padding alone.
    while max(tried[-1].microbatches) > 1:
        units += max(1, units // FINENESS)
        size = predict(config, gpus, units * UNIT)
        if size.trainer_bytes > room or not size.fills_pipeline:
            break
        tried.append(size)
    shortest = min(size.seconds for size in tried)
    best = next(size for size in tried if size.seconds <= NEAR * shortest)
    gib = memory / GIB
    why = (
        f"of {len(tried)} sizes from {tried[0].tokens} to {tried[-1].tokens} in {gib:.1f} GiB - "
        f"{TRAINER_RESERVE_GIB:g} reserve the smallest within {NEAR - 1:.0%} of the shortest predicted step, "
        f"{best.seconds:.2f} s of training"
    )
    trouble = None
    if tried[0].trainer_bytes > room:
        trouble = (
            f"packing.tokens = auto: {tried[0].tokens} tokens, which hold the longest sequence, need "
            f"{tried[0].trainer_bytes / GIB:.1f} GiB, but a GPU has {gib:.1f} - {TRAINER_RESERVE_GIB:g} "
            "reserve. Raise parallel.tp, parallel.pp or the number of GPUs, or set a number, which is tried."
        )
    return Choice(best.tokens, tuple(tried), why, trouble)


def predict(config: Config, gpus: int, tokens: int) -> Size:
    """What micro-batches of `tokens` cost. Raises ValueError as make_plan does."""
    config = with_tokens(config, tokens)
    counts, seconds, real = [], 0.0, 0.0
    for mean in MEANS:
        lengths, times = _lengths(config, gpus, mean)
        count = _microbatches(config, lengths, times)
        plan = make_plan(config, gpus, sum(lengths) / len(lengths))
        counts.append(count)
        seconds += step_seconds(plan, count) / len(MEANS)
        real += sum(lengths) * times
    pp = config.parallel.pp
    return Size(
        tokens=tokens,
        trainer_bytes=make_plan(config, gpus).trainer_bytes,
        microbatches=tuple(counts),
        seconds=seconds,
        padding=1 - real / (sum(counts) * padded(tokens, config.parallel.tp)),
        fills_pipeline=pp == 1 or min(counts) >= PER_STAGE * pp,
    )


def settled(config: Config, gpus: int) -> Config:
    """The configuration with a number of tokens: its own, or what `auto` takes on GPUs of
    cluster.gpu_memory_gib. Raises ValueError as make_plan does."""
    return config if config.packing.tokens != "auto" else with_tokens(config, planned(config, gpus).tokens)


def planned(config: Config, gpus: int) -> Choice:
    """What `auto` takes on GPUs of cluster.gpu_memory_gib."""
    cluster = config.cluster
    return choose(config, gpus, cluster.gpu_memory_gib * GIB if cluster.gpus_per_node else None)


def with_tokens(config: Config, tokens: int) -> Config:
    packing = config.packing.model_copy(update={"tokens": tokens})
    return config.model_copy(update={"packing": packing})


def advice(config: Config, gpus: int) -> str | None:
    """A line for `plan` where `auto` would take more tokens and three quarters of the time at most."""
    if config.servers.release_memory:
        return None
    tokens, choice = config.packing.size, planned(config, gpus)
    if not choice.sizes or choice.trouble or choice.tokens <= tokens:
        return None
    now, then = (predict(config, gpus, each).seconds for each in (tokens, choice.tokens))
    if then > 0.75 * now:
        return None
    return (
        f"packing.tokens = {tokens}: auto takes {choice.tokens}, a predicted {then:.2f} s of training a step "
        f"in place of {now:.2f}. One micro-batch of 16,384 tokens trained a 0.6B model 7 times as fast as "
        "eight of 2048 did (H200)."
    )


def step_seconds(plan: Plan, microbatches: int) -> float:
    """M micro-batches and the filling of the pipeline; each takes as long as the host needs to launch it, or
    the device to compute it: they work side by side."""
    p, algorithm = plan.config.parallel, plan.config.algorithm
    rounds = algorithm.num_minibatches * (microbatches + (p.pp - 1) / (p.vpp or 1))
    share = padded(plan.config.packing.size, p.tp) / (plan.tokens / plan.dp)
    total = 0.0
    for model in plan.models:
        alone = model.passes - model.updated
        host = model.shape.num_layers / p.pp * (alone * SCORE_LAYER_S + model.updated * UPDATE_LAYER_S)
        total += rounds * max(host, share * work_seconds(plan, model, ASSUMED))
    return total


def _lengths(config: Config, gpus: int, mean: float) -> tuple[list[int], float]:
    """Lengths of a rank's sequences of an optimizer step, log-normal around `mean` times the longest and cut
    there; how many times as many sequences there are."""
    ranks = data_parallel(config, gpus) * config.algorithm.num_minibatches
    sequences = config.rollout.prompts_per_step * config.rollout.samples_per_prompt / ranks
    laid, longest = min(math.ceil(sequences), SAMPLED), float(config.longest_sequence)
    work = Work(sequences=laid, mean_tokens=mean * longest, spread=SPREAD, longest=longest)
    return [math.ceil(length) for length in work.lengths(0)], sequences / laid


def _microbatches(config: Config, lengths: Sequence[int], times: float) -> int:
    packing, p = config.packing, config.parallel
    capacity = padded(packing.size, p.tp) if packing.enabled else 0
    count = math.ceil(len(fill(lengths, capacity, packing.window)) * times)
    return math.ceil(count / p.pp) * p.pp if p.vpp else count


def _on_cpus(config: Config, gpus: int, longest: int) -> int:
    """CPU_TOKENS, or the half of it and so on that fills the pipeline; at least the longest sequence."""
    tokens = max(CPU_TOKENS, longest)
    while tokens > longest and not predict(config, gpus, tokens).fills_pipeline:
        tokens = max(longest, padded(tokens // 2, config.parallel.tp))
    return tokens
