"""Tensor kinds of a decoder and how each goes between HF's tensors and Megatron's tensor-parallel shards.

Shapes: H hidden, F ffn, D head dim, G query groups, Q query heads per group.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_hf_config(folder: Path) -> dict[str, Any]:
    """config.json of an HF folder. Raises ValueError naming the folder when it is missing or malformed."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: a model folder holds config.json, *.safetensors and a tokenizer."
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


@dataclass(frozen=True)
class Kind:
    """One kind of tensor: Megatron's name and HF's names, `{layer}` standing for the global layer index."""

    megatron: tuple[str, ...]
    """The name under the local spec, then the name under the Transformer Engine spec where it differs."""
    hf: tuple[str, ...]
    """HF tensors that make up this one, in order."""
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the HF tensors, as config.json fixes them."""
    tp_dim: int | None = None
    """Dimension cut over tensor-parallel ranks; None is replicated."""
    layout: str = "plain"
    """plain | qkv (query, key, value interleaved by group) | glu (gate and up, each cut on its own) |
    vocab."""

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.hf[0]

    @property
    def checkpoint_key(self) -> str:
        """Name in Megatron's distributed checkpoints: the fused one, all layers stacked under it."""
        return self.megatron[-1].replace("{layer}.", "")


LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What megatron-core fixes in Llama 3's scaling of rotary embeddings; the factor is free."""


