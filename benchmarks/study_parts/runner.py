"""One run of the study from start or checkpoint to end, or to a time limit; a line for each evaluation."""

import fcntl
import hashlib
import json
import math
import shutil
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.study_parts.plan import ROOT, Plan, Run, fingerprint, run_folder
from benchmarks.study_parts.testbed import Testbed, build, model_files
from megatron_jackpot.monitor.metrics import JsonLines, read_metrics
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.run.provenance import CONFIG_FILE, checkpoints, git_commit, record
from megatron_jackpot.train import checkpoint
from megatron_jackpot.train.checkpoint import Saver
from megatron_jackpot.train.guard import RollBack

LINES, FIRST, ORIGIN, DONE = "evaluations.jsonl", "first_steps.jsonl", "origin.json", "done"
FIRST_STEPS = 10
"""As many steps are recorded in FIRST with all their numbers, for `study.py revalidate`."""
KEPT = (
    *("reward/mean", "rollout/equal_rewards", "rollout/response_tokens", "kl/target_server", "weight/ess"),
    *(
        "jackpot/acceptance_expected",
        "jackpot/z_p05",
        "gap/actor_server",
        "grad_norm/policy",
        "grad_norm/actor",
    ),
    *("loss/distill", "objective/clip_fraction", "kl/server_policy_k3", "time/step"),
)
"""Metrics of steps whose means stand in the next evaluation's line."""
SPENT = ("spent/samples", "spent/tokens", "time/spent", "time/sampling")
"""Since step 0: rollouts that were sampled, tokens that were trained on, processor seconds of steps and, of
these, of sampling."""
PROVING = ("reward", "jackpot", "weight", "kl", "gap", "objective", "loss", "grad_norm")
"""Groups of metrics that follow from code, settings and models alone."""


class Stale(ValueError):
    """A run that was begun with other code, settings or models than there are now."""


def origin(plan: Plan, run: Run, folder: Path) -> dict[str, Any]:
    """What decides a run's numbers, and the commit: of a run that would start now."""
    config = plan.config(run, folder)
    settings = json.dumps(config.model_dump(mode="json", exclude={"run": {"folder"}}), sort_keys=True)
    commit, dirty = git_commit(ROOT / "benchmarks")
    return {
        "commit": commit,
        "dirty": dirty,
        "code": fingerprint(plan.task),
        "settings": _short(
            json.dumps(settings, sort_keys=True, default=str).replace(str(folder), "").encode()
        ),
        "models": _short(b"".join(path.read_bytes() for path in model_files(config))),
    }


def difference(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Which of code, settings and models are others; commits may differ where none of them does."""
    return [key for key in ("code", "settings", "models") if then[key] != now[key]]


def perform(plan: Plan, run: Run, folder: Path, mesh: Mesh, deadline: float) -> bool:
    """Whether the run is done: it saves and ends at the first evaluation after `deadline` (time.monotonic).

    Raises Stale for one begun otherwise, BlockingIOError where another process is at it.
    """
    place = run_folder(folder, run)
    with _locked(place):
        if (place / DONE).is_file():
            return True
        now = origin(plan, run, folder)
        if (place / ORIGIN).is_file():
            now = json.loads((place / ORIGIN).read_text(encoding="utf-8"))
            if others := difference(now, origin(plan, run, folder)):
                raise Stale(f"{place} was begun with other {' and '.join(others)}. Remove it to begin anew.")
        elif _taken_from_twin(plan, run, folder, now):
            return True
        bed = build(plan.config(run, folder), mesh)
        saved = bool(checkpoints(place))
        if saved:
            checkpoint.resume(bed.trainer.state, place)
        else:
            record(bed.trainer.config, place)
            (place / ORIGIN).write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        resume_step = bed.trainer.state.num_steps if saved else -1
        lines, first = (JsonLines(place / name, resume_step=resume_step) for name in (LINES, FIRST))
        line = {**run.key, "commit": now["commit"], "code": now["code"]}
        try:
            return _perform(bed, lines, first, line, place, plan, deadline)
        finally:
            lines.close()
            first.close()
            bed.close()


def proof_of(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Those of a step that another run of the same code repeats bit for bit; null where not finite."""
    named = {name: value for name, value in metrics.items() if name.partition("/")[0] in PROVING}
    return {name: value if math.isfinite(value) else None for name, value in named.items()}


def _perform(
    bed: Testbed,
    lines: JsonLines,
    first: JsonLines,
    line: dict[str, Any],
    place: Path,
    plan: Plan,
    deadline: float,
) -> bool:
    trainer, state = bed.trainer, bed.trainer.state
    trainer.push()
    if state.num_steps == 0:
        lines.write({**line, "step": 0, **bed.evaluate(), **dict.fromkeys(SPENT, 0.0)})
    spent = Counter({name: read_metrics(place / LINES)[-1][name] for name in SPENT})

    def over() -> bool:
        enough = plan.samples is not None and spent["spent/samples"] >= plan.samples
        return enough or state.num_steps >= trainer.config.run.steps

    while not over():
        means: dict[str, list[float]] = defaultdict(list)
        try:
            for _ in range(plan.every):
                began, server = time.process_time(), bed.server
                sampled, seconds = server.num_samples, server.seconds
                metrics = trainer.step().metrics
                spent["spent/samples"] += server.num_samples - sampled
                spent["time/sampling"] += server.seconds - seconds
                spent["spent/tokens"] += metrics["train/tokens"]
                spent["time/spent"] += time.process_time() - began
                if state.num_steps <= FIRST_STEPS:
                    first.write({"step": state.num_steps, **proof_of(metrics)})
                for name in (name for name in KEPT if name in metrics):
                    means[name].append(metrics[name])
                if over():
                    break
        except RollBack as error:
            # Numbers that are not finite, again and again: that is a result of the arm.
            lines.write({**line, "step": state.num_steps, "failed": str(error)})
            break
        # Of times the median: others are on the machine.
        kept = {k: (statistics.median if k == "time/step" else statistics.fmean)(v) for k, v in means.items()}
        lines.write({**line, "step": state.num_steps, **bed.evaluate(), **kept, **spent})
        if time.monotonic() > deadline and not over():
            Saver(state, trainer.config.run, trainer.watchdog).save(background=False)
            return False
    (place / DONE).touch()
    return True


def _taken_from_twin(plan: Plan, run: Run, folder: Path, now: dict[str, Any]) -> bool:
    """Whether the run is done at another mismatch: without an actor it is the same, bit for bit."""
    twins = (replace(run, mismatch=other) for other in plan.mismatches if other != run.mismatch)
    for place in (run_folder(folder, twin) for twin in twins):
        if not (place / DONE).is_file():
            continue
        origin_of_twin = json.loads((place / ORIGIN).read_text(encoding="utf-8"))
        if difference(origin_of_twin, now):
            continue
        own = run_folder(folder, run)
        for name in (CONFIG_FILE, FIRST, ORIGIN):
            shutil.copy(place / name, own / name)
        rows = [
            json.loads(line) | run.key for line in (place / LINES).read_text(encoding="utf-8").splitlines()
        ]
        (own / LINES).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        (own / DONE).touch()
        return True
    return False


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
