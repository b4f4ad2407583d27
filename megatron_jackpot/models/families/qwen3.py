"""Qwen3 (dense): RMSNorm on queries and keys, SwiGLU, grouped-query attention, no biases."""

from typing import Any

import torch

from megatron_jackpot.models.families.base import Family, Kind

LAYER = "decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."


class Qwen3(Family):
    """HF Qwen3ForCausalLM."""

    def transformer_fields(self) -> dict[str, Any]:
        """Raises ValueError for a field that changes the mathematics and is not supported."""
        hf = self.hf_config
        for field, wanted in {
            "attention_bias": False,
            "use_sliding_window": False,
            "hidden_act": "silu",
        }.items():
            if hf.get(field, wanted) != wanted:
                raise ValueError(
                    f"config.json: {field} = {hf[field]!r} is not supported for Qwen3, only {wanted!r}."
                )
        if hf.get("attention_dropout", 0.0) != 0.0:
            raise ValueError(
                f"config.json: attention_dropout = {hf['attention_dropout']} must be 0: with dropout the trainer's "
                "log-probs differ from the server's."
            )
        return dict(
            num_layers=hf["num_hidden_layers"],
            hidden_size=hf["hidden_size"],
            ffn_hidden_size=hf["intermediate_size"],
            num_attention_heads=hf["num_attention_heads"],
            num_query_groups=hf["num_key_value_heads"],
            kv_channels=self.head_dim,
            layernorm_epsilon=hf["rms_norm_eps"],
            normalization="RMSNorm",
            qk_layernorm=True,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            add_qkv_bias=False,
            init_method_std=hf.get("initializer_range", 0.02),
        )

    def kinds(self) -> tuple[Kind, ...]:
        attention, hf_attention = LAYER + "self_attention.", HF_LAYER + "self_attn."
        projections = tuple(f"{hf_attention}{p}_proj.weight" for p in "qkv")
        gate_up = tuple(f"{HF_LAYER}mlp.{p}_proj.weight" for p in ("gate", "up"))
        layers = (
            Kind(
                (LAYER + "input_layernorm.weight", attention + "linear_qkv.layer_norm_weight"),
                (HF_LAYER + "input_layernorm.weight",),
            ),
            Kind((attention + "linear_qkv.weight",), projections, 0, "qkv"),
            Kind((attention + "q_layernorm.weight",), (hf_attention + "q_norm.weight",)),
            Kind((attention + "k_layernorm.weight",), (hf_attention + "k_norm.weight",)),
            Kind((attention + "linear_proj.weight",), (hf_attention + "o_proj.weight",), 1),
            Kind(
                (LAYER + "pre_mlp_layernorm.weight", LAYER + "mlp.linear_fc1.layer_norm_weight"),
                (HF_LAYER + "post_attention_layernorm.weight",),
            ),
            Kind((LAYER + "mlp.linear_fc1.weight",), gate_up, 0, "glu"),
            Kind((LAYER + "mlp.linear_fc2.weight",), (HF_LAYER + "mlp.down_proj.weight",), 1),
        )
        ends = (
            Kind(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), 0, "vocab"),
            Kind(("decoder.final_layernorm.weight",), ("model.norm.weight",)),
        )
        head = () if self.tied else (Kind(("output_layer.weight",), ("lm_head.weight",), 0, "vocab"),)
        return ends[:1] + layers + ends[1:] + head
