"""What an H200 is asked, in order, in one call of at most nine minutes; run_all.sh starts it.

    bash tests/gpu/run_all.sh [--dry-run | --tiny] [NAME ...]

Each step is a process with its own time limit. Results of all steps go to $OUT/gpu.json and their output to
$OUT/gpu.log: two files, since a lent machine may hand back only a few. The exit status is 0 when every step
passed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_S = 540
"""For everything together; a step that no longer fits is reported as not run."""
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--disable-warnings")


FLAGS = os.environ.get("JACKPOT_GPU_SERVER_FLAGS", "").split()
"""Of sglang.launch_server, for what the machine's SGLang lacks."""


@dataclass(frozen=True)
class Step:
    """One process. `expected_s` is an estimate until an H200 has run it."""

    name: str
    command: tuple[str, ...]
    sizes: str
    expected_s: int
    limit_s: int
    tiny: tuple[str, ...] | None = None
    """Arguments that make it run on a CPU in seconds; None leaves it out of --tiny."""
    apart: bool = False
    """Only where it is named: it needs SGLang, and has no room beside the others."""


def benchmark(
    name: str,
    sizes: str,
    expected_s: int,
    limit_s: int,
    *tiny: str,
    full: tuple[str, ...] = (),
    apart: bool = False,
) -> Step:
    command = (sys.executable, "-W", "ignore", f"benchmarks/gpu_{name}.py", *full)
    return Step(name, command, sizes, expected_s, limit_s, ("--tiny", *tiny), apart)


STEPS = (
    Step(
        "te",
        (sys.executable, "-W", "ignore", "tests/gpu/te_smoke.py"),
        "te.Linear 1024 x 1024, bf16 and every fp8 recipe, forward and backward",
        15,
        60,
    ),
    benchmark(
        "trainer",
        "0.6B and half of it, 8 x 2048 in 1 and in 8 micro-batches, 1 x 16,384 tokens; 1.7B and 0.6B; bf16",
        110,
        150,
        "--precision",
        "fp32",
        full=("--precision", "bf16", "--profile"),
    ),
    benchmark("vocab", "T = 16,384; 151,936 and 18,992 columns; k = 20", 20, 50),
    benchmark(
        "servers",
        "SGLang, 0.6B, 64 and 256 at once, k = 0, 5, 20, with and without its overlap schedule",
        190,
        260,
        full=("--", *FLAGS),
        apart=True,
    ),
    Step(
        "loop",
        (sys.executable, "-W", "ignore", "tests/gpu/loop.py", "--", *FLAGS),
        "the quickstart's pair by a real server and CUDA IPC: memory lent, and one step ahead",
        120,
        230,
        apart=True,
    ),
    benchmark("correction", "0.6B and half of it, 8 x 2048 tokens, four corrections", 60, 90),
    benchmark("sync", "0.6B and 1.7B in bf16, buckets of 512 MB; fp8; offload", 55, 100),
    Step(
        "kernels",
        (*PYTEST, "tests/kernels", "-k", "not hopper and not ranks"),
        "random shapes, 1 - 7 tokens, 1 - 907 columns: compiled, against the torch form",
        30,
        90,
    ),
    Step(
        "tests",
        (*PYTEST, "-m", "gpu", "tests/gpu", "tests/unit/test_obrs.py"),
        "tiny Qwen3: layers of Transformer Engine against local ones, packing, recipes, draws; logits in "
        "blocks, deterministic mode, offload, export on the device, IPC handles, fp8 weights",
        110,
        140,
    ),
    benchmark(
        "numerics", "8 layers of 1024, 8 x 512 tokens, bf16 and three fp8 recipes against fp32", 60, 100
    ),
    benchmark("decode", "1,048,576 tokens, top-20", 15, 40),
)
"""The most important questions first: what a short call answers. Fp8 and whole logits of the trainer:
benchmarks/gpu_trainer.py --precision."""


def run(step: Step, out: Path, log: Path, limit_s: float, tiny: bool) -> dict:
    """Status, seconds, and the rows of a benchmark."""
    command = step.command + (step.tiny or () if tiny else ())
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OUT": str(out)}
    if step.name == "tests":
        # Transformer Engine's products in fp32 are TF32's otherwise: 3e-3 from the local layers' on an H200.
        environment["NVIDIA_TF32_OVERRIDE"] = "0"
    started = time.monotonic()
    with log.open("a") as file:
        file.write(f"== {step.name}: {' '.join(command)}\n")
        file.flush()
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, timeout=limit_s
            )
            status = "passed" if done.returncode == 0 else f"exit {done.returncode}"
        except subprocess.TimeoutExpired:
            status = f"over {limit_s:.0f} s"
    result = dict(status=status, s=round(time.monotonic() - started, 1))
    written = out / f"gpu_{step.name}.json"
    return {**result, "result": json.loads(written.read_text()) if written.exists() else None}


def run_all(steps: list[Step], out: Path, *, tiny: bool) -> bool:
    started, results = time.monotonic(), {}
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.write_text("")
    with tempfile.TemporaryDirectory() as scratch:
        for step in steps:
            left = LIMIT_S - (time.monotonic() - started)
            if left < 5:
                results[step.name] = dict(status="not run: no time left", s=0.0, result=None)
                continue
            told = len(log.read_text())
            results[step.name] = run(step, Path(scratch), log, min(step.limit_s, left), tiny)
            # After every step: what was measured survives whatever comes next.
            (out / "gpu.json").write_text(json.dumps(dict(tiny=tiny, steps=results), indent=1) + "\n")
            print(log.read_text()[told:][-3000:], flush=True)
    print(f"{'step':12}{'status':>24}{'s':>8}{'expected':>10}")
    for step in steps:
        result = results[step.name]
        print(f"{step.name:12}{result['status']:>24}{result['s']:8.1f}{step.expected_s:10d}")
    return all(result["status"] == "passed" for result in results.values())


def dry_run(steps: list[Step]) -> None:
    print(f"{'step':12}{'expected s':>11}{'limit s':>9}  sizes; command")
    for step in steps:
        command = " ".join(step.command).replace(sys.executable, "python")
        print(f"{step.name:12}{step.expected_s:11d}{step.limit_s:9d}  {step.sizes}; {command}")
    print(f"{'together':12}{sum(step.expected_s for step in steps):11d}{LIMIT_S:9d}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="list the steps and run nothing")
    parser.add_argument("--tiny", action="store_true", help="the benchmarks alone, in sizes for a CPU")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these steps; servers and loop only so")
    args = parser.parse_args()
    known = {step.name for step in STEPS}
    if unknown := set(args.names) - known:
        raise SystemExit(f"{sorted(unknown)} are no steps; there are {sorted(known)}.")
    steps = [step for step in STEPS if (step.name in args.names if args.names else not step.apart)]
    if args.dry_run:
        dry_run(steps)
        return
    if args.tiny:
        steps = [step for step in steps if step.tiny is not None]
    out = os.environ.get("OUT")
    if not out:
        raise SystemExit("OUT must name the folder for gpu.json and gpu.log, for example OUT=gpu-results.")
    raise SystemExit(0 if run_all(steps, Path(out), tiny=args.tiny) else 1)


if __name__ == "__main__":
    main()
