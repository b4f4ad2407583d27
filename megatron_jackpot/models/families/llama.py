"""Llama 2 and 3, and what is shaped like them (SmolLM2): no biases, no norms inside attention."""

from megatron_jackpot.models.families.decoder import Decoder


class Llama(Decoder):
    """HF LlamaForCausalLM."""

    required = {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
