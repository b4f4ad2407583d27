"""What docs/debugging.md and README speak of exists: metrics, settings, files."""

import re
from pathlib import Path

import pytest

from megatron_jackpot.config import describe
from megatron_jackpot.run.formats import FORMATS, current

ROOT = Path(__file__).parents[2]
CODE = r"`([^`\n]+)`"
SECTIONS = {key.split(".")[0] for key, _, _ in describe()}


def quoted(page: str) -> set[str]:
    return set(re.findall(CODE, (ROOT / "docs" / page).read_text()))


def test_metrics_that_debugging_names_are_those_of_the_page_of_metrics():
    known = quoted("metrics.md")
    named = {word for word in quoted("debugging.md") if re.fullmatch(r"[a-z]+/[a-z0-9_]+", word)}
    assert len(named) > 40 and named <= known, named - known


def test_settings_that_debugging_names_exist():
    known = {key for key, _, _ in describe()}
    text = (ROOT / "docs" / "debugging.md").read_text()
    named = set(re.findall(r"[`'](\w+\.\w+)(?:=[^`']*)?[`']", text))
    named = {key for key in named if key.split(".")[0] in SECTIONS}
    assert len(named) > 15 and named <= known, named - known


@pytest.mark.parametrize("page", ["debugging.md", "changelog.md", "contributing.md"])
def test_files_that_a_page_links_are_there(page):
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / "docs" / page).read_text()):
        assert (ROOT / "docs" / link).exists(), link


def test_the_modules_of_the_changelog_are_there_now_and_were_elsewhere_before():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (.+) \|$", (ROOT / "docs" / "changelog.md").read_text(), re.M)
    assert len(rows) > 40
    for old, new in rows:
        for path in re.findall(CODE, new):
            assert (ROOT / "megatron_jackpot" / path).exists(), path
        assert f"`{old}`" not in new


def test_the_changelog_names_every_format_and_the_last_commit_that_reads_it() -> None:
    table = (ROOT / "docs" / "changelog.md").read_text().partition("### Formats")[2].partition("\n\nA run")[0]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines() if line]
    told: dict[str, dict[int, str]] = {}
    for kind, _, number, reader in rows[2:]:
        kind = kind or list(told)[-1]
        told.setdefault(kind, {})[int(number.split()[0])] = reader
    assert told == {kind: {**old, current(kind): "this version"} for kind, old in FORMATS.items()}
