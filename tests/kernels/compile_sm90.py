"""Compile every kernel for Hopper and print what the code holds, as JSON; no GPU is needed.

    PYTHONPATH=. python tests/kernels/compile_sm90.py

Loads and stores are those of the PTX, registers and local memory those that ptxas reports for the cubin. Row
strides and the padded width are multiples of 16, as padded_vocab_size makes them; the true vocabulary is odd.
"""

import collections
import json
import re
import subprocess
import tempfile

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_jackpot.parallel import vocab_kernels as kernels
from megatron_jackpot.parallel import vocab_kernels_pair as pairs
from megatron_jackpot.parallel.vocab_triton import GROUP, LARGEST_BLOCK, NUM_WARPS, READ_BLOCK

HOPPER = GPUTarget("cuda", 90, 32)
LOGITS = ("logits_ptr", "first_ptr", "second_ptr", "student_ptr", "teacher_ptr", "grad_ptr")
INTEGERS = {"ids_ptr": "*i64", "top_ids_ptr": "*i32"}
BLOCK = dict(BLOCK_V=LARGEST_BLOCK)
READ = dict(HAS_IDS=True, ENTROPY=True, BLOCK_N=64, GROUP=GROUP)
TOP = dict(GROUP=GROUP, CHUNKS=8, BLOCK_K=32)
VARIANTS = {
    "read": (kernels.read_kernel, {**READ, "GROUPS": False}, NUM_WARPS),
    "read groups": (kernels.read_kernel, {**READ, "GROUPS": True}, NUM_WARPS),
    "top": (kernels.top_kernel, TOP, 1),
    "pair": (pairs.pair_kernel, {"KL": True}, NUM_WARPS),
    "overlap": (pairs.overlap_kernel, BLOCK, NUM_WARPS),
    "kl grad": (pairs.kl_grad_kernel, {"FORWARD": False, **BLOCK}, NUM_WARPS),
    "softmax grad": (kernels.softmax_grad_kernel, {"ENTROPY": True, **BLOCK}, NUM_WARPS),
    "ids grad": (kernels.ids_grad_kernel, {"BLOCK_N": 64}, 1),
}


def signature(names: list[str], constants: dict, dtype: str) -> tuple[dict[str, str], dict]:
    """(type of every argument, which of them are multiples of 16), as a launch would find them."""
    types, multiples = {}, {}
    for index, name in enumerate(names):
        is_logits = name in LOGITS
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            types[name] = f"*{dtype}" if is_logits else INTEGERS.get(name, "*fp32")
        else:
            types[name] = "fp32" if name == "inverse_temperature" else "i32"
        if is_logits or name == "per_rank" or name.endswith("_stride"):
            multiples[(index,)] = [["tt.divisibility", 16]]
    return types, multiples


def inspect(name: str, dtype: str) -> dict:
    kernel, constants, num_warps = VARIANTS[name]
    if "ROWS" in kernel.arg_names:
        each = {"bf16": 8, "fp32": 4}[dtype]
        lanes = 32 * num_warps
        constants = {**constants, "ROWS": READ_BLOCK // (lanes * each), "LANES": lanes, "EACH": each}
    types, multiples = signature(kernel.arg_names, constants, dtype)
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=multiples)
    compiled = triton.compile(source, target=HOPPER, options=dict(num_warps=num_warps))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    ops = collections.Counter(
        re.findall(r"(?:ld|st)\.(?:global|shared)[.\w]*|ex2[.\w]*|bar\.sync|shfl", compiled.asm["ptx"])
    )
    return dict(
        ops=dict(ops),
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        local_bytes=int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
    )


if __name__ == "__main__":
    found = {f"{name} {dtype}": inspect(name, dtype) for name in VARIANTS for dtype in ("bf16", "fp32")}
    print(json.dumps({"triton": triton.__version__, "kernels": found}))
