"""The type checker (basedpyright, basic) over the package, and what may only shrink: its errors where there
are still some, `Any`, and comments that silence it.

By hand: basedpyright --project tests/types/pyrightconfig.json
"""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("basedpyright", reason="needs the pinned environment of tools/env.sh")

PACKAGE = Path(__file__).parents[2] / "megatron_jackpot"
PROJECT = Path(__file__).parent / "pyrightconfig.json"
LIMIT_S = 900

ERRORS = {"models": 43, "parallel": 18, "sync": 7}
"""Folder or module -> errors that it may have; none where it is absent. A number may fall, never rise."""
ANY = {
    "algorithm": 7,
    "config": 15,
    "data": 19,
    "launch": 15,
    "models": 53,
    "monitor": 1,
    "parallel": 6,
    "records.py": 2,
    "rewards": 40,
    "rollout": 4,
    "run": 1,
    "servers": 3,
    "sync": 10,
    "train": 12,
}
"""Uses of `Any`, likewise."""
SILENCED: dict[str, int] = {}
"""Comments `type: ignore` and `pyright: ignore`, likewise."""


@pytest.fixture(scope="module")
def errors() -> list[tuple[str, str]]:
    """(folder or module, the error with its place) of everything that the checker finds."""
    command = [sys.executable, "-m", "basedpyright", "--project", PROJECT, "--pythonpath", sys.executable]
    done = subprocess.run([*command, "--outputjson"], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] > 100
    return [described(item) for item in found["generalDiagnostics"] if item["severity"] == "error"]


def described(item: dict) -> tuple[str, str]:
    name = Path(item["file"]).relative_to(PACKAGE)
    line = item["range"]["start"]["line"] + 1
    return name.parts[0], f"{name}:{line}: {item['message']} ({item.get('rule')})"


@pytest.mark.timeout(LIMIT_S + 60)
def test_the_checker_finds_nothing_in_a_typed_package_and_no_more_than_before_elsewhere(errors) -> None:
    counts = Counter(part for part, _ in errors)
    risen = {part: count for part, count in counts.items() if count > ERRORS.get(part, 0)}
    assert not risen, "\n".join([f"more than {ERRORS}:", *(text for part, text in errors if part in risen)])


def test_the_packages_that_train_and_start_a_run_have_no_errors_to_spare() -> None:
    trains = {"algorithm", "train", "rollout", "servers", "monitor", "run"}
    assert not (trains | {"config", "launch", "plan", "cli.py"}) & {*ERRORS}


def sources() -> list[tuple[str, str]]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return [(path.relative_to(PACKAGE).parts[0], path.read_text()) for path in paths]


def test_any_does_not_spread() -> None:
    counts: Counter[str] = Counter()
    for part, text in sources():
        nodes = ast.walk(ast.parse(text))
        counts[part] += sum(isinstance(node, ast.Name) and node.id == "Any" for node in nodes)
    assert not {part: count for part, count in counts.items() if count > ANY.get(part, 0)}


def test_the_checker_is_not_silenced() -> None:
    counts: Counter[str] = Counter()
    for part, text in sources():
        counts[part] += len(re.findall(r"#\s*(?:type|pyright): ?ignore", text))
    assert not {part: count for part, count in counts.items() if count > SILENCED.get(part, 0)}
