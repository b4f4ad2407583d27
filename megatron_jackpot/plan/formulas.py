"""What a run needs, by arithmetic alone: parameters, bytes per GPU, tokens, traffic and FLOPs of a step.

docs/planning.md has the formulas and what they were checked against. Shapes: h hidden, f ffn, q and kv the
widths of all query heads and of all key heads, V vocabulary, L layers, T tokens.
"""

import math
from dataclasses import dataclass

from megatron_jackpot.config import Config, Parallel
from megatron_jackpot.config.model_shape import ModelShape, model_shapes, padded_vocab_size
from megatron_jackpot.config.placement import data_parallel
from megatron_jackpot.config.schema import REFERENCE
from megatron_jackpot.parallel.block_sizes import READ_ELEMENTS

BYTES = {"float32": 4, "bfloat16": 2}
GIB = 2**30
TRAINER_RESERVE_GIB = 4.0
"""CUDA context, NCCL, cuBLAS and fragmentation; an assumption until a run on GPUs replaces it."""
SERVER_SHARE = 0.88
"""Share of a server's GPU for weights and KV cache; SGLang's own default of mem_fraction_static is near
it."""


def layer_split(shape: ModelShape) -> int:
    """Parameters of a layer that tensor parallelism divides."""
    bias = shape.query_size + 2 * shape.key_size if shape.qkv_bias else 0
    return shape.layer_matrices + bias


def layer_copied(shape: ModelShape) -> int:
    """Parameters of a layer that every tensor-parallel rank holds: the norms."""
    return 2 * shape.hidden_size + (2 * shape.head_dim if shape.qk_norm else 0)


def num_params(shape: ModelShape) -> int:
    """Parameters of the HF model."""
    tables = 1 if shape.tied else 2
    layers = shape.num_layers * (layer_split(shape) + layer_copied(shape))
    return tables * shape.vocab_size * shape.hidden_size + layers + shape.hidden_size


