"""Tensor kinds of a decoder and how each goes between HF's tensors and Megatron's tensor-parallel shards.

Shapes: H hidden, F ffn, D head dim, G query groups, Q query heads per group.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
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
    tp_dim: int | None = None
    """Dimension cut over tensor-parallel ranks; None is replicated."""
    layout: str = "plain"
    """plain | qkv (query, key, value interleaved by group) | glu (gate and up, each cut on its own) | vocab."""


class Family(ABC):
    """A parsed config.json with its Megatron fields and its kinds."""

    def __init__(self, hf_config: dict[str, Any]) -> None:
        self.hf_config = hf_config

    @abstractmethod
    def transformer_fields(self) -> dict[str, Any]:
        """Keyword arguments of Megatron's TransformerConfig that the architecture fixes."""

    @abstractmethod
    def kinds(self) -> tuple[Kind, ...]:
        """Every kind of tensor of the model."""

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
    def context_length(self) -> int:
        return self.hf_config["max_position_embeddings"]

    @property
    def rope_theta(self) -> float:
        """Rotary base in the form of transformers 4 (rope_theta) or 5 (rope_parameters). Scaling is refused."""
        nested = self.hf_config.get("rope_parameters") or self.hf_config.get("rope_scaling") or {}
        kind = nested.get("rope_type", nested.get("type", "default"))
        if kind != "default":
            raise ValueError(f"config.json: rope scaling '{kind}' is not supported, only 'default'.")
        return float(nested.get("rope_theta", self.hf_config.get("rope_theta", 10_000.0)))

    @property
    def head_dim(self) -> int:
        return (
            self.hf_config.get("head_dim")
            or self.hf_config["hidden_size"] // self.hf_config["num_attention_heads"]
        )

    def find(self, megatron_name: str) -> tuple[Kind, int | None]:
        """(kind, layer) of a Megatron parameter with a global layer index. Raises KeyError for unknown names."""
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", megatron_name)
        layer = int(match[1]) if match else None
        generic = f"decoder.layers.{{layer}}.{match[2]}" if match else megatron_name
        for kind in self.kinds():
            if generic in kind.megatron:
                return kind, layer
        raise KeyError(f"{type(self).__name__}: no HF tensor is known for Megatron's '{megatron_name}'.")

    def hf_names(self, kind: Kind, layer: int | None) -> list[str]:
        return [name.format(layer=layer) for name in kind.hf]

    def shard(
        self, kind: Kind, layer: int | None, read: Callable[[str], Tensor], rows: int, tp: int, tp_rank: int
    ) -> Tensor:
        """Megatron's shard on one tensor-parallel rank; `rows` is the padded vocabulary for the vocab layout."""
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
        groups = self.hf_config["num_key_value_heads"]
        grouped = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).reshape(-1, *parts[0].shape[1:])

    def _split_qkv(self, whole: Tensor) -> list[Tensor]:
        groups = self.hf_config["num_key_value_heads"]
        per_group = self.hf_config["num_attention_heads"] // groups
        grouped = whole.reshape(groups, -1, *whole.shape[1:])
        sizes = [per_group * self.head_dim, self.head_dim, self.head_dim]
        return [part.reshape(-1, *whole.shape[1:]).contiguous() for part in grouped.split(sizes, dim=1)]
