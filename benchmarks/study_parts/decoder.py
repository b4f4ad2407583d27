"""A Qwen3-shaped decoder in plain torch with a KV cache, on the weights of a MegatronModel: what samples and
answers in the study, in the place of a server.

Shapes: P prompts, B sequences (some of each prompt), S positions of one call, L positions so far, H heads,
G key heads, D head size, V vocabulary. Prompts are padded on the left, so that all end in one column.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NEEDED = {"hidden_act": "silu", "attention_bias": False, "model_type": "qwen3"}


@dataclass
class Layer:
    """The matrices of one layer; those that read the same input are one."""

    attention_norm: Tensor
    qkv: Tensor
    query_norm: Tensor
    key_norm: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass
class State:
    """Keys and values so far, [layers, 2, B, G, capacity, D], and which columns are padding, bool [B, L]."""

    cache: Tensor
    length: int
    padding: Tensor | None
    """None where no prompt is shorter than another."""
    lengths: Tensor
    """int64 [B], tokens of each sequence."""

    def repeated(self, times: Tensor) -> "State":
        """The same with sequence i `times[i]` times, side by side."""
        padding = None if self.padding is None else self.padding.repeat_interleave(times, 0)
        cache = self.cache.repeat_interleave(times, 2)
        return State(cache, self.length, padding, self.lengths.repeat_interleave(times))


class Decoder:
    """Next-token logits of one model."""

    def __init__(self, hf_config: Mapping[str, Any]) -> None:
        """Raises ValueError for a model that is not of this shape."""
        for key, value in NEEDED.items():
            if hf_config.get(key) != value:
                raise ValueError(
                    f"config.json: {key} = {hf_config.get(key)!r}, the sampler is written for {value!r}. "
                    "Use one of the models that `study.py prepare` makes."
                )
        self.num_layers = hf_config["num_hidden_layers"]
        self.heads, self.groups = hf_config["num_attention_heads"], hf_config["num_key_value_heads"]
        self.head_dim, self.eps = hf_config["head_dim"], hf_config["rms_norm_eps"]
        self.theta, self.tied = hf_config["rope_theta"], hf_config["tie_word_embeddings"]
        self.layers: list[Layer] = []

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the weights, HF name -> tensor."""
        self.embedding = tensors["model.embed_tokens.weight"]
        self.final_norm = tensors["model.norm.weight"]
        self.head = self.embedding if self.tied else tensors["lm_head.weight"]
        self.layers = [_layer(tensors, f"model.layers.{index}.") for index in range(self.num_layers)]

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[Tensor, State]:
        """(logits [P, V] after each prompt, the state with room for `capacity` more tokens)."""
        longest = max(len(prompt) for prompt in prompts)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        column = torch.arange(longest)
        padding = column < (longest - lengths)[:, None]
        shape = (self.num_layers, 2, len(prompts), self.groups, longest + capacity, self.head_dim)
        state = State(torch.zeros(shape), 0, padding if bool(padding.any()) else None, lengths)
        position = (column - (longest - lengths)[:, None]).clamp(min=0)
        return self._forward(ids, position, state), state

    @torch.no_grad()
    def step(self, ids: Tensor, state: State) -> Tensor:
        """Logits [B, V] after one more token [B] of every sequence."""
        position = state.lengths[:, None]
        state.lengths = state.lengths + 1
        if state.padding is not None:
            state.padding = F.pad(state.padding, (0, 1))
        return self._forward(ids[:, None], position, state)

    def _forward(self, ids: Tensor, position: Tensor, state: State) -> Tensor:
        x = self.embedding[ids]
        rotation = self._rotation(position)
        begin, end = state.length, state.length + ids.shape[1]
        mask = self._mask(state, ids.shape[1])
        for index, layer in enumerate(self.layers):
            h = F.rms_norm(x, x.shape[-1:], layer.attention_norm, self.eps)
            sizes = [self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.head_dim]
            q, k, v = (
                part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                for part in F.linear(h, layer.qkv).split(sizes, -1)
            )
            q = _rotate(F.rms_norm(q, q.shape[-1:], layer.query_norm, self.eps), rotation)
            k = _rotate(F.rms_norm(k, k.shape[-1:], layer.key_norm, self.eps), rotation)
            state.cache[index, 0, :, :, begin:end], state.cache[index, 1, :, :, begin:end] = k, v
            keys, values = state.cache[index, :, :, :, :end].unbind()
            causal = mask is None and ids.shape[1] > 1
            seen = F.scaled_dot_product_attention(
                q, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=True
            )
            x = x + F.linear(seen.transpose(1, 2).flatten(2), layer.out)
            gate, up = F.linear(F.rms_norm(x, x.shape[-1:], layer.mlp_norm, self.eps), layer.gate_up).chunk(
                2, -1
            )
            x = x + F.linear(F.silu(gate) * up, layer.down)
        state.length = end
        last = F.rms_norm(x[:, -1], x.shape[-1:], self.final_norm, self.eps)
        return F.linear(last, self.head)

    def _mask(self, state: State, new: int) -> Tensor | None:
        """bool [B, 1, new, L], True where a key is seen; None where causality is all there is to say."""
        if state.padding is None:
            return None
        end = state.length + new
        causal = torch.ones(new, end, dtype=torch.bool).tril(state.length)
        seen = causal & ~state.padding[:, None, :]
        # A row of padding sees itself: a softmax over nothing is NaN.
        return (seen | torch.eye(new, end, dtype=torch.bool).roll(state.length, -1))[:, None]

    def _rotation(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [B, 1, S, D]."""
        half = torch.arange(0, self.head_dim, 2) / self.head_dim
        angle = position[:, None, :, None].float() * torch.exp(-half * math.log(self.theta))
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _layer(tensors: Mapping[str, Tensor], prefix: str) -> Layer:
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    return Layer(
        attention_norm=tensors[f"{prefix}input_layernorm.weight"],
        qkv=torch.cat([tensors[f"{attention}{name}_proj.weight"] for name in "qkv"]),
        query_norm=tensors[f"{attention}q_norm.weight"],
        key_norm=tensors[f"{attention}k_norm.weight"],
        out=tensors[f"{attention}o_proj.weight"],
        mlp_norm=tensors[f"{prefix}post_attention_layernorm.weight"],
        gate_up=torch.cat([tensors[f"{mlp}{name}_proj.weight"] for name in ("gate", "up")]),
        down=tensors[f"{mlp}down_proj.weight"],
    )


def greedy(
    decoder: Decoder, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Sequence[int]
) -> list[list[int]]:
    """The most probable answer to each prompt, stop token included."""
    answers: list[list[int]] = [[] for _ in prompts]
    for ids, running in _columns(decoder, prompts, max_new_tokens, stop_ids):
        for row in running:
            answers[row].append(int(ids[row]))
    return answers


def _columns(
    decoder: Decoder, prompts: Sequence[Sequence[int]], limit: int, stop_ids: Sequence[int]
) -> Iterator[tuple[Tensor, list[int]]]:
    """(ids [P], rows that had not ended) of each position."""
    logits, state = decoder.prefill(prompts, limit)
    running, stop = torch.ones(len(prompts), dtype=torch.bool), torch.tensor(list(stop_ids))
    for position in range(limit):
        ids = logits.argmax(-1)
        yield ids, running.nonzero()[:, 0].tolist()
        running &= ~torch.isin(ids, stop)
        if not bool(running.any()) or position == limit - 1:
            return
        logits = decoder.step(ids, state)
