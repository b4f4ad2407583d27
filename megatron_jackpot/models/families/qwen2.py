"""Qwen2 and Qwen2.5 (dense): biases on queries, keys and values."""

from megatron_jackpot.models.families.decoder import Decoder


class Qwen2(Decoder):
    """HF Qwen2ForCausalLM."""

    qkv_bias = True
    required = {"use_sliding_window": False}
