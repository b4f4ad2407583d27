"""What Qwen2, Qwen3 and Llama share: RMSNorm before attention and MLP, grouped queries, rotary positions,
SwiGLU."""

from functools import cached_property
from typing import Any

import torch

from megatron_jackpot.models.families.base import Family, Kind

LAYER = "decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."


class Decoder(Family):
    """Which of these a model has, biases and norms inside attention, its shape says."""

    def transformer_fields(self) -> dict[str, Any]:
        """Keyword arguments of Megatron's TransformerConfig that the architecture fixes."""
        return dict(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_size,
            num_attention_heads=self.num_heads,
            num_query_groups=self.num_groups,
            kv_channels=self.head_dim,
            layernorm_epsilon=self.norm_eps,
            normalization="RMSNorm",
            qk_layernorm=self.qk_norm,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            add_qkv_bias=self.qkv_bias,
            init_method_std=self.init_std,
        )

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        hidden, vocab = self.hidden_size, self.vocab_size
        embedding = Kind(
            ("embedding.word_embeddings.weight",),
            ("model.embed_tokens.weight",),
            ((vocab, hidden),),
            0,
            "vocab",
        )
        final_norm = Kind(("decoder.final_layernorm.weight",), ("model.norm.weight",), ((hidden,),))
        head = Kind(("output_layer.weight",), ("lm_head.weight",), ((vocab, hidden),), 0, "vocab")
        ends = (final_norm,) if self.tied else (final_norm, head)
        return (embedding, *self._attention(), *self._mlp(), *ends)

    def _attention(self) -> tuple[Kind, ...]:
        ours, theirs = LAYER + "self_attention.", HF_LAYER + "self_attn."
        hidden, dim = self.hidden_size, self.head_dim
        rows = (self.query_size, self.key_size, self.key_size)
        weights, biases = (tuple(f"{theirs}{p}_proj.{what}" for p in "qkv") for what in ("weight", "bias"))
        kinds = [
            Kind(
                (LAYER + "input_layernorm.weight", ours + "linear_qkv.layer_norm_weight"),
                (HF_LAYER + "input_layernorm.weight",),
                ((hidden,),),
            ),
            Kind((ours + "linear_qkv.weight",), weights, tuple((row, hidden) for row in rows), 0, "qkv"),
        ]
        if self.qkv_bias:
            kinds.append(Kind((ours + "linear_qkv.bias",), biases, tuple((row,) for row in rows), 0, "qkv"))
        if self.qk_norm:
            for p in "qk":
                kinds.append(Kind((f"{ours}{p}_layernorm.weight",), (f"{theirs}{p}_norm.weight",), ((dim,),)))
        kinds.append(
            Kind((ours + "linear_proj.weight",), (theirs + "o_proj.weight",), ((hidden, rows[0]),), 1)
        )
        return tuple(kinds)

    def _mlp(self) -> tuple[Kind, ...]:
        hidden, ffn = self.hidden_size, self.ffn_size
        gate_up = tuple(f"{HF_LAYER}mlp.{p}_proj.weight" for p in ("gate", "up"))
        return (
            Kind(
                (LAYER + "pre_mlp_layernorm.weight", LAYER + "mlp.linear_fc1.layer_norm_weight"),
                (HF_LAYER + "post_attention_layernorm.weight",),
                ((hidden,),),
            ),
            Kind((LAYER + "mlp.linear_fc1.weight",), gate_up, ((ffn, hidden),) * 2, 0, "glu"),
            Kind(
                (LAYER + "mlp.linear_fc2.weight",), (HF_LAYER + "mlp.down_proj.weight",), ((hidden, ffn),), 1
            ),
        )
