"""Problems before tokenization, from reasoning-gym or from files: jsonl, parquet, a data set on disk."""

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from megatron_jackpot.algorithm.registry import nearest
from megatron_jackpot.data.tables import Row, files_behind, is_table, table_rows

ASKING = ("user", "tool", "system", "developer", "function", "ipython")
"""Roles of a message that the assistant may answer. Its own has other names, too: model, gpt, Assistant."""
RESERVED = {"seed", "size"}
"""Options of a reasoning-gym task that data.seed and data.size set."""


@dataclass(frozen=True)
class Problem:
    """One problem. Example: Problem(id=7, question="3 + 9 =", label={"answer": "12"})."""

    id: int
    """Position in its source: index of the draw, or line number in the file counted from 0."""
    question: str | list[dict[str, str]]
    """A text, or chat messages with role and content."""
    label: Row
    """`answer` and whatever else the source gives to the reward."""

    @property
    def text(self) -> str:
        """The question for comparisons: without system messages, white space normalised."""
        if isinstance(self.question, str):
            return " ".join(self.question.split())
        asked = [message["content"] for message in self.question if message["role"] != "system"]
        return " ".join(" ".join(asked).split())


def reasoning_gym_problems(tasks: dict[str, dict[str, Any]], seed: int, limit: int) -> Iterator[Problem]:
    """At most `limit` problems, the tasks in turn; problem i depends on (tasks, seed, i) alone.

    Raises ValueError for an unknown task or option, and for a problem without one text answer.
    """
    # Only here: importing reasoning-gym loads all of its hundred tasks.
    from reasoning_gym.factory import DATASETS, create_dataset

    datasets = []
    for task, options in tasks.items():
        if task not in DATASETS:
            raise ValueError(
                f"data.tasks: reasoning_gym has no task '{task}'. {nearest(task, list(DATASETS))}"
            )
        if reserved := RESERVED & options.keys():
            raise ValueError(
                f"data.tasks.{task}: '{reserved.pop()}' is set by data.seed and data.size. Remove it."
            )
        try:
            datasets.append(create_dataset(task, **options, seed=seed, size=limit))
        except (TypeError, ValueError, AssertionError) as error:
            known = [field.name for field in fields(DATASETS[task][1]) if field.name not in RESERVED]
            stranger = next((option for option in options if option not in known), None)
            remedy = nearest(stranger, known) if stranger else "Change it."
            why = f"there is no option '{stranger}'." if stranger else f"{error}."
            raise ValueError(f"data.tasks.{task} = {options}: {why} {remedy}") from error
    names = list(tasks)
    for i in range(limit):
        which, row = i % len(names), i // len(names)
        task, entry = names[which], datasets[which][row]
        yield Problem(i, entry["question"], _reasoning_gym_label(task, tasks[task], entry))


