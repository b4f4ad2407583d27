"""What a device can do: which layers a model is built of, and fp8 that would fail or be silently ignored,
refused.

The rules are those of Transformer Engine 2.20 (pytorch/quantization.py) and of Megatron-core's choice of a
recipe (fp8_utils.get_fp8_recipe); versions are compared as tuples.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_jackpot.config import Parallel, Precision
from megatron_jackpot.config.model_shape import ModelShape

Layers = Literal["transformer_engine", "local"]

FIRST_TE = {"delayed": (1, 0), "tensorwise": (2, 2), "blockwise": (2, 3)}
"""Oldest Transformer Engine that has a scaling recipe."""
FP8_MULTIPLE = 16
"""Both dimensions of an fp8 matrix product must be multiples of this."""


@dataclass(frozen=True)
class Device:
    """What the rules look at; None is absent."""

    capability: tuple[int, int] | None = None
    """torch.cuda.get_device_capability()."""
    cuda: tuple[int, ...] | None = None
    """The CUDA version torch was built with."""
    te: tuple[int, ...] | None = None
    """The version of Transformer Engine, where it imports."""


def this_device() -> Device:
    """Of this process and its current CUDA device."""
    from megatron.core.models.gpt import gpt_layer_specs

    te = None
    if gpt_layer_specs.HAVE_TE:
        from megatron.core.utils import get_te_version

        te = get_te_version().release
    if not torch.cuda.is_available():
        return Device(te=te)
    cuda = tuple(int(part) for part in (torch.version.cuda or "0").split("."))
    return Device(torch.cuda.get_device_capability(), cuda, te)


def layers_for(device: Device) -> Layers:
    """Transformer Engine's layers where it imports and there is CUDA, else Megatron's local layers."""
    return "transformer_engine" if device.te is not None and device.capability is not None else "local"


def check_precision(precision: Precision, device: Device, shape: ModelShape, tp: int) -> None:
    """Refuse what Megatron would silently ignore and what Transformer Engine would refuse in the first step.

    Raises ValueError with the remedy.
    """
    if precision.fp8 is None:
        for field in ("fp8_param", "first_last_layers_bf16"):
            if getattr(precision, field):
                raise ValueError(
                    f"precision.{field} = true needs precision.fp8='hybrid' or 'e4m3', got null."
                )
        return
    _check_device(precision, device)
    if precision.dtype != "bfloat16":
        raise ValueError(
            f"precision.fp8 = '{precision.fp8}' needs precision.dtype='bfloat16', got '{precision.dtype}'."
        )
    for name, size in _fp8_sizes(shape, tp).items():
        if size % FP8_MULTIPLE:
            raise ValueError(
                f"precision.fp8 = '{precision.fp8}' needs matrices of multiples of {FP8_MULTIPLE}, but "
                f"{name} = {size} "
                f"at parallel.tp = {tp}. Lower parallel.tp or set precision.fp8 to null."
            )


def _check_device(precision: Precision, device: Device) -> None:
    asked, recipe = f"precision.fp8 = '{precision.fp8}'", precision.fp8_recipe
    if device.capability is None:
        raise ValueError(
            f"{asked} needs a GPU with fp8 (compute capability 8.9 or newer), got none. Set it to null."
        )
    if device.capability < (8, 9):
        raise ValueError(
            f"{asked} needs compute capability 8.9 or newer, got {device.capability}. Set it to null."
        )
    if device.te is None:
        raise ValueError(
            f"{asked} needs Transformer Engine, which does not import here. Install the [gpu] extra."
        )
    if device.te < FIRST_TE[recipe]:
        raise ValueError(
            f"precision.fp8_recipe = '{recipe}' needs Transformer Engine {_dotted(FIRST_TE[recipe])} or "
            "newer, got "
            f"{_dotted(device.te)}. Install the [gpu] extra or set it to 'delayed'."
        )
    if recipe == "blockwise" and (device.capability < (9, 0) or (device.cuda or (0,)) < (12, 9)):
        raise ValueError(
            f"precision.fp8_recipe = 'blockwise' needs compute capability 9.0 and CUDA 12.9 or newer, got "
            f"{device.capability} and {_dotted(device.cuda or (0,))}. Set it to 'tensorwise'."
        )


def _fp8_sizes(shape: ModelShape, tp: int) -> dict[str, int]:
    """Dimensions of the matrices of one rank's transformer layers; embedding and output layer stay in
    bf16."""
    queries, keys = shape.query_size, shape.key_size
    return {
        "hidden_size": shape.hidden_size,
        "intermediate_size / tp": shape.ffn_size // tp,
        "num_attention_heads * head_dim / tp": queries // tp,
        "(num_attention_heads + 2 * num_key_value_heads) * head_dim / tp": (queries + 2 * keys) // tp,
    }


def fp8_fields(precision: Precision) -> dict[str, Any]:
    """Megatron's fields of the `precision` section."""
    if precision.fp8 is None:
        return {}
    return dict(
        fp8=precision.fp8,
        fp8_recipe=precision.fp8_recipe,
        fp8_param=precision.fp8_param,
        first_last_layers_bf16=precision.first_last_layers_bf16,
    )


def recompute_fields(parallel: Parallel) -> dict[str, Any]:
    """Megatron's fields that keep a layer's input alone and run its forward again in backward."""
    if not parallel.recompute:
        return {}
    return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
