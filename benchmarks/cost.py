"""GPU-seconds of a step of on-policy RL and of its cheap-actor forms, by arithmetic with stated sources.

    python benchmarks/cost.py [--prompt 256] [--response 4096] [--sequences 512] [--samples 8]

Nothing here was measured on these pairs. A step's work is decode, prefill, top-k, every scoring pass that is
run, forward and backward of every trained model on all tokens (rejected ones too), the push, and the actor's
making spread over a run. `serial`: servers and trainer wait for each other; `overlapped`: neither ever does.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_jackpot.config.model_shape import ModelShape
from megatron_jackpot.plan.formulas import forward_flops, kv_bytes, layer_split, num_params


@dataclass(frozen=True)
class Hardware:
    """One GPU. The defaults are an H100 SXM: dense bf16 and HBM3 by NVIDIA's data sheet. The shares are
    assumptions; prime-rl's own documents have 11 to 35% in training (August 2026)."""

    flops: float = 989e12
    bandwidth: float = 3.35e12
    training_share: float = 0.35
    prefill_share: float = 0.5
    decode_share: float = 0.6
    """Of the bandwidth, and of the peak, whichever binds."""
    link: float = 50e9
    """Bytes per second of a push, to every server at once: one 400 Gbit/s port."""


@dataclass(frozen=True)
class Load:
    """A step's rollouts. Lengths are means, in tokens."""

    prompt: float
    response: float
    sequences: int
    samples: int
    """Of one prompt: its prefill is shared."""
    concurrency: int
    """Sequences that one GPU decodes at once."""

    @property
    def tokens(self) -> float:
        return self.sequences * (self.prompt + self.response)


@dataclass(frozen=True)
class Method:
    """What a step runs."""

    name: str
    policy_scoring: int
    """Forward passes of the policy without gradient."""
    actor_scoring: int
    actor_trained: bool
    rejects: bool
    """Whether tokens that are not accepted teach nothing."""
    topk_slowdown: float = 1.0
    """Decode seconds with the server's top-k over those without: 1 where the trainer's own scoring pass gives
    the candidates. On an H200 a 0.6B server fell from 28,300 to 11,900 tokens a second with k = 20
    (benchmarks/results/2026-11-27-h200.md)."""


METHODS = (
    Method("on_policy", policy_scoring=0, actor_scoring=0, actor_trained=False, rejects=False),
    # The teacher of the distillation is the policy's scoring pass, whatever the correction is.
    Method("none", policy_scoring=1, actor_scoring=1, actor_trained=True, rejects=False),
    Method("tis", policy_scoring=1, actor_scoring=1, actor_trained=True, rejects=False),
    Method("icepop", policy_scoring=1, actor_scoring=1, actor_trained=True, rejects=True),
    Method("jackpot", policy_scoring=1, actor_scoring=1, actor_trained=True, rejects=True),
    Method(
        "jackpot, server's top-k",
        policy_scoring=1,
        actor_scoring=1,
        actor_trained=True,
        rejects=True,
        topk_slowdown=28_300 / 11_900,
    ),
)
BYTES = 2.0
"""Of a weight and of a cached number: bf16."""


@dataclass(frozen=True)
class Cost:
    """GPU-seconds of a step, busy time only."""

    decode: float
    prefill: float
    scoring: float
    training: float
    push: float
    making: float

    @property
    def rollout(self) -> float:
        return self.decode + self.prefill

    @property
    def learning(self) -> float:
        return self.scoring + self.training

    @property
    def busy(self) -> float:
        return self.rollout + self.learning + self.push + self.making


def decode_seconds(shape: ModelShape, load: Load, gpu: Hardware) -> float:
    """GPU-seconds of all responses: a forward of `concurrency` tokens for each position, at the mean context;
    the larger of FLOPs / peak and (weights + caches) / bandwidth."""
    context = load.prompt + load.response / 2
    flops = load.concurrency * token_flops(shape, context)
    weights = BYTES * num_params(shape)
    cache = load.concurrency * context * kv_bytes(shape, 1, int(BYTES))
    position_s = max(flops / gpu.flops, (weights + cache) / gpu.bandwidth) / gpu.decode_share
    return position_s * load.response * load.sequences / load.concurrency


def token_flops(shape: ModelShape, context: float) -> float:
    """FLOPs of one token's forward that looks back at `context` tokens: 2 per weight, 4 q per layer and token
    looked at."""
    matrices = shape.num_layers * layer_split(shape) + shape.hidden_size * shape.vocab_size
    return 2.0 * matrices + 4.0 * shape.num_layers * shape.query_size * context


def prefill_seconds(shape: ModelShape, load: Load, gpu: Hardware) -> float:
    """GPU-seconds of the prompts, once for each group."""
    tokens = load.sequences / load.samples * load.prompt
    return tokens * forward_flops(shape, load.prompt) / (gpu.flops * gpu.prefill_share)


def pass_seconds(shape: ModelShape, load: Load, gpu: Hardware) -> float:
    """GPU-seconds of a trainer's forward over all tokens of the step."""
    return load.tokens * forward_flops(shape, load.prompt + load.response) / (gpu.flops * gpu.training_share)


