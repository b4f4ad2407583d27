"""The whole product on one GPU: a real server, weights by CUDA IPC, a few steps, the account of prompts.

    PYTHONPATH=. python tests/gpu/loop.py [-- SERVER FLAGS]

The quickstart's pair in bf16, twice: servers that lend their memory while the trainer learns, and rollouts
one step ahead of training. Prints a step's times and what must be so; exits with 1 where it is not.
JACKPOT_TINY=1 is the same on a CPU, in fp32 by broadcast.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = bool(os.environ.get("JACKPOT_TINY"))
STEPS, LIMIT_S = 8, 400 if TINY else 110
ON_DEVICE = dict(precision=dict(dtype="bfloat16"), sync=dict(method="ipc"))
CASES = {
    "memory lent": {} if TINY else dict(servers=dict(release_memory=True)),
    "one step ahead": dict(rollout=dict(ahead=1, max_staleness=1)),
}
SHOWN = (
    "acceptance",
    "gap/trained_scored",
    "gap/server",
    "staleness/max",
    "sync/seconds",
    "sync/server_version",
)


def write_rows(path: Path, num: int = 400) -> Path:
    chosen = random.Random(0)
    pairs = chosen.sample([(a, b) for a in range(10, 100) for b in range(10, 100)], num)
    rows = [
        json.dumps(
            dict(
                prompt=f"State the final answer to the following arithmetic problem: {a} + {b} =",
                answer=str(a + b),
            )
        )
        for a, b in pairs
    ]
    path.write_text("\n".join(rows) + "\n")
    return path


def settings(rows: Path, run: Path, flags: list[str], case: dict) -> list[str]:
    tree: dict = dict(
        run=dict(folder=str(run), steps=STEPS),
        data=dict(source="jsonl", path=str(rows), reward="exact"),
        rollout=dict(prompts_per_step=32),
        servers=dict(extra_args=flags),
        evaluation=dict(size=0),
        parallel=dict(threads=1),
    )
    for changes in (case, {} if TINY else ON_DEVICE):
        for section, fields in changes.items():
            tree[section] = {**tree.get(section, {}), **fields}
    return [
        f"{section}.{name}={json.dumps(value)}"
        for section, part in tree.items()
        for name, value in part.items()
    ]


def run_case(name: str, flags: list[str], folder: Path) -> bool:
    run, started = folder / name.replace(" ", "-"), time.monotonic()
    asked = settings(write_rows(folder / "rows.jsonl"), run, flags, CASES[name])
    launch = [sys.executable, "-m", "megatron_jackpot.cli", "launch", "examples/quickstart/run.yaml", *asked]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    with (folder / "launch.log").open("w") as log:
        code = subprocess.run(
            launch, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=LIMIT_S
        ).returncode
    print(f"what=loop  case={name}  rc={code}  s={time.monotonic() - started:.1f}", flush=True)
    if code:
        print((folder / "launch.log").read_text()[-2500:])
        for file in sorted(run.glob("*.log")):
            print(f"-- {file.name}\n{file.read_text(errors='replace')[-2500:]}", flush=True)
        return False
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for key in sorted({key for row in metrics for key in row if key.startswith("time/")} | set(SHOWN)):
        values = [row[key] for row in metrics[1:] if key in row]
        if values:
            print(
                f"  {key}={statistics.median(values):.4g}  first={values[0]:.4g}  last={values[-1]:.4g}",
                flush=True,
            )
    asked_for = [
        tuple(key)
        for line in (run / "prompts.jsonl").read_text().splitlines()
        for key in keys(json.loads(line))
    ]
    wanted = STEPS * 32
    checks = {
        "every prompt once": len(asked_for) == len(set(asked_for)) == wanted,
        "scored is trained": all(row.get("gap/trained_scored", 0.0) <= 1e-3 for row in metrics),
        "finite": all(abs(row["loss/policy"]) < 1e6 for row in metrics if "loss/policy" in row),
    }
    print(f"  checks {checks}", flush=True)
    return all(checks.values())


def keys(row: dict) -> list:
    """(epoch, prompt) of all that a step trained."""
    return [(row["epoch"], prompt) for prompt in row["trained"]]


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("flags", nargs="*", help="of sglang.launch_server, after --")
    flags = made.parse_args().flags
    with tempfile.TemporaryDirectory() as scratch:
        raise SystemExit(0 if all([run_case(name, flags, Path(scratch)) for name in CASES]) else 1)


if __name__ == "__main__":
    main()
