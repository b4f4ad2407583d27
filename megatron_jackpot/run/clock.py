"""When a run began: what its prompts take for today, on whatever day it is continued."""

import datetime
import json
from pathlib import Path
from typing import Literal

STARTED_FILE = "started.json"


def started_at(folder: Path, resume: bool | Literal["auto"]) -> datetime.datetime:
    """Local time with its zone: what is written in the folder of a run that goes on, now for another."""
    path = Path(folder) / STARTED_FILE
    if resume and path.is_file():
        try:
            return datetime.datetime.fromisoformat(json.loads(path.read_text(encoding="utf-8"))["time"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not hold a time: {error}. Restore it, or delete it.") from error
    return datetime.datetime.now().astimezone()


def write_start(folder: Path, time: datetime.datetime) -> None:
    """Keep it for those who continue the run."""
    path = Path(folder) / STARTED_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps({"time": time.isoformat()}) + "\n", encoding="utf-8")
    partial.replace(path)
