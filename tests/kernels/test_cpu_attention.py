"""The CPU servers' attention over many sequences at once, against each sequence alone in float64; SGLang's
own modules are stood in for (tests/e2e/test_server.py has them)."""

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from inspect import Parameter, Signature
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_jackpot.servers.process import CPU_SHIMS

PLAIN = dict(scaling=0.3, causal=True, is_cross_attn=False, sliding_window_size=None)


def takes(arguments: str) -> Callable:
    """A decorator: it says that it takes these."""

    def dressed(method: Callable) -> Callable:
        method.__signature__ = Signature(
            [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in arguments.split()]
        )
        return method

    return dressed


FIRST = "self query output k_cache v_cache req_to_token req_pool_indices seq_lens"
LAST = "encoder_lens scaling enable_gqa causal is_cross_attn sliding_window_size"


class Native:
    """Says that it was asked."""

    @takes(f"{FIRST} {LAST}")
    def _run_sdpa_forward_decode(self, *args: Any, **how: Any) -> tuple[str, int]:
        return "decode", len(args)

    @takes(f"{FIRST} extend_prefix_lens extend_seq_lens {LAST}")
    def _run_sdpa_forward_extend(self, *args: Any, **how: Any) -> tuple[str, int]:
        return "extend", len(args)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, as SGLang finds it: by the entry point in its folder."""
    registered: dict[str, type] = {}
    at = "sglang.srt.layers.attention"
    stubs = {name: ModuleType(f"{at}.{name}") for name in ("attention_registry", "torch_native_backend")}
    stubs["attention_registry"].register_attention_backend = lambda name: (
        lambda made: registered.update({name: made})
    )
    stubs["torch_native_backend"].TorchNativeAttnBackend = Native
    for name, stub in stubs.items():
        monkeypatch.setitem(sys.modules, f"{at}.{name}", stub)
    for above in ("sglang", "sglang.srt", "sglang.srt.layers", at):
        monkeypatch.setitem(sys.modules, above, ModuleType(above))
    monkeypatch.syspath_prepend(CPU_SHIMS)
    (found,) = [entry for held in distributions(path=[str(CPU_SHIMS)]) for entry in held.entry_points]
    assert found.group == "sglang.srt.plugins"
    found.load()()
    module = importlib.import_module(found.module)
    assert registered == {"torch_native": module.BatchedAttention}
    with monkeypatch.context() as another:
        registered.clear()
        another.setattr(Native, "_run_sdpa_forward_decode", takes(f"{FIRST} {LAST} sinks")(lambda *_: None))
        module.register()
        assert registered == {}
    yield module
    del sys.modules[found.module]


class Sequences:
    """Random lengths, of which the last `queries` ask; each sequence's slots are scattered over the caches,
    and what no sequence holds is NaN."""

    def __init__(self, seed: int, *, cached: bool, heads: int = 6, key_heads: int = 2) -> None:
        draw = torch.Generator().manual_seed(seed)
        num = 50
        self.queries = torch.randint(1, 30, (num,), generator=draw)
        self.before = torch.randint(0, 200, (num,), generator=draw) * int(cached)
        self.lengths = self.before + self.queries
        total = int(self.lengths.sum())
        self.rows = torch.randperm(num + 5, generator=draw)[:num]
        self.slots = torch.zeros(num + 5, 300, dtype=torch.int32)
        scattered = torch.randperm(total, generator=draw).int() + 1
        for row, own in zip(self.rows, scattered.split(self.lengths.tolist()), strict=True):
            self.slots[row, : len(own)] = own
        made = dict(generator=draw, dtype=torch.float64)
        self.keys = torch.randn(total + 1, key_heads, 8, **made)
        self.values = torch.randn(total + 1, key_heads, 12, **made)
        self.keys[0] = self.values[0] = math.nan
        self.query = torch.randn(int(self.queries.sum()), heads, 8, **made)
        self.how = dict(PLAIN, enable_gqa=heads != key_heads)
        self.held = (self.keys, self.values, self.slots, self.rows, self.lengths)

    def alone(self, queries: Tensor) -> Tensor:
        """softmax(q k^T scaling) v of each sequence's last `queries` tokens over what is not after them."""
        found, start = [], 0
        for row, length, num in zip(self.rows, self.lengths.tolist(), queries.tolist(), strict=True):
            own = self.slots[row, :length].long()
            each = self.query.shape[1] // self.keys.shape[1]
            key, value = (cache[own].repeat_interleave(each, 1) for cache in (self.keys, self.values))
            score = torch.einsum("qhd,khd->hqk", self.query[start : start + num], key) * 0.3
            later = torch.ones(num, length, dtype=torch.bool).triu(length - num + 1)
            share = score.masked_fill(later, -math.inf).softmax(-1)
            found.append(torch.einsum("hqk,khd->qhd", share, value))
            start += num
        return torch.cat(found)


@pytest.mark.parametrize("largest", [None, 2**15])
@pytest.mark.parametrize("key_heads", [2, 6])
def test_sequences_attend_together_as_each_does_alone(
    plugin: ModuleType, monkeypatch: pytest.MonkeyPatch, key_heads: int, largest: int | None
) -> None:
    if largest:  # many groups, and queries in several goes
        monkeypatch.setattr(plugin, "LARGEST", largest)
    backend = plugin.BatchedAttention()
    for cached in (True, False):
        s = Sequences(7, cached=cached, key_heads=key_heads)
        output = torch.zeros(len(s.query), 6, 12, dtype=torch.float64)
        backend._run_sdpa_forward_extend(s.query, output, *s.held, s.before, s.queries, None, **s.how)
        torch.testing.assert_close(output, s.alone(s.queries), rtol=0, atol=1e-12)
        ones = torch.ones_like(s.lengths)
        output = output[: len(ones)].zero_()
        backend._run_sdpa_forward_decode(s.query[: len(ones)], output, *s.held, None, **s.how)
        torch.testing.assert_close(output, s.alone(ones), rtol=0, atol=1e-12)


def test_groups_hold_every_sequence_once_and_little_padding(plugin: ModuleType) -> None:
    s = Sequences(3, cached=True)
    queries, lengths = s.queries.tolist(), s.lengths.tolist()
    groups = plugin.alike(queries, lengths)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        for counts in (queries, lengths):
            own = [counts[i] for i in group]
            assert max(own) <= min(own) * 5 // 4 + 16
    assert plugin.alike([1] * 500, [20] * 500) == [list(range(500))]


@pytest.mark.parametrize(
    "rare", [dict(is_cross_attn=True), dict(sliding_window_size=8), dict(causal=False), "dtype", "encoder"]
)
def test_what_is_rare_goes_the_engines_own_way(plugin: ModuleType, rare: Any) -> None:
    s = Sequences(1, cached=False)
    backend, how = plugin.BatchedAttention(), dict(s.how, **(rare if isinstance(rare, dict) else {}))
    query = s.query.float() if rare == "dtype" else s.query
    encoder = s.lengths if rare == "encoder" else None
    output = torch.zeros(len(query), 6, 12, dtype=query.dtype)
    asked = backend._run_sdpa_forward_extend(query, output, *s.held, s.before, s.queries, encoder, **how)
    assert asked == ("extend", 10)
    if "causal" not in rare:  # a decode always says False
        few = (query[: len(s.lengths)], output[: len(s.lengths)])
        assert backend._run_sdpa_forward_decode(*few, *s.held, encoder, **how) == ("decode", 8)
