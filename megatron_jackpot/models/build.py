"""HF config.json -> Megatron GPTModel chunks, for policy and actor alike."""

from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_jackpot.config import Parallel, Precision
from megatron_jackpot.config.model_shape import Rope, check_layout
from megatron_jackpot.models import local_layers
from megatron_jackpot.models.families import Family
from megatron_jackpot.models.precision import fp8_fields, recompute_fields
from megatron_jackpot.parallel.context import Mesh

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(
    family: Family, parallel: Parallel, precision: Precision, *, te: bool
) -> TransformerConfig:
    """Megatron's configuration of one model. Raises ValueError where the layout does not divide the model."""
    check_layout(family, parallel)
    dtype = DTYPES[precision.dtype]
    return TransformerConfig(
        **family.transformer_fields(),
        **fp8_fields(precision),
        **recompute_fields(parallel),
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Nothing may rescale the loss: with this Megatron neither divides by micro-batches nor averages over
        # DP.
        calculate_per_token_loss=True,
        # At pp = 2 both neighbours are one rank and a batch of two sends and two receives can pair wrongly.
        batch_p2p_comm=parallel.vpp is None and parallel.pp != 2,
        overlap_p2p_comm=parallel.vpp is not None,
        use_cpu_initialization=not torch.cuda.is_available(),
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        # The unfused one asks the device for every sequence's length, for q and k in every layer.
        apply_rope_fusion=te,
        # The spec names one, Transformer Engine's or ours: Megatron's own form cuts, multiplies and joins.
        use_te_activation_func=True,
        # For Megatron's own linear layers, which need Apex for it; see `add_weight_gradients_in_place`.
        gradient_accumulation_fusion=False,
        perform_initialization=True,
        deterministic_mode=precision.deterministic,
    )


def rope_fields(rope: Rope) -> dict[str, Any]:
    """GPTModel's arguments about rotary embeddings."""
    fields: dict[str, Any] = {"rotary_base": rope.theta}
    if rope.scaling == "linear":
        fields |= {"seq_len_interpolation_factor": rope.factor}
    if rope.scaling == "llama3":
        fields |= {"rope_scaling": True, "rope_scaling_factor": rope.factor}
    return fields


def layer_spec(config: TransformerConfig, *, te: bool, vp_stage: int | None) -> Any:
    """Transformer Engine's layers where it is usable, else Megatron's local layers with ours of
    local_layers.py."""
    if te:
        return get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=config.qk_layernorm, use_te_activation_func=config.use_te_activation_func
        )
    layer: Any = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = local_layers.RMSNorm
    mlp = layer.submodules.mlp
    # megatron-core 0.19 gives a partial.
    parts = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
    parts.activation_func = local_layers.SwiGLU
    layer.submodules.self_attention.module = local_layers.PackedSelfAttention
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = local_layers.PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = local_layers.RMSNorm
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=local_layers.RMSNorm)


def build_chunks(
    family: Family, config: TransformerConfig, mesh: Mesh, *, padded_vocab: int, te: bool
) -> list[GPTModel]:
    """This rank's model chunks (one, or one per virtual pipeline stage), freshly initialised, on the
    device."""
    vpp = config.virtual_pipeline_model_parallel_size
    chunks = []
    for index in range(vpp or 1):
        first = mesh.pp_rank == 0 and index == 0
        last = mesh.is_last_stage and index == (vpp or 1) - 1
        stage = None if vpp is None else index
        chunk = GPTModel(
            config,
            layer_spec(config, te=te, vp_stage=stage),
            vocab_size=padded_vocab,
            max_sequence_length=family.context_length,
            pre_process=first,
            post_process=last,
            position_embedding_type="rope",
            **rope_fields(family.rope),
            share_embeddings_and_output_weights=family.tied,
            vp_stage=stage,
        )
        chunks.append(chunk.to(mesh.device, config.params_dtype))
        if te:
            add_weight_gradients_in_place(chunk)
    return chunks


def add_weight_gradients_in_place(chunk: GPTModel) -> None:
    """Transformer Engine's linear layers add a weight's gradient to DDP's fp32 buffer in their product.

    Nothing is rounded to bf16 on the way, and a launch per weight and micro-batch is saved. Megatron's field
    for it, gradient_accumulation_fusion, would reach its own output layer too, and fail there without Apex.
    """
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            setattr(module, "fuse_wgrad_accumulation", True)  # noqa: B010 - its class is Transformer Engine's


def end_at_hidden(chunk: GPTModel) -> None:
    """From now on a last stage's forward gives the output layer's input [1, T, H] on every rank, not the
    logits.

    The layer is still called, with its hooks: a parameter gather that overlaps waits there. The gradient that
    comes back must be whole on every rank (parallel/linear.py: gradients).
    """
    layer = chunk.output_layer

    def forward(hidden: Tensor, **_unused: Any) -> tuple[Tensor, None]:
        if layer.sequence_parallel:
            gather = tensor_parallel.gather_from_sequence_parallel_region
            hidden = gather(hidden, tensor_parallel_output_grad=False, group=layer.tp_group)
        return hidden, None

    layer.forward = forward


def output_weight(chunk: GPTModel) -> Tensor:
    """This rank's slice of the output layer [V/TP, H], of a last stage; the embedding's where they are
    tied."""
    if chunk.share_embeddings_and_output_weights:
        return chunk.shared_embedding_or_output_weight()
    return chunk.output_layer.weight


def plain(tensor: Tensor) -> Tensor:
    """An fp8 parameter in its high-precision form; any other as it is. Detached."""
    return tensor.dequantize() if hasattr(tensor, "_fp8_dtype") else tensor.detach()


def global_names(chunk: GPTModel) -> dict[str, torch.nn.Parameter]:
    """Parameters of a chunk under names with the global layer index. A tied output weight appears once."""
    offset = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
    names = {}
    for name, parameter in chunk.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, index, rest = name.split(".", 3)
            name = f"decoder.layers.{int(index) + offset}.{rest}"
        elif name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
            # The last stage's copy of a tied embedding: loaded from and exported as the embedding.
            name = "embedding.word_embeddings.weight"
        names[name] = parameter
    return names
