"""Weights in the fp8 format that Qwen3-FP8 and DeepSeek checkpoints have and SGLang serves: e4m3 with a scale
per block.

Shapes: weight [N, K], its scales [ceil(N / 128), ceil(K / 128)] in fp32 under NAME.weight_scale_inv; value =
fp8 * scale.
Matrices of the transformer layers are quantised, embedding, output layer, norms and biases are not.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_jackpot.servers.served_folder import BLOCK

LARGEST = torch.finfo(torch.float8_e4m3fn).max
SCALE = "_scale_inv"


def quantise(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [N, K], scales fp32): the largest magnitude of a block becomes 448. Not finite values stay so."""
    rows, columns = weight_NK.shape
    shape = (math.ceil(rows / BLOCK), math.ceil(columns / BLOCK))
    padded = weight_NK.new_zeros(shape[0] * BLOCK, shape[1] * BLOCK, dtype=torch.float32)
    padded[:rows, :columns] = weight_NK
    blocks = padded.view(shape[0], BLOCK, shape[1], BLOCK)
    largest = blocks.abs().amax(dim=(1, 3))
    # By a tensor: CUDA divides by a number as a product with its reciprocal, which differs in the last bit.
    scale = torch.where(largest > 0, largest / torch.full_like(largest, LARGEST), 1.0)
    scaled = (blocks / scale[:, None, :, None]).clamp_(-LARGEST, LARGEST).view_as(padded)
    return scaled[:rows, :columns].to(torch.float8_e4m3fn).contiguous(), scale


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
