"""Tensor kinds of a decoder and how each goes between HF's tensors and Megatron's tensor-parallel shards.

Shapes: H hidden, F ffn, D head dim, G query groups, Q query heads per group.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megatron_jackpot.config.model_shape import ModelShape


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


class Family(ModelShape, ABC):
    """The shape of a model with its Megatron fields and its kinds of tensors."""

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
