"""What a plan takes and what it could show, before it begins."""

import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.study_parts import stats
from benchmarks.study_parts.plan import Plan, run_folder
from benchmarks.study_parts.report import blocks, finished
from benchmarks.study_parts.runner import DONE
from benchmarks.study_parts.testbed import build
from megatron_jackpot.parallel.context import Mesh

STEPS = 4


def estimate(plan: Plan, folder: Path, mesh: Mesh) -> bool:
    """Print both; whether the whole plan fits its budget. Measured is the first run of its last arm."""
    step_s, evaluation_s = measure(plan, folder, mesh)
    runs = len(plan.runs)
    left = sum(not (run_folder(folder, run) / DONE).is_file() for run in plan.runs)
    run_s = plan.steps * step_s + (plan.steps // plan.every + 1) * evaluation_s
    hours = runs * run_s / 3600
    print(
        f"stage {plan.stage}: {runs} runs x {run_s:.0f} s ({plan.steps} steps of {step_s:.2f} s, "
        f"evaluations of {evaluation_s:.2f} s) = {hours:.1f} h of {plan.budget_h:g}; {left} runs are left"
    )
    sd, source = plan.assumed_sd, "assumed"
    gaps = [
        (block.judged(one, "last")[0] - block.judged(other, "last")[0]).std(ddof=1)
        for block in blocks(plan, finished(plan, folder))
        if len(block.seeds) > 1
        for one, other in plan.contrasts
    ]
    if gaps:
        sd, source = statistics.median(float(gap) for gap in gaps), "of the finished runs"
    units = len(plan.seeds)
    print(
        f"smallest difference between two arms that {units} paired seeds resolve (80% power, two-sided 5%): "
        f"{stats.resolvable(sd, units):.3f}, where the differences' standard deviation is {sd:.3f} ({source})"
    )
    if hours > plan.budget_h:
        print(f"REFUSED: budget_h = {plan.budget_h:g} < {hours:.1f} h. Take fewer seeds, rates or steps.")
    return hours <= plan.budget_h


def measure(plan: Plan, folder: Path, mesh: Mesh) -> tuple[float, float]:
    """Processor seconds of a step and of an evaluation: others may be on the machine."""
    run = next(run for run in plan.runs if run.arm == list(plan.arms)[-1])
    config = plan.config(run, folder)
    with tempfile.TemporaryDirectory() as scratch:
        config = config.model_copy(update={"run": config.run.model_copy(update={"folder": Path(scratch)})})
        bed = build(config, mesh)
        bed.trainer.push()
        bed.trainer.step()
        began = time.process_time()
        for _ in range(STEPS):
            bed.trainer.step()
        middle = time.process_time()
        bed.evaluate()
        end = time.process_time()
        bed.close()
        return (middle - began) / STEPS, end - middle
