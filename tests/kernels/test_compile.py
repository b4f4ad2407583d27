"""The machine code of the kernels, compiled for Hopper without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TILED = {"read": 1, "read groups": 1, "pair": 2}
"""Kernels that follow a running maximum in the threads, and the rows of logits that they read."""
BLOCKED = {"overlap": 2, "kl grad": 2, "softmax grad": 1}
EXPONENTIALS = {"read": 1, "read groups": 1, "pair": 2, "overlap": 1, "kl grad": 1, "softmax grad": 1}
"""Per logit (or pair of logits): what the special-function units have to do."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/kernels/compile_sm90.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)["kernels"]


def test_kernels_compile_for_hopper_without_local_memory(compiled):
    assert len(compiled) == 16
    for variant, code in compiled.items():
        # 8 warps of at most 96 registers: two programs and more share a multiprocessor.
        assert code["local_bytes"] == 0 and code["registers"] <= 96, variant


@pytest.mark.parametrize(("dtype", "bytes_each"), [("bf16", 2), ("fp32", 4)])
def test_logits_are_read_by_16_bytes_and_cost_one_exponential_each(compiled, dtype, bytes_each):
    for name, rows in (TILED | BLOCKED).items():
        ops = compiled[f"{name} {dtype}"]["ops"]
        # A tile is there twice: whole, and with a mask for the row's end.
        per_thread, copies = (8, 2) if name in TILED else (16, 1)
        wide = sum(count for op, count in ops.items() if op.startswith("ld.global") and ".v4.b32" in op)
        assert wide == copies * rows * per_thread * bytes_each // 16, f"{name} {dtype}: {ops}"
        exponentials = sum(count for op, count in ops.items() if op.startswith("ex2"))
        # One or two more per block and at the end rescale the sums.
        least = copies * EXPONENTIALS[name] * per_thread
        assert least <= exponentials <= least + (copies + 1) * 2


def test_a_running_maximum_asks_no_other_thread_for_anything(compiled):
    for dtype in ("bf16", "fp32"):
        # Those after the loop: one per reduction and exchange at the end of a row.
        assert compiled[f"read {dtype}"]["ops"]["bar.sync"] <= 6
        assert compiled[f"pair {dtype}"]["ops"]["bar.sync"] <= 10
