"""Weights in the fp8 format that Qwen3-FP8 and DeepSeek checkpoints have and SGLang serves: e4m3 with a scale
per block.

Shapes: weight [N, K], its scales [ceil(N / 128), ceil(K / 128)] in fp32 under NAME.weight_scale_inv; value =
fp8 * scale.
Matrices of the transformer layers are quantised, embedding, output layer, norms and biases are not.
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_jackpot.config import Config
from megatron_jackpot.config.model_folder import read_hf_config
from megatron_jackpot.models.hf_folder import copy_other_files

BLOCK = 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max
CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
"""quantization_config of such a checkpoint's config.json."""
SCALE = "_scale_inv"


def quantise(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [N, K], scales fp32): the largest magnitude of a block becomes 448. Not finite values stay so."""
    rows, columns = weight_NK.shape
    shape = (math.ceil(rows / BLOCK), math.ceil(columns / BLOCK))
    padded = weight_NK.new_zeros(shape[0] * BLOCK, shape[1] * BLOCK, dtype=torch.float32)
    padded[:rows, :columns] = weight_NK
    blocks = padded.view(shape[0], BLOCK, shape[1], BLOCK)
    largest = blocks.abs().amax(dim=(1, 3))
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    scaled = (blocks / scale[:, None, :, None]).clamp_(-LARGEST, LARGEST).view_as(padded)
    return scaled[:rows, :columns].to(torch.float8_e4m3fn).contiguous(), scale


def dequantise(fp8_NK: Tensor, scale: Tensor) -> Tensor:
    """The values in fp32, as the server sees them."""
    rows, columns = fp8_NK.shape
    whole = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return fp8_NK.float() * whole


def is_quantised(name: str) -> bool:
    return name.endswith("_proj.weight")


def quantised(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """HF-named tensors in the format of the servers. What is small comes last: a bucket holds one dtype."""
    small = []
    for name, tensor in named_tensors:
        if is_quantised(name):
            fp8, scale = quantise(tensor)
            small.append((name + SCALE, scale))
            yield name, fp8
        elif tensor.dim() == 1:
            small.append((name, tensor))
        else:
            yield name, tensor
    yield from sorted(small, key=lambda pair: str(pair[1].dtype))


def quantised_shapes(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Name -> shape of what `quantised` gives."""
    scales = {
        name + SCALE: [math.ceil(size / BLOCK) for size in shape]
        for name, shape in shapes.items()
        if is_quantised(name)
    }
    return {**shapes, **scales}


def served_folder(config: Config) -> Path:
    """The folder whose config.json the servers start from: the actor's, or where they serve fp8
    RUN/actor-fp8.

    The latter is written here: config.json with the quantisation and the actor's tokenizer; the first push
    brings the weights. Raises ValueError for sizes that the servers cannot cut at blocks.
    """
    if config.servers.quantization is None:
        return config.actor.hf
    _check_sizes(read_hf_config(config.actor.hf), config.servers.tp)
    folder = config.run.folder / "actor-fp8"
    folder.mkdir(parents=True, exist_ok=True)
    copy_other_files(config.actor.hf, folder)
    tree = json.loads((config.actor.hf / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, "quantization_config": CONFIG}, indent=2) + "\n")
    return folder


def _check_sizes(hf_config: dict, tp: int) -> None:
    heads = hf_config.get("head_dim") or hf_config["hidden_size"] // hf_config["num_attention_heads"]
    sizes = {
        "intermediate_size": hf_config["intermediate_size"],
        "num_attention_heads * head_dim": hf_config["num_attention_heads"] * heads,
        "num_key_value_heads * head_dim": hf_config["num_key_value_heads"] * heads,
    }
    for name, size in sizes.items():
        if size % (BLOCK * tp):
            raise ValueError(
                f"servers.quantization = 'fp8' needs {name} = {size} to be a multiple of {BLOCK} * "
                "servers.tp = "
                f"{BLOCK * tp}. Lower servers.tp, or set servers.quantization to null."
            )
