"""Qwen3 (dense): RMSNorm on queries and keys, no biases."""

from megatron_jackpot.models.families.decoder import Decoder


class Qwen3(Decoder):
    """HF Qwen3ForCausalLM."""

    qk_norm = True
    required = {"attention_bias": False, "use_sliding_window": False}
