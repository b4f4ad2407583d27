"""The folder that servers start from: the served model's, or one whose config.json asks for fp8. No torch.

The format is that of Qwen3-FP8 and DeepSeek checkpoints; sync/fp8.py makes its numbers.
"""

import json
from pathlib import Path

from megatron_jackpot.config import Config
from megatron_jackpot.config.model_folder import copy_other_files, read_hf_config
from megatron_jackpot.config.model_shape import ModelShape

BLOCK = 128
"""Rows and columns of a weight that share a scale."""
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
"""quantization_config of such a checkpoint's config.json."""


def served_folder(config: Config) -> Path:
    """The served model's folder, or where servers hold fp8 RUN/served-fp8.

    The latter is written here: config.json with the quantisation and the model's tokenizer; the first push
    brings the weights. Raises ValueError for sizes that the servers cannot cut at blocks.
    """
    if config.servers.quantization is None:
        return config.served_hf
    tree = read_hf_config(config.served_hf)
    _check_sizes(ModelShape.of(tree), config.servers.tp)
    folder = config.run.folder / "served-fp8"
    folder.mkdir(parents=True, exist_ok=True)
    copy_other_files(config.served_hf, folder)
    quantised = {**tree, "quantization_config": QUANTIZATION}
    (folder / "config.json").write_text(json.dumps(quantised, indent=2) + "\n", encoding="utf-8")
    return folder


def _check_sizes(shape: ModelShape, tp: int) -> None:
    sizes = {
        "intermediate_size": shape.ffn_size,
        "num_attention_heads * head_dim": shape.query_size,
        "num_key_value_heads * head_dim": shape.key_size,
    }
    for name, size in sizes.items():
        if size % (BLOCK * tp):
            raise ValueError(
                f"servers.quantization = 'fp8' needs {name} = {size} to be a multiple of {BLOCK} * "
                f"servers.tp = {BLOCK * tp}. Lower servers.tp, or set servers.quantization to null."
            )
