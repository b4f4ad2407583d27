"""What `megatron-jackpot evaluate` found: a row for each set in RUN/evaluations.jsonl, and some answers.

They lie beside metrics.jsonl, not in it: a run that goes on writes there, and cuts it back at a resume.
"""

import fcntl
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_jackpot.monitor.metrics import Row, line_of, read_metrics

EVALUATIONS_FILE = "evaluations.jsonl"
ANSWERS_FILE = "evaluated.jsonl"
"""The first answers of each set, as samples.jsonl has them."""


def write_evaluations(folder: Path, rows: Iterable[Row], answers: Iterable[Row]) -> None:
    """Behind what is there, while others may do the same."""
    _append(folder / EVALUATIONS_FILE, rows)
    _append(folder / ANSWERS_FILE, answers)


def read_evaluations(folder: Path) -> list[Row]:
    """In file order; [] where nothing was evaluated so. Raises ValueError as `read_metrics` does."""
    path = Path(folder) / EVALUATIONS_FILE
    return read_metrics(path) if path.is_file() else []


def evaluation_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells, for terminal and report, results first, as a narrow window shows them; pass@k has a
    column for each k that some row has."""
    passes = [{int(k): value for k, value in _passes(row)} for row in rows]
    sizes = sorted({k for found in passes for k in found})
    cells = []
    for row, found in zip(rows, passes, strict=True):
        numbers = [row["metrics"].get(f"{prefix(row)}_accuracy"), *map(found.get, sizes)]
        shown = ["-" if number is None else f"{number:.3f}" for number in numbers]
        settings = [str(row["problems"]), str(row["samples"]), f"{row['temperature']:g}"]
        whose = [str(row["step"]), row["model"], row["set"] or "held out"]
        cells.append([*whose, *shown, f"{row['truncated']:.1%}", *settings])
    heads = ["step", "model", "set", "avg", *(f"pass@{k}" for k in sizes), "cut", "problems", "answers", "T"]
    return heads, cells


def prefix(row: Row) -> str:
    """What a row's metrics begin with. Example: "eval/aime/policy"."""
    return "/".join(filter(None, ("eval", row["set"], row["model"])))


def _passes(row: Row) -> Iterator[tuple[str, float]]:
    for name, value in row["metrics"].items():
        if found := re.fullmatch(rf"{re.escape(prefix(row))}_pass@(\d+)", name):
            yield found[1], value


def _append(path: Path, rows: Iterable[Row]) -> None:
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        # What a writer left unfinished when it was killed.
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write("".join(map(line_of, rows)).encode())
        file.flush()
        os.fsync(file.fileno())
