"""The same run on SGLang: `launch` with the run's own settings, its curve beside the testbed's."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.study_parts.plan import ROOT, Plan, run_folder
from benchmarks.study_parts.report import finished
from megatron_jackpot.monitor.metrics import read_metrics
from megatron_jackpot.run.provenance import CONFIG_FILE

EXACT = "eval/policy_exact"
"""What the trainer's own evaluation calls accuracy: the share of problems of which every item is right."""
LIMIT_S = 7200


def compare(plan: Plan, folder: Path, arm: str, seed: int, steps: int) -> None:
    """Run `steps` of it where they were not, and print a line for each evaluation: SGLang, the testbed with
    the same seed, and mean and standard deviation of all its finished seeds.

    At the plan's first mismatch and learning rate. Raises ValueError when the testbed's run is not done.
    """
    mine = {
        curve.run.seed: {row["step"]: row[EXACT] for row in curve.rows if EXACT in row}
        for curve in finished(plan, folder)
        if (curve.run.arm, curve.run.mismatch, curve.run.lr) == (arm, plan.mismatches[0], plan.lrs[0])
    }
    if seed not in mine:
        raise ValueError(f"{arm}, seed {seed}: the testbed's run is not done. First: study.py run.")
    run = next(r for r in plan.runs if (r.arm, r.seed) == (arm, seed))
    place = folder / f"stage_{plan.stage}" / "sglang" / f"{arm}-seed{seed}"
    if not place.is_dir() or max((row["step"] for row in read_metrics(place)), default=0) < steps:
        config = run_folder(folder, run) / CONFIG_FILE
        launch = [sys.executable, "-m", "megatron_jackpot.cli", "launch", str(config), f"run.folder={place}"]
        subprocess.run(
            [*launch, f"run.steps={steps}", "run.resume=auto", f"run.save_every={plan.every}"],
            cwd=ROOT,
            check=True,
            timeout=LIMIT_S,
        )
    theirs = {
        row["step"]: row["eval/policy_accuracy"]
        for row in read_metrics(place)
        if "eval/policy_accuracy" in row
    }
    distances = []
    print(
        "| step | SGLang | testbed, same seed | testbed, mean of seeds | sd of seeds |\n|---|---|---|---|---|"
    )
    for step in sorted(theirs.keys() & mine[seed].keys()):
        all_seeds = [curve[step] for curve in mine.values() if step in curve]
        sd = statistics.stdev(all_seeds) if len(all_seeds) > 1 else float("nan")
        mean = statistics.fmean(all_seeds)
        print(f"| {step} | {theirs[step]:.3f} | {mine[seed][step]:.3f} | {mean:.3f} | {sd:.3f} |")
        if sd > 0:
            distances.append((theirs[step] - mean) / sd)
    result = {"arm": arm, "seed": seed, "seeds": sorted(mine), "largest_distance_in_sd": None}
    if distances:
        result["largest_distance_in_sd"] = max(distances, key=abs)
    print(json.dumps(result))
