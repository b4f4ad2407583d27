"""Whether runs of older code still say what this checkout would: by what it does, not by how it reads.

Of every arm one run's first steps are repeated. Where they come to the recorded numbers, what was written
otherwise since does not reach the arm, and all its finished runs take this checkout's stamp beside their own.
A token on the border of a mask falls to its other side by rounding alone: where one run does not repeat, two
others must.
"""

import json
import math
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study_parts.plan import Plan, Run, run_folder
from benchmarks.study_parts.runner import DONE, FIRST, LINES, ORIGIN, difference, origin, proof_of
from benchmarks.study_parts.testbed import build
from megatron_jackpot.config.yaml_tree import read_tree
from megatron_jackpot.monitor.metrics import read_metrics
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.run.provenance import CONFIG_FILE

TOLERANCE, GAP = 1e-4, 1e-6
"""Relative, or absolute of gaps that are rounding alone. Layers that add in another order have moved losses
and gradient norms by 1.2e-5 within ten steps, a token on the other side of IcePop's mask by 4e-2."""
EVALUATED = ("eval/policy_accuracy", "eval/policy_exact")
STEPPED = ("loss/policy", "grad_norm/policy", "reward/mean", "weight/ess", "kl/target_server")
"""What must be there on both sides, lest nothing be compared; other names that only one has do not count."""
MADE = ("commit", "dirty", "code", "settings")


def revalidate(plan: Plan, folder: Path, mesh: Mesh, steps: int) -> int:
    """Stamp the stale runs of each arm whose first `steps` repeat, and say so; how many arms do not."""
    failed = 0
    for arm in plan.arms:
        # One that is under way goes on with the code it was begun with, or not at all.
        done = [run for run in plan.runs if run.arm == arm and (run_folder(folder, run) / DONE).is_file()]
        stale = [run for run in done if difference(_origin(folder, run), origin(plan, run, folder))]
        if not stale:
            print(f"{arm}: {len(done)} finished runs, none is stale", flush=True)
            continue
        repeated, differed = _witnesses(plan, stale, folder, mesh, steps)
        for name, found in differed.items():
            print(f"{arm}: {name} does not repeat: {found}", flush=True)
        if len(repeated) <= len(differed):
            failed += 1
            print(f"{arm}: {len(stale)} runs stay stale", flush=True)
            continue
        how = f"{steps} steps of {', '.join(repeated)}" + "".join(f", not of {name}" for name in differed)
        stamped = sum(_stamp(plan, run, folder, how) for run in stale)
        print(f"{arm}: repeated {how}; {stamped} of {len(stale)} runs are stamped anew", flush=True)
    return failed


def _witnesses(
    plan: Plan, stale: Sequence[Run], folder: Path, mesh: Mesh, steps: int
) -> tuple[list[str], dict[str, str]]:
    """(the runs that repeat, those that do not with what differs): the first alone, or it and two others."""
    repeated: list[str] = []
    differed: dict[str, str] = {}
    for run in stale[:3]:
        if found := _repeat(plan, run, folder, mesh, steps):
            differed[run.name] = found
        else:
            repeated.append(run.name)
        if not differed or len(differed) == 2:
            break
    return repeated, differed


def _repeat(plan: Plan, run: Run, folder: Path, mesh: Mesh, steps: int) -> str:
    """What differs first in the evaluation before the first step and in the steps; "" for nothing."""
    place = run_folder(folder, run)
    recorded = read_metrics(place / FIRST) if (place / FIRST).is_file() else []
    if len(recorded) < steps:
        return f"only {len(recorded)} steps are recorded"
    config = plan.config(run, folder)
    with tempfile.TemporaryDirectory() as scratch:
        here = config.run.model_copy(update={"folder": Path(scratch)})
        bed = build(config.model_copy(update={"run": here}), mesh)
        try:
            bed.trainer.push()
            found = first_difference(read_metrics(place / LINES)[0], bed.evaluate(), EVALUATED)
            for row in recorded[:steps]:
                if found:
                    break
                found = first_difference(row, proof_of(bed.trainer.step().metrics), STEPPED)
            return found
        finally:
            bed.close()


def first_difference(then: Mapping[str, Any], now: Mapping[str, Any], required: Collection[str]) -> str:
    """Example: 'step 3, loss/policy: 0.25 then, 0.26 now'; "" where all that both have is equal."""
    for name in sorted((then.keys() & now.keys()) | set(required)):
        one, other = then.get(name), now.get(name)
        if one is None or other is None or not math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=GAP):
            return f"step {then['step']}, {name}: {one} then, {other} now"
    return ""


def _stamp(plan: Plan, run: Run, folder: Path, how: str) -> bool:
    """Whether the run is of these models and as long as the plan has it, and so was stamped."""
    then, now = _origin(folder, run), origin(plan, run, folder)
    config = read_tree(run_folder(folder, run) / CONFIG_FILE)
    if then["models"] != now["models"] or config["run"]["steps"] != plan.steps:
        return False
    made = then.get("made", {key: then[key] for key in MADE})
    text = json.dumps({**now, "made": made, "revalidated": how}, indent=1) + "\n"
    (run_folder(folder, run) / ORIGIN).write_text(text, encoding="utf-8")
    return True


def _origin(folder: Path, run: Run) -> dict[str, Any]:
    return json.loads((run_folder(folder, run) / ORIGIN).read_text(encoding="utf-8"))