def step_cost(
    method: Method,
    policy: ModelShape,
    actor: ModelShape,
    load: Load,
    gpu: Hardware,
    *,
    making: float = 0.0,
) -> Cost:
    """Of one step; backward counts as two forwards. `making`: the actor's GPU-seconds, a step's share."""
    served = policy if method.name == "on_policy" else actor
    own, other = pass_seconds(policy, load, gpu), pass_seconds(actor, load, gpu)
    return Cost(
        decode=decode_seconds(served, load, gpu) * method.topk_slowdown,
        prefill=prefill_seconds(served, load, gpu),
        scoring=method.policy_scoring * own + method.actor_scoring * other,
        training=3.0 * own + (3.0 * other if method.actor_trained else 0.0),
        push=BYTES * num_params(served) / gpu.link,
        making=making if served is actor else 0.0,
    )


def timeline(cost: Cost, rollout_gpus: float, trainer_gpus: float) -> tuple[float, float]:
    """GPU-seconds of a step with idle ones: (one after the other, perfectly overlapped)."""
    rollout, learning = cost.rollout / rollout_gpus, cost.learning / trainer_gpus
    pool = rollout_gpus + trainer_gpus
    rest = cost.making + pool * cost.push
    return pool * (rollout + learning) + rest, pool * max(rollout, learning) + rest


def balanced(cost: Cost, gpus: float) -> tuple[float, float]:
    """`timeline` of `gpus`, divided so that neither side waits when both work at once."""
    mine = gpus * cost.rollout / (cost.rollout + cost.learning)
    return timeline(cost, mine, gpus - mine)


def per_useful(cost: float, acceptance: float, method: Method) -> float:
    """Cost for each step's worth of tokens that teach: rejected ones are paid for all the same. That
    an accepted token is worth one of on-policy is an assumption, and the best case."""
    if not 0 < acceptance <= 1:
        raise ValueError(f"acceptance = {acceptance}: must lie in (0, 1].")
    return cost / acceptance if method.rejects else cost


def break_even(cost: float, on_policy: float) -> float:
    """The acceptance above which a method that rejects is cheaper for each useful token than on-policy."""
    return cost / on_policy


def qwen(version: int, **sizes: int | bool) -> ModelShape:
    """Of config.json's sizes, vocabulary 151936, heads of 128."""
    name, kind = ("Qwen2ForCausalLM", "qwen2") if version == 2 else ("Qwen3ForCausalLM", "qwen3")
    fixed = dict(vocab_size=151936, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6, hidden_act="silu")
    context = dict(max_position_embeddings=32768)
    return ModelShape.of({"architectures": [name], "model_type": kind, **fixed, **context, **sizes})


def _sizes(layers: int, hidden: int, ffn: int, heads: int, groups: int, tied: bool) -> dict[str, int | bool]:
    return dict(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=tied,
    )


PAIRS = {
    "Qwen2.5 1.5B -> 3B": (
        qwen(2, **_sizes(28, 1536, 8960, 12, 2, True)),
        qwen(2, **_sizes(36, 2048, 11008, 16, 2, True)),
    ),
    "Qwen3 1.7B -> 4B": (
        qwen(3, **_sizes(28, 2048, 6144, 16, 8, True)),
        qwen(3, **_sizes(36, 2560, 9728, 32, 8, True)),
    ),
    "Qwen3 1.7B -> 8B": (
        qwen(3, **_sizes(28, 2048, 6144, 16, 8, True)),
        qwen(3, **_sizes(36, 4096, 12288, 32, 8, False)),
    ),
}
"""The paper's pairs, actor and policy, as their config.json has them."""
ACCEPTANCES = (0.3, 0.5, 0.7, 0.9)


def table(load: Load, gpu: Hardware, gpus: float = 8.0) -> list[str]:
    """Markdown: a row for each pair and method."""
    head = (
        "pair",
        "method",
        "decode",
        "prefill",
        "scoring",
        "training",
        "push",
        "busy",
        "serial",
        "overlapped",
    )
    lines = [_row([*head, *(f"at {a:g}" for a in ACCEPTANCES), "break-even"])]
    lines.append(_row(["---"] * (len(head) + len(ACCEPTANCES) + 1)))
    for pair, (actor, policy) in PAIRS.items():
        base = balanced(step_cost(METHODS[0], policy, actor, load, gpu), gpus)[1]
        for method in METHODS:
            cost = step_cost(method, policy, actor, load, gpu)
            serial, overlapped = balanced(cost, gpus)
            parts = (cost.decode, cost.prefill, cost.scoring, cost.training, cost.push)
            shares = [f"{per_useful(overlapped, a, method) / base:.2f}" for a in ACCEPTANCES]
            seconds = [f"{value:.1f}" for value in (*parts, cost.busy, serial, overlapped)]
            even = f"{break_even(overlapped, base):.2f}" if method.rejects else ""
            lines.append(_row([pair, method.name, *seconds, *shares, even]))
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    load = Load(prompt=256, response=4096, sequences=512, samples=8, concurrency=128)
    for name, value in vars(load).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    load = replace(load, **vars(parser.parse_args()))
    print(
        f"{load}, {Hardware()}. GPU-seconds of a step on 8 GPUs. `at a`: overlapped, for each useful token,"
    )
    print("over on-policy's; a is the acceptance.\n")
    print("\n".join(table(load, Hardware())))


if __name__ == "__main__":
    main()
