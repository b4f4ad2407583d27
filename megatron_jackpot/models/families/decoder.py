"""What Qwen2, Qwen3 and Llama share: RMSNorm before attention and MLP, grouped queries, rotary positions,
SwiGLU."""

from functools import cached_property
from typing import Any, ClassVar

import torch

from megatron_jackpot.models.families.base import Family, Kind

LAYER = "decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."


class Decoder(Family):
    """A family is this class with its biases and norms, and with the config.json fields it must find as they
    are."""

    qk_norm: ClassVar[bool] = False
    """RMSNorm on queries and keys."""
    qkv_bias: ClassVar[bool] = False
    """Biases on the query, key and value projections."""
    required: ClassVar[dict[str, Any]] = {}
    """config.json field -> the only supported value, which a missing field counts as."""

    def transformer_fields(self) -> dict[str, Any]:
        """Raises ValueError for a field that changes the mathematics and is not supported."""
        hf = self.hf_config
        self.check()
        return dict(
            num_layers=self.num_layers,
            hidden_size=hf["hidden_size"],
            ffn_hidden_size=hf["intermediate_size"],
            num_attention_heads=self.num_heads,
            num_query_groups=self.num_groups,
            kv_channels=self.head_dim,
            layernorm_epsilon=hf["rms_norm_eps"],
            normalization="RMSNorm",
            qk_layernorm=self.qk_norm,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            add_qkv_bias=self.qkv_bias,
            init_method_std=hf.get("initializer_range", 0.02),
        )

    def check(self) -> None:
        hf, _ = self.hf_config, self.rope
        for field, wanted in {"hidden_act": "silu", "quantization_config": None, **self.required}.items():
            if hf.get(field, wanted) != wanted:
                raise ValueError(
                    f"config.json: {field} = {hf[field]!r} is not supported for {type(self).__name__}, "
                    f"only {wanted!r}."
                )
        if hf.get("attention_dropout", 0.0) != 0.0:
            raise ValueError(
                f"config.json: attention_dropout = {hf['attention_dropout']} must be 0: with dropout the "
                "trainer's "
                "log-probs differ from the server's."
            )
        kinds = set(hf.get("layer_types") or []) - {"full_attention"}
        if kinds:
            raise ValueError(
                f"config.json: layer_types holds {sorted(kinds)}, only 'full_attention' is supported."
            )
        if self.num_heads % self.num_groups:
            raise ValueError(
                f"config.json: num_key_value_heads = {self.num_groups} does not divide "
                f"num_attention_heads = {self.num_heads}."
            )

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        hidden, vocab = self.hf_config["hidden_size"], self.vocab_size
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
        hidden, dim = self.hf_config["hidden_size"], self.head_dim
        rows = (self.num_heads * dim, self.num_groups * dim, self.num_groups * dim)
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
        hidden, ffn = self.hf_config["hidden_size"], self.hf_config["intermediate_size"]
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
