"""The formats of what a run leaves behind, by number; one that this version does not read is refused by name.

What carries none has format 0. To change a format, add its present number here, with the last commit that
reads it; from then on the next number is written. Models as HF folders have no number: they always load.
"""

import json
from pathlib import Path
from typing import Literal

Kind = Literal["checkpoint", "run folder", "metrics"]

FORMATS: dict[Kind, dict[int, str]] = {
    "checkpoint": {0: "8170530", 1: "e5a6930"},
    "run folder": {0: "8170530"},
    "metrics": {0: "8170530"},
}
"""Formats that are not read any more -> the last commit that reads them."""
FIELD = "format"
"""The key of the number in each file that carries one."""


def current(kind: Kind) -> int:
    """The format that is written and read."""
    return max(FORMATS[kind]) + 1


def check_format(kind: Kind, found: object, where: object) -> None:
    """Raises ValueError naming the commit that reads `found`, the format of what lies at `where`."""
    if found == current(kind):
        return
    commit = FORMATS[kind].get(found) if isinstance(found, int) else None
    remedy = f"Commit {commit} reads it" if commit else "A later commit wrote it; provenance.json names that"
    raise ValueError(
        f"{where} has {kind} format {found}, this version reads format {current(kind)}. {remedy}: use that "
        "commit, or another run.folder."
    )


def check_file(kind: Kind, path: Path) -> None:
    """Of a JSON object in a file; one that is absent passes. Raises ValueError as `check_format` does."""
    if not path.is_file():
        return
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}. Restore it, or delete it.") from error
    check_format(kind, held.get(FIELD, 0) if isinstance(held, dict) else 0, path)