def params_on(shape: ModelShape, stage: int, parallel: Parallel, padded_vocab: int) -> int:
    """Parameters that one rank of a pipeline stage holds."""
    layers = shape.num_layers // parallel.pp
    count = layers * (layer_split(shape) // parallel.tp + layer_copied(shape))
    table = padded_vocab // parallel.tp * shape.hidden_size
    last = stage == parallel.pp - 1
    if stage == 0:
        count += table
    if last:
        # A tied embedding has a copy of its own on the last stage, unless that is the first.
        count += shape.hidden_size + (0 if shape.tied and stage == 0 else table)
    return count


def forward_flops(shape: ModelShape, context: float) -> float:
    """FLOPs of a token's forward pass at `context` tokens per sequence, causal attention, head included."""
    matrices = shape.num_layers * layer_split(shape) + shape.hidden_size * shape.vocab_size
    return 2.0 * matrices + 2.0 * shape.num_layers * shape.query_size * context


def activation_elements(shape: ModelShape, parallel: Parallel) -> float:
    """Numbers kept for backward per token and layer: 4 h + (4 q + 3 kv + 5 f) / tp; nothing is recomputed.

    4 h: inputs of both norms and of both column-parallel layers. 4 q + 3 kv: their joint projection,
    Megatron's copy of the queries, queries and keys with rotary positions, attention's output. 5 f: gate and
    up, silu of the gate, Megatron's copy of up, their product.
    """
    wide = 4 * shape.hidden_size / (parallel.tp if parallel.sequence_parallel else 1)
    return wide + (4 * shape.query_size + 3 * shape.key_size + 5 * shape.ffn_size) / parallel.tp


def kv_bytes(shape: ModelShape, tp: int, width: int) -> float:
    """KV cache of one token on one rank of a server; a head is not cut."""
    return 2.0 * shape.num_layers * max(1, shape.num_groups // tp) * shape.head_dim * width


@dataclass(frozen=True)
class ModelPlan:
    """One model on its fullest GPU, in bytes, and its share of a step."""

    name: str
    shape: ModelShape
    params: int
    params_per_gpu: int
    weights: float
    """That stay."""
    visiting: float
    """Weights that are on the device for a pass alone."""
    gradients: float
    optimizer: float
    activations: float
    logits: float
    passes: float
    """Forward passes of a step, the update's own among them."""
    updated: bool
    flops: float
    """Training FLOPs of a step over all GPUs: scoring and update."""
    tp_bytes: float
    """Bytes that one GPU sends to its tensor-parallel peers in a step."""
    dp_bytes: float
    """Bytes that one GPU sends to its data-parallel peers in a step."""

    @property
    def resident(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def transient(self) -> float:
        return self.visiting + self.activations + self.logits


@dataclass(frozen=True)
class Plan:
    """A run on `gpus` training GPUs (processes on a CPU)."""

    config: Config
    gpus: int
    dp: int
    policy: ModelPlan
    actor: ModelPlan | None
    reference: ModelPlan | None
    mean_tokens: float
    """Prompt and response tokens of a sequence, on average."""
    microbatches: int
    """Per optimizer step and data-parallel rank."""
    server_weights: float
    """Bytes of the served model on one GPU of a server."""
    server_kv_token: float
    num_servers: int
    rollout_flops: float
    synced: float
    """Bytes of one weight update, received by every rank of every server."""

    @property
    def models(self) -> tuple[ModelPlan, ...]:
        return tuple(m for m in (self.policy, self.actor, self.reference) if m is not None)

    @property
    def sequences(self) -> int:
        return self.config.rollout.prompts_per_step * self.config.rollout.samples_per_prompt

    @property
    def tokens(self) -> float:
        return self.sequences * self.mean_tokens

    @property
    def trainer_bytes(self) -> float:
        """On the fullest GPU: what stays of every model, and what comes in turns."""
        in_turns = max(self.scoring_bytes, *(m.transient for m in self.models))
        return sum(m.resident for m in self.models) + in_turns

    @property
    def scoring_bytes(self) -> float:
        """What scoring holds beside weights."""
        return self.kept_bytes + max(m.logits for m in self.models)

    @property
    def kept_bytes(self) -> float:
        """Last hidden states of a step's micro-batches that scoring holds at once for q, and for each of
        these passes a copy of the output weight; on the last pipeline stage."""
        p, config = self.config.parallel, self.config
        rows = self.microbatches * config.algorithm.num_minibatches * config.packing.tokens
        weight = padded_vocab_size([m.shape.vocab_size for m in self.models], p.tp) // p.tp
        wide = sum(count * m.shape.hidden_size for m, count in self._kept_passes())
        return (rows + weight) * wide * BYTES[config.precision.dtype]

    def _kept_passes(self) -> list[tuple[ModelPlan, int]]:
        """One of the served model for each version, where several sampled or servers give no top-k; for Z
        over the whole vocabulary one of the policy. The policy alone, of one version, keeps none."""
        config = self.config
        versions = 1 + config.rollout.ahead if scores_q(config) else 1
        if self.actor is None:
            return [(self.policy, versions)] if versions > 1 else []
        older = versions if versions > 1 or config.rollout.top_k_logp == 0 else 0
        return [(self.actor, older), (self.policy, int(exact_z(config)))]

    @property
    def longest(self) -> int:
        return self.config.data.max_prompt_tokens + self.config.rollout.max_new_tokens

    @property
    def server_bytes(self) -> float:
        """The least a server's GPU must hold: weights and the cache of one longest sequence."""
        return self.server_weights + self.longest * self.server_kv_token

    @property
    def ring_bytes(self) -> float:
        """Host memory a GPU takes for the pushed weights that are scored again."""
        age, served = self.config.rollout.max_staleness, self.actor or self.policy
        return (age + 1) * served.weights if age and scores_q(self.config) else 0.0

    @property
    def reference_host(self) -> float:
        """Host memory a GPU takes for the reference: offloaded, and if it is refreshed, copied for saves."""
        section = self.config.policy.reference
        if section is None or self.reference is None:
            return 0.0
        saved = section.refresh_every is not None and self.config.run.save_every is not None
        return (section.offload + saved) * (self.reference.weights + self.reference.visiting)

    @property
    def bubble(self) -> float:
        """Share of a model's pass that its GPUs idle in the pipeline: (pp - 1) / (M vpp + pp - 1)."""
        p = self.config.parallel
        idle = p.pp - 1
        return idle / (self.microbatches * (p.vpp or 1) + idle)


def make_plan(config: Config, gpus: int, mean_tokens: float | None = None) -> Plan:
    """The plan on `gpus` training GPUs; `mean_tokens` per sequence, by default the longest allowed.

    Raises ValueError naming the field where the layout divides neither the GPUs nor a model.
    """
    p = config.parallel
    dp = data_parallel(config, gpus)
    shapes = model_shapes(config)
    rollout = config.rollout
    mean = mean_tokens or float(config.data.max_prompt_tokens + rollout.max_new_tokens)
    tokens = rollout.prompts_per_step * rollout.samples_per_prompt * mean
    microbatches = math.ceil(tokens / dp / config.algorithm.num_minibatches / config.packing.size)
    if p.vpp:
        microbatches = math.ceil(microbatches / p.pp) * p.pp
    padded = padded_vocab_size([shape.vocab_size for shape in shapes.values()], p.tp)
    load = _Load(config, dp, padded, mean, tokens, microbatches)
    served, width = shapes[config.served], BYTES[config.server_dtype]
    return Plan(
        config=config,
        gpus=gpus,
        dp=dp,
        policy=load.plan("policy", shapes["policy"]),
        actor=load.plan("actor", shapes["actor"]) if "actor" in shapes else None,
        reference=load.reference(shapes.get(REFERENCE, shapes["policy"])),
        mean_tokens=mean,
        microbatches=microbatches,
        server_weights=num_params(served) * width / config.servers.tp,
        server_kv_token=kv_bytes(served, config.servers.tp, width),
        num_servers=config.servers.num * config.cluster.num_server_nodes,
        rollout_flops=tokens * forward_flops(served, mean),
        synced=num_params(served) * BYTES[config.precision.dtype],
    )


def scores_q(config: Config) -> bool:
    """Whether q is taken from the trainer's scores, and older weights are kept for it; not where a correction
    of one's own asks for that."""
    return config.rollout.top_k_logp == 0 or exact_z(config)


def exact_z(config: Config) -> bool:
    """Whether Z is summed over the whole vocabulary."""
    return config.algorithm.correction.settings.get("z") == "exact"


@dataclass(frozen=True)
class _Load:
    """What the models' plans share."""

    config: Config
    dp: int
    padded_vocab: int
    mean_tokens: float
    tokens: float
    microbatches: int

    def plan(self, name: str, shape: ModelShape) -> ModelPlan:
        p, width = self.config.parallel, BYTES[self.config.precision.dtype]
        own = max(params_on(shape, stage, p, self.padded_vocab) for stage in range(p.pp))
        updated = name == "policy" or self.config.algorithm.train_actor
        passes = self._forward_passes(name)
        rows = self.config.packing.size
        kept = rows * shape.num_layers * self._in_flight() * activation_elements(shape, p) * width
        # AdamW's two moments, and fp32 masters where the parameters themselves are not fp32.
        states = (8.0 if width == 4 else 12.0) * own
        dense = forward_flops(shape, self.mean_tokens)
        # Two all-reduces a layer forward and two backward; a ring sends 2 (n - 1) / n of what it reduces.
        times = 2.0 * passes + 2.0 * updated
        reduced = times * shape.num_layers / p.pp * self.tokens / self.dp * shape.hidden_size
        # Gradients travel in fp32; a distributed optimizer scatters them and gathers parameters.
        back = width if p.distributed_optimizer else 4.0
        return ModelPlan(
            name=name,
            shape=shape,
            params=num_params(shape),
            params_per_gpu=own,
            weights=own * width,
            visiting=0.0,
            gradients=own * 4.0,
            optimizer=states / (self.dp if p.distributed_optimizer else 1),
            activations=kept if updated else 0.0,
            logits=self._logits(rows, updated) * width,
            passes=passes,
            updated=updated,
            flops=(passes + 2.0 * updated) * self.tokens * dense,
            tp_bytes=2.0 * (p.tp - 1) / p.tp * reduced * width,
            dp_bytes=updated
            * self.config.algorithm.num_minibatches
            * (self.dp - 1)
            / self.dp
            * own
            * (4.0 + back),
        )

    def reference(self, shape: ModelShape) -> ModelPlan | None:
        """A forward pass a step and the weights, on the host between passes where they are offloaded; nothing
        else."""
        section = self.config.policy.reference
        if section is None:
            return None
        p, width = self.config.parallel, BYTES[self.config.precision.dtype]
        own = max(params_on(shape, stage, p, self.padded_vocab) for stage in range(p.pp))
        reduced = 2.0 * shape.num_layers / p.pp * self.tokens / self.dp * shape.hidden_size
        return ModelPlan(
            name="reference",
            shape=shape,
            params=num_params(shape),
            params_per_gpu=own,
            weights=0.0 if section.offload else float(own * width),
            visiting=float(own * width) if section.offload else 0.0,
            gradients=0.0,
            optimizer=0.0,
            activations=0.0,
            logits=self._logits(self.config.packing.size, False) * width,
            passes=1.0,
            updated=False,
            flops=self.tokens * forward_flops(shape, self.mean_tokens),
            tp_bytes=2.0 * (p.tp - 1) / p.tp * reduced * width,
            dp_bytes=0.0,
        )

    def _logits(self, rows: int, updated: bool) -> float:
        """Logits that exist at once on a GPU: a block, or all of a micro-batch and in an update their
        gradient."""
        whole = rows * self.padded_vocab / self.config.parallel.tp
        if self.config.precision.fused_linear:
            return min(whole, READ_ELEMENTS["cuda"])
        return (2.0 if updated else 1.0) * whole

    def _forward_passes(self, name: str) -> float:
        """Scoring once, the update's own forward, and another of all minis but the first under target =
        current; where q is taken from scores, one with each older version that sampled."""
        algorithm = self.config.algorithm
        older = self.config.rollout.ahead if name == self.config.served and scores_q(self.config) else 0
        if name == "actor":
            return older + (2.0 if algorithm.train_actor else 1.0)
        minis = algorithm.num_minibatches
        return older + 2.0 + ((minis - 1) / minis if algorithm.target == "current" else 0.0)

    def _in_flight(self) -> float:
        """Micro-batches whose activations the first pipeline stage holds, as a share of all layers."""
        p = self.config.parallel
        if p.vpp:
            return 1.0 + (p.pp - 1) / (p.pp * p.vpp)
        return min(p.pp, self.microbatches) / p.pp
