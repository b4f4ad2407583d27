"""Random HF folders of every family, made and named by transformers itself."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_jackpot.config.model_shape import ARCHITECTURES

TYPES = {name: kind.model_type for name, kind in ARCHITECTURES.items()}
# Odd on purpose: head_dim is not hidden_size / heads, and the vocabulary needs padding.
TINY = dict(
    vocab_size=61,
    hidden_size=36,
    intermediate_size=50,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=512,
)


def tiny_config(model_type: str, **changes: Any) -> Any:
    architecture = {kind: name for name, kind in TYPES.items()}[model_type]
    fields = {**TINY, "architectures": [architecture], "bos_token_id": 1, "eos_token_id": 2, **changes}
    return AutoConfig.for_model(model_type, **fields)


def write_hf(
    folder: Path, model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Every parameter is random and far from its initial value, norms and biases too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * 0.2
            parameter.copy_(1 + noise if "norm" in name else noise)
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder
