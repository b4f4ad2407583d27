"""Rows from parquet and from data sets on disk: the same problems as from jsonl, and what is refused."""

import importlib
import json
from pathlib import Path

import pytest

from megatron_jackpot.data import tables
from megatron_jackpot.data.problems import Problem, file_problems

TALK = [{"role": "user", "content": "6 * 7"}]
ROWS = [
    {"prompt": "6 * 7", "answer": "42", "level": {"name": "easy", "depth": 2}},
    {"prompt": "2 + 2", "answer": "4", "level": None},
    {"prompt": None, "answer": "5", "messages": TALK},
]
WANTED = [
    Problem(0, "6 * 7", {"answer": "42", "level": {"name": "easy", "depth": 2}}),
    Problem(1, "2 + 2", {"answer": "4"}),
    Problem(2, TALK, {"answer": "5"}),
]


def parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow, writer = map(importlib.import_module, ("pyarrow", "pyarrow.parquet"))
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def saved(folder: Path, rows: list[dict]) -> Path:
    """As `Dataset.save_to_disk` does, a row in each file."""
    pyarrow = importlib.import_module("pyarrow")
    folder.mkdir()
    table, names = pyarrow.Table.from_pylist(rows), []
    for place in range(len(rows)):
        names.append(f"data-{place:05d}-of-{len(rows):05d}.arrow")
        with pyarrow.ipc.new_stream(folder / names[-1], table.schema) as stream:
            stream.write_table(table.slice(place, 1))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "1", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_a_table_gives_the_problems_that_jsonl_gives(tmp_path: Path) -> None:
    every = [{"prompt": None, "messages": None, "level": None} | row for row in ROWS]
    lines = tmp_path / "rows.jsonl"
    present = ({key: value for key, value in row.items() if value is not None} for row in ROWS)
    lines.write_text("".join(json.dumps(row) + "\n" for row in present))
    downloaded = parquet(tmp_path / "repo/data/train-00000-of-00002.parquet", every[:2])
    parquet(downloaded.with_name("train-00001-of-00002.parquet"), every[2:])
    one = parquet(tmp_path / "rows.parquet", every)
    for path in (lines, one, tmp_path / "repo", saved(tmp_path / "set", every)):
        assert file_problems(path) == WANTED, path


def test_a_bad_row_is_named_by_its_place(tmp_path: Path) -> None:
    import datetime

    rows = [{"prompt": "1", "answer": answer} for answer in ("1", None, "3")]
    mistakes: list[str] = []
    assert len(file_problems(parquet(tmp_path / "a.parquet", rows), mistakes)) == 2
    assert len(mistakes) == 1 and "a.parquet, row 2: 'answer' must be a number or a text" in mistakes[0]
    for column, value, message in (
        ("answer", 18.5, "'answer' is the float 18.5: how is it written"),
        ("day", datetime.date(2026, 1, 1), "'day' holds what is no JSON"),
    ):
        path = parquet(tmp_path / f"{column}.parquet", [{"prompt": "1", "answer": "1"} | {column: value}])
        with pytest.raises(ValueError, match=f"row 1: {message}"):
            file_problems(path)
    assert file_problems(parquet(tmp_path / "i.parquet", [{"prompt": "1", "answer": 18}]))[0].label == {
        "answer": "18"
    }
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"torn.parquet cannot be read"):
        file_problems(tmp_path / "torn.parquet")


def test_a_folder_that_holds_no_one_list_of_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "repo").mkdir()
    for split in ("train", "test"):
        (tmp_path / "repo" / f"{split}-00000-of-00001.parquet").touch()
    for split in ("train", "test"):
        (tmp_path / "converted/default" / split).mkdir(parents=True)
        (tmp_path / "converted/default" / split / "0000.parquet").touch()
    for folder, files in (
        ("prefixed", ("gsm8k-train.parquet", "gsm8k-test.parquet")),
        ("sharded", ("gsm8k-train-00000-of-00001.parquet", "gsm8k-test-00000-of-00001.parquet")),
        ("years", tuple(f"aime-{year}.parquet" for year in range(2020, 2026))),
    ):
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).touch()
    (tmp_path / "nothing").mkdir()
    for name, message in (
        ("prefixed", "has files of gsm8k-test, gsm8k-train. Name a file"),
        ("sharded", "has files of gsm8k-test, gsm8k-train. Name a file"),
        ("years", "has files of aime-2020, aime-2021, aime-2022, aime-2023 and 2 more. Name a file"),
        ("dict", "holds the splits train, test. Name the folder of one"),
        ("repo", "has files of test, train. Name a file"),
        ("converted", "has files of default/test, default/train. Name a file"),
        ("nothing", "is no saved data set"),
    ):
        with pytest.raises(ValueError, match=message):
            file_problems(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        file_problems(tmp_path / "none.parquet")


@pytest.mark.parametrize(
    "name",
    [
        "data/train-{:05d}-of-00002.parquet",
        "data/gsm8k-train-{:05d}-of-00002.parquet",
        "data/train-{:05d}-of-00002-{:016x}.parquet",
        "default/train/{:04d}.parquet",
        "sample/000_{:05d}.parquet",
        "part-{}.parquet",
        "part-{:05d}-6d1e-c000.snappy.parquet",
    ],
)
def test_the_files_of_one_split_are_one_list_in_their_order(tmp_path: Path, name: str) -> None:
    for place, row in enumerate(ROWS[:2]):
        parquet(tmp_path / "set" / name.format(place, 0xA09B74B3EF9C3B56 + place), [row])
    assert file_problems(tmp_path / "set") == WANTED[:2]


def test_without_pyarrow_its_name_is_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(tables.importlib, "import_module", missing)
    (tmp_path / "rows.parquet").touch()
    with pytest.raises(ValueError, match=r"rows.parquet needs the pyarrow package.*pip install pyarrow"):
        file_problems(tmp_path / "rows.parquet")
