"""The machine code of the kernels, compiled for Hopper without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOGITS_READ = {"read": 1, "pair": 2, "overlap": 2, "kl grad": 2, "softmax grad": 1}
"""Rows of logits that a kernel reads."""
EXPONENTIALS = {"read": 1, "pair": 2, "overlap": 1, "kl grad": 1, "softmax grad": 1}
"""Per logit (or pair of logits): what the special-function units have to do."""


def test_kernels_compile_for_hopper_with_16_byte_loads_one_exponential_per_logit_and_no_spills(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/kernels/compile_sm90.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)["kernels"]
    assert len(found) == 12
    for variant, code in found.items():
        # 8 warps of at most 96 registers: two programs and more share a multiprocessor.
        assert code["local_bytes"] == 0 and code["registers"] <= 96, variant
    for name, rows in LOGITS_READ.items():
        for dtype, bytes_each in (("bf16", 2), ("fp32", 4)):
            ops = found[f"{name} {dtype}"]["ops"]
            per_thread = 4096 // 256
            wide = sum(count for op, count in ops.items() if op.startswith("ld.global") and ".v4.b32" in op)
            assert wide == rows * per_thread * bytes_each // 16, f"{name} {dtype}: {ops}"
            exponentials = sum(count for op, count in ops.items() if op.startswith("ex2"))
            # One or two more per block rescale the sums.
            assert EXPONENTIALS[name] * per_thread <= exponentials <= EXPONENTIALS[name] * per_thread + 2
