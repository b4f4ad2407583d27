"""What the gpu_* benchmarks share: sizes, timing, memory, the FLOP formula, and one JSON object per
benchmark.

Every benchmark runs on CUDA where there is one; `--tiny` shrinks the sizes so that a CPU runs it in seconds,
which shows that it works and nothing else.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_jackpot.run.provenance import provenance

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PEAK_TFLOPS = {"bfloat16": 989.0, "fp8": 1979.0}
"""Dense tensor-core peaks of an H100 or H200 (data sheet), the denominators of MFU."""
QWEN3_0_6B = dict(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151_936,
    tie_word_embeddings=True,
    max_position_embeddings=40_960,
    rope_theta=1_000_000.0,
)
QWEN3_1_7B = {**QWEN3_0_6B, "hidden_size": 2048, "intermediate_size": 6144}
HALF = {**QWEN3_0_6B, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
"""An actor of half the policy's width."""
TINY = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)


@dataclass(frozen=True)
class Shape:
    """What the FLOP formula and the sizes in bytes look at; from a Qwen3 config.json."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, hf: dict[str, Any]) -> "Shape":
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        rest = ("num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings")
        return cls(*(hf[name] for name in names + rest))

    @property
    def matmul_weights(self) -> int:
        """Numbers in all matrices that a token is multiplied with: the layers and the output layer."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.groups)
        return self.layers * (attention + 3 * self.hidden * self.ffn) + self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        norms = self.layers * (2 * self.hidden + 2 * self.head_dim) + self.hidden
        return self.matmul_weights + norms + (0 if self.tied else self.vocab * self.hidden)

    def forward_flops(self, lengths: list[int]) -> float:
        """2 per weight and token, and 4 x heads x head_dim per pair of tokens that causal attention compares.

        A sequence of s tokens has s (s + 1) / 2 pairs; norms, softmax and rotary embedding count nothing.
        """
        pairs = sum(s * (s + 1) / 2 for s in lengths)
        return (
            2.0 * self.matmul_weights * sum(lengths) + 4.0 * self.layers * self.heads * self.head_dim * pairs
        )

    def train_flops(self, lengths: list[int]) -> float:
        """Forward, and backward with respect to activations and weights; recomputation is not counted as
        useful."""
        return 3 * self.forward_flops(lengths)


def parser(doc: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tiny", action="store_true", help="sizes for a CPU, to see that it runs")
    return made


def seconds(call: Callable[[], Any], *, repeats: int = 5) -> float:
    """Median seconds of `call` after a warm-up; on CUDA by events around each."""
    call()
    times = []
    for _ in range(repeats):
        if DEVICE.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def busy_seconds(call: Callable[[], Any], *, repeats: int = 3) -> float | None:
    """Seconds that the device itself works for one `call`, by torch's profiler; None without CUDA."""
    if DEVICE.type != "cuda":
        return None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recording:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in recording.key_averages()) / repeats / 1e6


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """Bytes that `call` allocates at most beside what is there; None without CUDA."""
    if DEVICE.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(num_bytes: int) -> float:
    """Bytes per second of a large device copy, read plus written: the ceiling of whatever moves bytes."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds(lambda: target.copy_(source), repeats=10)


def machine() -> dict[str, Any]:
    """Date, versions, commit, and the device."""
    found: dict[str, Any] = {**provenance(torch.get_num_threads()), "device": "cpu"}
    for private in ("host", "folder"):
        found.pop(private)
    if DEVICE.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        found["multiprocessors"] = torch.cuda.get_device_properties(0).multi_processor_count
    return found


class Report:
    """Rows of a benchmark, each on the terminal and in NAME.json of the folder that OUT names as soon as it
    is known: a call that is cut off keeps what it measured. `close` prints them as a table."""

    def __init__(self, name: str, *, tiny: bool) -> None:
        self.name, self.tiny = name, tiny
        self.rows: list[dict[str, Any]] = []
        self.machine = machine()
        print(
            f"== {name}{' (tiny: the numbers mean nothing)' if tiny else ''} on {self.machine['device']}",
            flush=True,
        )

    def add(self, *rows: dict[str, Any]) -> None:
        for row in rows:
            self.rows.append(row)
            print("  ".join(f"{key}={_cell(value)}" for key, value in row.items()), flush=True)
        if out := os.environ.get("OUT"):
            content = {"name": self.name, "tiny": self.tiny, "machine": self.machine, "rows": self.rows}
            Path(out, f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n")

    def close(self) -> None:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        table = [columns] + [[_cell(row.get(column)) for column in columns] for row in self.rows]
        widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
        for line in table:
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
