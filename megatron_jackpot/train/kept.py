"""Which checkpoints of a run stay on disk, and the links to the newest and the best of them."""

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_jackpot.algorithm.registry import nearest
from megatron_jackpot.config import ConfigError
from megatron_jackpot.config.run import Run
from megatron_jackpot.run.provenance import BEST, LATEST, checkpoints, step_of

log = logging.getLogger(__name__)

LEFT = "left-"
"""Before the name of a checkpoint that was set aside."""
STATE = "state.json"
"""What a checkpoint holds beside the models, as JSON."""
MEASURED = "measured"
"""Its key for the metric by which checkpoints are compared: {name: value}, {} where it was not measured."""


def measured(run: Run, metrics: Mapping[str, float]) -> dict[str, float]:
    """What a checkpoint carries to be compared by, of the metrics of its step."""
    name = (run.keep_best or "").removeprefix("-")
    found = metrics.get(name, math.nan)
    return {name: float(found)} if math.isfinite(found) else {}


def check_measured(run: Run, evaluated: Sequence[str]) -> None:
    """Raises ConfigError where run.keep_best names an evaluation that is none of the run's."""
    name = (run.keep_best or "").removeprefix("-")
    if name.startswith("eval/") and name not in evaluated:
        raise ConfigError(
            f"run.keep_best = '{run.keep_best}' is not measured here. {nearest(name, list(evaluated))}"
        )


def tidy(run: Run, newest: Path) -> None:
    """After `newest` was published: the links, and nothing that need not stay."""
    link(newest, LATEST)
    set_aside(newest, run.keep)
    saved = checkpoints(newest.parent.parent)
    best = None if run.keep_best is None else best_of(saved, run.keep_best)
    if best is not None:
        link(best, BEST)
    else:
        newest.with_name(BEST).unlink(missing_ok=True)
        if run.keep_best is not None:
            log.warning(f"run.keep_best = '{run.keep_best}': no checkpoint's step has measured it so far")
    for old in saved[: -run.keep]:
        divided = run.keep_every is not None and step_of(old) % run.keep_every == 0
        if old != best and not divided:
            shutil.rmtree(old)


def set_aside(newest: Path, keep: int) -> None:
    """Rename checkpoints after `newest`: of a course that the run has left, for it went back or they are
    damaged. No resume may take them for the newest, nor a save for what is to stay instead of its own. Of
    those that were renamed the last `keep` stay."""
    for folder in checkpoints(newest.parent.parent):
        if step_of(folder) > step_of(newest):
            aside = folder.with_name(f"{LEFT}{folder.name}")
            if aside.exists():
                shutil.rmtree(aside)
            folder.rename(aside)
            log.warning(f"{folder} is of a course that the run has left: it is {aside.name} now")
    for old in sorted(newest.parent.glob(f"{LEFT}step-*"), key=lambda path: path.stat().st_mtime)[:-keep]:
        shutil.rmtree(old)


def best_of(saved: Sequence[Path], metric: str) -> Path | None:
    """The first with the highest value of `metric`, the lowest of a "-metric"; None where none has it."""
    name, sign = metric.removeprefix("-"), -1 if metric.startswith("-") else 1
    values = {folder: value for folder in saved if (value := _value(folder, name)) is not None}
    return max(values, key=lambda folder: sign * values[folder], default=None)


def _value(checkpoint: Path, name: str) -> float | None:
    try:
        return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))[MEASURED].get(name)
    except (OSError, ValueError, KeyError, AttributeError):
        return None  # A damaged one, or one from before checkpoints carried it.


def link(checkpoint: Path, name: str) -> None:
    """The link `name` beside a checkpoint, to it."""
    pointer = checkpoint.with_name(f".{name}")
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(checkpoint.name)
    pointer.replace(checkpoint.with_name(name))