def _reasoning_gym_label(task: str, options: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(entry["answer"], str):
        raise ValueError(
            f"data.tasks: '{task}' gives no single text answer ({entry['answer']!r}). Remove it."
        )
    try:
        plain = json.loads(json.dumps(entry))
    except TypeError as error:
        raise ValueError(f"data.tasks: '{task}' cannot be written as JSON: {error}. Remove it.") from error
    return {"task": task, "options": options, "entry": plain, "answer": entry["answer"]}


def file_problems(path: Path, mistakes: list[str] | None = None) -> list[Problem]:
    """Every row of a jsonl or parquet file or a data set's folder; blank lines of jsonl are passed over.

    A bad row stops the run rather than being skipped: a partly broken file is not the file that was meant.
    Its mistake goes to `mistakes`, naming file and line, or is a ValueError where that is None.
    """
    problems = []
    for index, problem in _read(Path(path)):
        try:
            problems.append(problem())
        except ValueError as error:
            mistake = f"{path}, {place_in(path, index)}: {error}"
            if mistakes is None:
                raise ValueError(mistake) from error
            mistakes.append(mistake)
    return problems


def place_in(path: Path, index: int) -> str:
    """Where a row stands, in words."""
    return f"{'row' if is_table(path) else 'line'} {index + 1}"


def _read(path: Path) -> Iterator[tuple[int, Callable[[], Problem]]]:
    """(row counted from 0, what makes its problem or raises ValueError)."""
    if is_table(path):
        yield from ((index, partial(_of_table, index, row)) for index, row in table_rows(path))
        return
    (path,) = files_behind(path)
    with open(path, "rb") as file:
        for index, line in enumerate(file):
            if index == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
                _check_form(path, line)
            if line.strip():
                yield index, partial(_of_line, index, line)


def _check_form(path: Path, start: bytes) -> None:
    """Raises ValueError where a file is something else than an object a line, which each line would say."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(
            f"{path}: line 1 begins UTF-16. Make it UTF-8: iconv -f UTF-16 -t UTF-8 {path} > NEW.jsonl"
        )
    if path.suffix.lower() in (".csv", ".tsv"):
        code = "import csv, json, sys; [print(json.dumps(row)) for row in csv.DictReader(sys.stdin)]"
        raise ValueError(
            f"{path}: is a table of text, not an object a line. Make it that: "
            f"python -c '{code}' < {path} > NEW.jsonl"
        )
    if start.strip() == b"[" or start.lstrip().startswith(b"[{"):
        raise ValueError(
            f"{path}: line 1 begins one JSON list, not an object a line. Make it that: jq -c '.[]' {path} > "
            "NEW.jsonl"
        )


def _of_table(index: int, row: Row) -> Problem:
    answer = row.get("answer")
    if isinstance(answer, float):
        raise ValueError(f"'answer' is the float {answer!r}: how is it written? Store it as text or integer.")
    if isinstance(answer, int) and not isinstance(answer, bool):
        answer = str(answer)
    for key, value in row.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(f"'{key}' holds what is no JSON ({error}). Leave the column out.") from error
    return _problem(index, row, answer)


def _of_line(index: int, line: bytes) -> Problem:
    try:
        text = line.decode("utf-8")
        row = json.loads(text, object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"not JSON: {error}. Write an object with double quotes on a line of its own."
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, got {type(row).__name__}.")
    answer = row.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        # As it is written: the float of 0.00001 prints as 1e-05, and that of 18.0000000000000001 as 18.0.
        answer = json.loads(text, parse_int=str, parse_float=str, parse_constant=lambda name: None)["answer"]
    return _problem(index, row, answer)


def _problem(index: int, row: Row, answer: object) -> Problem:
    if ("prompt" in row) == ("messages" in row):
        raise ValueError(
            f"a row needs either 'prompt' or 'messages', got the keys {sorted(row)}. "
            "Rename the column with the question in the file."
        )
    question = _prompt(row["prompt"]) if "prompt" in row else _messages(row["messages"])
    extra = {key: value for key, value in row.items() if key not in ("prompt", "messages")}
    return Problem(index, question, {**extra, "answer": _answer(answer)})


def _without_repeats(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object: which is meant?")
    return row


def _prompt(prompt: Any) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"'prompt' must be a text that is not empty, got {prompt!r}.")
    _check_text("prompt", prompt)
    return prompt


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'messages' must be a list that is not empty, got {messages!r}.")
    for message in messages:
        fields = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise ValueError(f"a message needs the texts 'role' and 'content', got {message!r}.")
        _check_text("content", message["content"])
    if (role := messages[-1]["role"]) not in ASKING:
        raise ValueError(
            f"'messages' ends with the role {role!r}: an answer would stand in the prompt. Leave it out, or "
            f"give the last one a role of {', '.join(ASKING)}."
        )
    return messages


def _check_text(key: str, text: str) -> None:
    """Half a surrogate pair is JSON, but no text that a tokenizer takes."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"'{key}' holds half a surrogate pair: {ascii(text)[:60]}. Write it as UTF-8.")


def _answer(answer: Any) -> str:
    """The reference as text. Raises ValueError for anything but a number or a text that can be written."""
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"'answer' must be a number or a text that is not empty, got {answer!r}.")
    _check_text("answer", answer)
    return answer