class Family(ABC):
    """A parsed config.json with its Megatron fields and its kinds."""

    def __init__(self, hf_config: dict[str, Any]) -> None:
        self.hf_config = hf_config

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError for a field of config.json that changes the mathematics and is not supported."""

    @abstractmethod
    def transformer_fields(self) -> dict[str, Any]:
        """Keyword arguments of Megatron's TransformerConfig that the architecture fixes."""

    @cached_property
    @abstractmethod
    def kinds(self) -> tuple[Kind, ...]:
        """Every kind of tensor of the model; a tied output layer is none."""

    def entries(self) -> Iterator[tuple[Kind, int | None]]:
        """(kind, global layer or None) of every Megatron tensor of the whole model, in file order."""
        per_layer = [kind for kind in self.kinds if kind.per_layer]
        yield self.kinds[0], None
        for layer in range(self.num_layers):
            yield from ((kind, layer) for kind in per_layer)
        yield from ((kind, None) for kind in self.kinds[1:] if not kind.per_layer)

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """HF name -> shape of every tensor that config.json asks for."""
        return {
            name: shape
            for kind, layer in self.entries()
            for name, shape in zip(self.hf_names(kind, layer), kind.shapes, strict=True)
        }

    @property
    def vocab_size(self) -> int:
        return self.hf_config["vocab_size"]

    @property
    def tied(self) -> bool:
        return bool(self.hf_config.get("tie_word_embeddings", False))

    @property
    def num_layers(self) -> int:
        return self.hf_config["num_hidden_layers"]

    @property
    def num_heads(self) -> int:
        return self.hf_config["num_attention_heads"]

    @property
    def num_groups(self) -> int:
        """Query groups: heads of keys and values. Without the key every query head has its own."""
        return self.hf_config.get("num_key_value_heads") or self.num_heads

    @property
    def context_length(self) -> int:
        return self.hf_config["max_position_embeddings"]

    @property
    def rope(self) -> dict[str, Any]:
        """GPTModel's arguments about rotary embeddings, from the form of transformers 4 (rope_theta,
        rope_scaling) or 5 (rope_parameters). Scaling 'linear' and that of Llama 3 are mapped; ValueError for
        any other."""
        forms = [
            self.hf_config[key] for key in ("rope_parameters", "rope_scaling") if self.hf_config.get(key)
        ]
        if len(forms) == 2 and forms[0] != forms[1]:
            raise ValueError(f"config.json: rope_parameters and rope_scaling differ: {forms}.")
        nested = forms[0] if forms else {}
        thetas = {float(x["rope_theta"]) for x in (nested, self.hf_config) if x.get("rope_theta") is not None}
        if len(thetas) > 1:
            raise ValueError(f"config.json: rope_theta is given twice and differently: {sorted(thetas)}.")
        partial = nested.get("partial_rotary_factor", self.hf_config.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise ValueError(f"config.json: partial_rotary_factor = {partial} is not supported, only 1.")
        fields: dict[str, Any] = {"rotary_base": thetas.pop() if thetas else 10_000.0}
        kind = nested.get("rope_type", nested.get("type", "default"))
        if kind == "linear":
            return {**fields, "seq_len_interpolation_factor": float(nested["factor"])}
        if kind == "llama3" and all(nested.get(key) == value for key, value in LLAMA3_ROPE.items()):
            return {**fields, "rope_scaling": True, "rope_scaling_factor": float(nested["factor"])}
        if kind != "default":
            raise ValueError(
                f"config.json: rope scaling '{kind}' with {nested} is not supported. Known: 'default', "
                "'linear', and "
                f"'llama3' with {LLAMA3_ROPE}."
            )
        return fields

    @property
    def head_dim(self) -> int:
        return self.hf_config.get("head_dim") or self.hf_config["hidden_size"] // self.num_heads

    def find(self, megatron_name: str) -> tuple[Kind, int | None]:
        """(kind, layer) of a Megatron parameter with a global layer index. Raises KeyError for unknown
        names."""
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", megatron_name)
        layer = int(match[1]) if match else None
        generic = f"decoder.layers.{{layer}}.{match[2]}" if match else megatron_name
        for kind in self.kinds:
            if generic in kind.megatron:
                return kind, layer
        raise KeyError(f"{type(self).__name__}: no HF tensor is known for Megatron's '{megatron_name}'.")

    def hf_names(self, kind: Kind, layer: int | None) -> list[str]:
        return [name.format(layer=layer) for name in kind.hf]

    def shard(
        self, kind: Kind, layer: int | None, read: Callable[[str], Tensor], rows: int, tp: int, tp_rank: int
    ) -> Tensor:
        """Megatron's shard on one tensor-parallel rank; `rows` is the padded vocabulary for the vocab
        layout."""
        parts = [read(name) for name in self.hf_names(kind, layer)]
        if kind.layout == "vocab":
            padding = parts[0].new_zeros(rows - parts[0].shape[0], parts[0].shape[1])
            return torch.cat([parts[0], padding]).chunk(tp)[tp_rank]
        if kind.layout == "glu":
            return torch.cat([part.chunk(tp)[tp_rank] for part in parts])
        whole = self._join_qkv(parts) if kind.layout == "qkv" else parts[0]
        return whole if kind.tp_dim is None else whole.chunk(tp, dim=kind.tp_dim)[tp_rank]

    def unshard(self, kind: Kind, layer: int | None, shards: list[Tensor]) -> dict[str, Tensor]:
        """HF tensors from all tensor-parallel shards, in rank order; vocabulary padding is stripped."""
        names = self.hf_names(kind, layer)
        if kind.tp_dim is None:
            return {names[0]: shards[0]}
        if kind.layout == "glu":
            halves = [shard.chunk(2) for shard in shards]
            return {name: torch.cat([half[i] for half in halves]) for i, name in enumerate(names)}
        whole = torch.cat(shards, dim=kind.tp_dim)
        if kind.layout == "vocab":
            return {names[0]: whole[: self.vocab_size]}
        if kind.layout == "qkv":
            return dict(zip(names, self._split_qkv(whole), strict=True))
        return {names[0]: whole}

    def _join_qkv(self, parts: list[Tensor]) -> Tensor:
        groups = self.num_groups
        grouped = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).reshape(-1, *parts[0].shape[1:])

    def _split_qkv(self, whole: Tensor) -> list[Tensor]:
        groups = self.num_groups
        per_group = self.num_heads // groups
        grouped = whole.reshape(groups, -1, *whole.shape[1:])
        sizes = [per_group * self.head_dim, self.head_dim, self.head_dim]
        return [part.reshape(-1, *whole.shape[1:]).contiguous() for part in grouped.split(sizes, dim=1)]
