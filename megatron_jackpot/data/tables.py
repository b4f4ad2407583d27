"""Rows of parquet files and of Hugging Face data sets on disk, read by pyarrow where it is installed."""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ENDING = ".parquet"
STATE = "state.json"
"""What `Dataset.save_to_disk` writes beside its arrow files."""
SPLITS = "dataset_dict.json"
"""What `DatasetDict.save_to_disk` writes above a folder for each split."""
SHARD = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$|^part[-._]\d+.*$|^[\d_-]+$")
"""What tells files of one list apart: train-00000-of-00002 (older uploads have a hash behind it), part-0 as
Arrow and Spark write it, 0000 in a folder for each split and configuration."""
Row = dict[str, Any]
"""Column -> value, as JSON gives them."""
MOST_NAMED = 4
"""Splits that the refusal of several names."""
BATCH = 1024
"""Rows that are held as Python values at a time."""


def is_table(path: Path) -> bool:
    """Whether it is parquet or a folder; anything else is read as jsonl."""
    return Path(path).is_dir() or Path(path).suffix == ENDING


def files_behind(path: Path) -> list[Path]:
    """What the rows of `path` are read from, in their order: the file itself, or those of a data set's
    folder. Raises ValueError for a folder that is none, FileNotFoundError for nothing there."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file. Set data.path (data.heldout_path) to one with rows.")
    if not path.is_dir():
        return [path]
    if (path / SPLITS).is_file():
        splits = json.loads((path / SPLITS).read_text(encoding="utf-8")).get("splits", [])
        raise ValueError(f"{path} holds the splits {', '.join(splits)}. Name the folder of one of them.")
    if (path / STATE).is_file():
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state.get("_indices_data_files") or state.get("_indices_files"):
            raise ValueError(f"{path} is a selection of other rows. Save it after flatten_indices().")
        return [path / one["filename"] for one in state["_data_files"]]
    found = sorted(path.rglob(f"*{ENDING}"))
    splits = sorted({_split_of(file.relative_to(path)) for file in found})
    if not found:
        raise ValueError(f"{path} is no saved data set ({STATE}) and has no {ENDING} files. Name a file.")
    if len(splits) > 1:
        more = f" and {len(splits) - MOST_NAMED} more" if len(splits) > MOST_NAMED else ""
        raise ValueError(
            f"{path} has files of {', '.join(splits[:MOST_NAMED])}{more}. Name a file, or a folder with one "
            f"split, whose files are NAME-00000-of-00002{ENDING}, part-0{ENDING} or 0000{ENDING}."
        )
    return found


def _split_of(file: Path) -> str:
    """The file's name and folders, less what tells it from others of its list."""
    return (file.parent / SHARD.sub("", file.stem)).as_posix()


def table_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(row counted from 0, its columns as Python values) in order; absent values are left out.

    Raises ValueError where pyarrow is missing or cannot read a file, and as `files_behind` does.
    """
    number = 0
    for file in files_behind(path):
        for batch in _batches(file):
            for row in batch:
                yield number, {key: _without_nulls(value) for key, value in row.items() if value is not None}
                number += 1


def _batches(file: Path) -> Iterator[list[Row]]:
    try:
        # Not an import: an environment of one's own may do without the package.
        pyarrow, parquet = map(importlib.import_module, ("pyarrow", "pyarrow.parquet"))
    except ImportError as error:
        raise ValueError(
            f"{file} needs the pyarrow package. Install it (pip install pyarrow), or write the rows as jsonl."
        ) from error
    try:
        if file.suffix == ENDING:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=BATCH):
                yield batch.to_pylist()
        else:
            with pyarrow.memory_map(str(file)) as mapped:
                for batch in pyarrow.ipc.open_stream(mapped):
                    yield batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}. Write it anew, as {ENDING} or jsonl.") from error


def _without_nulls(value: object) -> object:
    """Every row of a table has every column, and every message every field."""
    if isinstance(value, dict):
        return {key: _without_nulls(below) for key, below in value.items() if below is not None}
    return [_without_nulls(below) for below in value] if isinstance(value, list) else value
