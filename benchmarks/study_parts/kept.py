"""What of a study is kept in the repository: warmed models, and the records of finished runs.

With them tables and pictures are made without a run, and a stage goes on elsewhere. benchmarks/kept has
models/ as a study's folder has them, and stage_X.jsonl.xz with a line for each finished run.
"""

import json
import lzma
import os
import shutil
from pathlib import Path
from typing import Any

from benchmarks.study_parts.plan import ROOT, Plan, run_folder
from benchmarks.study_parts.runner import DONE, FIRST, LINES, ORIGIN
from megatron_jackpot.run.provenance import CONFIG_FILE

KEPT = ROOT / "benchmarks" / "kept"
ANYWHERE = "FOLDER"
"""In kept settings, in the place of the study's folder."""
DIGITS = 7
"""Of a number that is kept: `revalidate` compares to 1e-4."""


def keep(plan: Plan, folder: Path, kept: Path = KEPT) -> Path:
    """Write the finished runs of a stage. Raises ValueError where that would drop runs that are kept."""
    rows = {
        run.name: _record(run_folder(folder, run), folder)
        for run in plan.runs
        if (run_folder(folder, run) / DONE).is_file()
    }
    path = kept / f"stage_{plan.stage}.jsonl.xz"
    if dropped := sorted(_read(path).keys() - rows.keys()) if path.is_file() else []:
        raise ValueError(
            f"{folder} lacks {len(dropped)} runs that {path.name} has, {dropped[0]} among them. "
            f"Put them there first: study.py prepare {folder}"
        )
    lines = "".join(f"{json.dumps({'run': name, **row})}\n" for name, row in rows.items())
    kept.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_bytes(lzma.compress(lines.encode(), preset=9))
    os.replace(aside, path)
    return path


def take_out(folder: Path, kept: Path = KEPT) -> int:
    """Put models and records where `folder` has none of that name; how many runs that were."""
    for model in sorted(kept.glob("models/*/*")):
        place = folder / model.relative_to(kept)
        if model.is_dir() and not place.exists():
            aside = place.with_suffix(".part")
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(model, aside)
            os.replace(aside, place)
        elif model.is_file() and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(model, place)
    put = 0
    for path in sorted(kept.glob("stage_*.jsonl.xz")):
        for name, row in _read(path).items():
            place = folder / path.name.partition(".")[0] / name
            # A runner that was told to stop may have left an empty one.
            if not (place / ORIGIN).exists():
                _write(place, row, folder)
                put += 1
    return put


def _record(place: Path, folder: Path) -> dict[str, Any]:
    settings = (place / CONFIG_FILE).read_text(encoding="utf-8").replace(str(folder), ANYWHERE)
    rows = {name: (place / name).read_text(encoding="utf-8").splitlines() for name in (LINES, FIRST)}
    origin = json.loads((place / ORIGIN).read_text(encoding="utf-8"))
    return {
        CONFIG_FILE: settings,
        ORIGIN: origin,
        **{name: [_short(json.loads(row)) for row in rows[name]] for name in rows},
    }


def _read(path: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in lzma.decompress(path.read_bytes()).decode().splitlines()]
    return {row.pop("run"): row for row in rows}


def _write(place: Path, row: dict[str, Any], folder: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    settings = row[CONFIG_FILE].replace(ANYWHERE, str(folder))
    (place / CONFIG_FILE).write_text(settings, encoding="utf-8")
    for name in (LINES, FIRST):
        (place / name).write_text("".join(f"{json.dumps(one)}\n" for one in row[name]), encoding="utf-8")
    (place / DONE).touch()
    # Last: where it is, all of it is.
    (place / ORIGIN).write_text(json.dumps(row[ORIGIN], indent=1) + "\n", encoding="utf-8")


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.{DIGITS}g}") if isinstance(v, float) else v for k, v in row.items()}
