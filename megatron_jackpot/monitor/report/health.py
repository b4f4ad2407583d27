"""How a run is doing: one line of verdict, and what it rests on, from its metrics and logs."""

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from megatron_jackpot.monitor.metrics import Row, series
from megatron_jackpot.run.provenance import METRICS_FILE, PROVENANCE_FILE
from megatron_jackpot.run.watchdog import Doing, read_doing

Level = Literal["bad", "warn", "note"]
State = Literal["good", "running", "warn", "bad"]

RECENT = 10
"""Steps that a judgement about the present looks at."""
SILENT_S = 120
SILENT_STEPS = 5
"""A run that has written nothing for so many seconds, and for so many of its steps, has stopped, unless the
main rank is in a phase that may last longer: evaluations and saves come between a step and its row."""
SERVER_LOGS, TRAIN_LOGS = ("server-*.log", "servers/*/server-*.log"), "train*.log"
SAME_REWARDS, CUT, FEW_SAMPLES = 0.9, 0.2, 0.1
"""Shares that are worth a word: groups of equal rewards and cut responses above, ESS below."""
LOG_BYTES = 4 * 2**20
"""The end of each log that is read."""


@dataclass(frozen=True)
class Finding:
    """One thing about a run that a reader should know."""

    level: Level
    text: str


@dataclass(frozen=True)
class Verdict:
    """What a reader in a hurry gets."""

    state: State
    text: str


@dataclass(frozen=True)
class Signs:
    """Of life: what a run's folder has last heard."""

    row_s: float
    """Age of the newest row."""
    newest_s: float
    """Of whatever a run writes while it starts and works: rows, logs, what the main rank does."""
    doing: Doing | None = None
    """Of the main rank."""

    def alive(self, silent_s: float) -> bool:
        """Whether there was any within `silent_s`, or a phase goes on that may be silent for longer."""
        return self.newest_s < silent_s or (self.doing is not None and self.doing.goes_on)

    def last_phase(self) -> str:
        """Example: "rank 0 was last heard of 3 min 20 s ago, in 'evaluation'"; "" between two phases."""
        if self.doing is None or not self.doing.phases:
            return ""
        return f"rank 0 was last heard of {duration(self.doing.age_s)} ago, in '{self.doing.phases[-1]}'"


def signs(folder: Path) -> Signs:
    patterns = (METRICS_FILE, PROVENANCE_FILE, TRAIN_LOGS, *SERVER_LOGS)
    ages = [age_s(path) for pattern in patterns for path in folder.glob(pattern)]
    doing = read_doing(folder, 0)
    if doing is not None:
        ages.append(doing.age_s)
    rows = folder / METRICS_FILE
    return Signs(age_s(rows) if rows.is_file() else math.inf, min(ages, default=math.inf), doing)


def verdict(rows: list[Row], found: list[Finding], *, steps: int | None, heard: Signs) -> Verdict:
    """`steps` are those the run is to do, None where unknown."""
    done = max((row["step"] for row in rows), default=0)
    of = f"{done} of {steps} steps" if steps else f"{done} steps"
    times = series(rows, "time/step")[1]
    typical_s = median(times) if times else 0.0
    silent_s = max(SILENT_S, SILENT_STEPS * typical_s)
    state: State = "good"
    if steps is not None and done >= steps:
        head = f"Finished: {of} in {duration(sum(times))}."
    elif heard.alive(silent_s):
        state, left = "running", typical_s * ((steps or done) - done)
        head = f"Running: {of}" + (f", about {duration(left)} left." if left else ".")
        if heard.row_s >= silent_s:
            head += f" No row for {duration(heard.row_s)}; {_since_then(heard)}."
    else:
        state, head = "warn", f"Stopped after {of}; the last was written {duration(heard.row_s)} ago."
        if last := heard.last_phase():
            head += f" {last[0].upper()}{last[1:]}."
    troubles = [one.text for one in found if one.level != "note"]
    if any(one.level == "bad" for one in found):
        state = "bad"
    elif troubles:
        state = "warn"
    tail = (
        f"Look at: {'; '.join(troubles)}."
        if troubles
        else "Healthy: no retries, no restarts, no skipped steps, no reward that failed."
    )
    return Verdict(state, " ".join([head, *progress(rows), tail]))


def _since_then(heard: Signs) -> str:
    """What is known of a run that lives and writes no row: one that was killed leaves its last word, too."""
    if heard.doing is not None and heard.doing.goes_on:
        return f"{heard.last_phase()}, which may take {duration(heard.doing.within_s)}"
    return f"its folder has news of {duration(heard.newest_s)} ago"


