"""Text is UTF-8 in any locale: no file or pipe is opened with what the locale says."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BINARY = ("rb", "wb", "ab", "r+b", "a+b")


def without_encoding(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        owner = getattr(getattr(node.func, "value", None), "id", "")
        given = {keyword.arg for keyword in node.keywords}
        modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
        text_file = name in ("read_text", "write_text") or (
            name == "open" and owner != "os" and not any(mode in BINARY for mode in modes)
        )
        pipe = owner == "subprocess" and bool(given & {"text", "universal_newlines"})
        asks = name == "open" and owner == "DIRECT"  # an HTTP opener
        if (text_file or pipe) and not asks and "encoding" not in given:
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_every_file_and_pipe_of_the_package_names_its_encoding():
    found = [hit for path in (ROOT / "megatron_jackpot").rglob("*.py") for hit in without_encoding(path)]
    assert found == []


@pytest.mark.parametrize("command", ["launch", "plan"])
def test_other_letters_in_a_configuration_are_read_and_written_in_a_locale_without_them(tmp_path, command):
    name = "mod\u00e8le-\u6a21\u578b"
    tree = {
        "run": {"folder": str(tmp_path / name)},
        "policy": {"hf": str(tmp_path / name)},
        "actor": {"hf": str(tmp_path / name)},
        "data": {"tasks": {"chain_sum": {}}, "max_prompt_tokens": 64},
        "rollout": {"max_new_tokens": 64},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    env = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-m", "megatron_jackpot.cli", command, str(tmp_path / "run.yaml")],
        env=env,
        capture_output=True,
        timeout=120,
    )
    words = done.stderr.decode()
    assert done.returncode == 2 and "Traceback" not in words, words
    assert r"mod\xe8le-\u6a21\u578b" in words or name in words, words