def progress(rows: list[Row]) -> Iterator[str]:
    """What was learned: accuracy, else reward."""
    for name, title in (("eval/policy_accuracy", "Policy accuracy"), ("reward/mean", "Reward")):
        steps, values = series(rows, name)
        if len(values) > 1:
            best = max(range(len(values)), key=values.__getitem__)
            change = f"{values[0]:.3f} \u2192 {values[-1]:.3f}"
            yield f"{title} {change} (best {values[best]:.3f} at step {steps[best]})."
            return


def findings(folder: Path, rows: list[Row], *, prompts: int, samples: int) -> list[Finding]:
    """`prompts` of `samples` rollouts each make a step; 0 where unknown."""
    return [*_rollouts(rows, prompts, samples), *_training(rows), *_present(rows), *_logs(folder)]


def _rollouts(rows: list[Row], prompts: int, samples: int) -> Iterator[Finding]:
    retries, failed = _total(rows, "rollout/retries") * prompts, _total(rows, "rollout/failed_groups")
    if retries:
        yield Finding("warn", f"{_count(retries, 'request')} tried again")
    if failed:
        lost = f"{_count(failed * prompts, 'group')} lost to failed requests"
        yield Finding("warn", lost)
    for name, what in (("reward/timed_out", "timed out"), ("reward/crashed", "crashed")):
        if share := _total(rows, name):
            yield Finding("bad", f"{_count(share * prompts * samples, 'reward')} {what}")
    if worst := max(series(rows, "eval/failed_rewards")[1], default=0.0):
        yield Finding("bad", f"up to {worst:.1%} of an evaluation's rewards failed")


def _training(rows: list[Row]) -> Iterator[Finding]:
    for model in ("policy", "actor"):
        if skipped := _total(rows, f"guard/skipped_{model}"):
            yield Finding("bad", f"{_count(skipped, 'step')} of the {model} skipped (gradient not finite)")
    if empty := _total(rows, "batch/skipped"):
        yield Finding("warn", f"{_count(empty, 'mini-batch', 'es')} without a valid token")
    if paused := _total(rows, "guard/paused"):
        yield Finding("warn", f"policy paused in {_count(paused, 'step')} (guard)")
    if unsaved := max(series(rows, "save/failed")[1], default=0.0):
        yield Finding("bad", f"{_count(unsaved, 'checkpoint')} could not be saved")
    lost: dict[str, int] = {}
    for row in rows:
        for name, value in row.items():
            if value is None:
                lost[name] = lost.get(name, 0) + 1
    for name, count in sorted(lost.items()):
        yield Finding("warn", f"{name} not finite in {_count(count, 'row')}")


def _present(rows: list[Row]) -> Iterator[Finding]:
    def lately(name: str) -> float | None:
        values = series(rows, name)[1][-RECENT:]
        return sum(values) / len(values) if values else None

    equal, cut, ess = lately("rollout/equal_rewards"), lately("rollout/truncated"), lately("weight/ess")
    if equal is not None and equal > SAME_REWARDS:
        yield Finding("warn", f"{equal:.0%} of the last groups have equal rewards and teach nothing")
    if cut is not None and cut > CUT:
        yield Finding("warn", f"{cut:.0%} of the last responses were cut at rollout.max_new_tokens")
    if ess is not None and ess < FEW_SAMPLES:
        yield Finding("warn", f"effective sample size is {ess:.0%} of the tokens")


def _logs(folder: Path) -> Iterator[Finding]:
    restarts = sum(
        len(re.findall(r"^\[supervisor\] restart ", _end_of(log), re.MULTILINE))
        for pattern in SERVER_LOGS
        for log in folder.glob(pattern)
    )
    if restarts:
        yield Finding("warn", f"{_count(restarts, 'restart')} of a server")
    text = "".join(_end_of(log) for log in sorted(folder.glob(TRAIN_LOGS)))
    if resumed := len(re.findall(r"^resumed after step \d+", text, re.MULTILINE)):
        yield Finding("warn", f"training went on from a checkpoint {_count(resumed, 'time')}")
    warnings = re.findall(r"^WARNING: (.+)$", text, re.MULTILINE)
    for warning in warnings[-5:]:
        yield Finding("note", f"train.log: {warning[:300]}")
    if len(warnings) > 5:
        yield Finding("note", f"train.log has {len(warnings)} warnings")


def _end_of(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_BYTES))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def age_s(path: Path) -> float:
    return max(0.0, time.time() - path.stat().st_mtime)


def duration(seconds: float) -> str:
    """Example: "6 min 34 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _total(rows: list[Row], name: str) -> float:
    return sum(series(rows, name)[1])


def _count(number: float, what: str, plural: str = "s") -> str:
    """Example: "3 rewards". A share of an unknown number becomes "some"."""
    rounded = round(number)
    if not rounded:
        return f"some {what}{plural}"
    return f"{rounded} {what}{'' if rounded == 1 else plural}"
