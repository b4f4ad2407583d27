"""docs/coming_from.md: every setting of ours that it names is loaded as it stands there, over the
quickstart's."""

import re
from pathlib import Path

import pytest

from megatron_jackpot.config import load_config
from megatron_jackpot.train.methods import method_mistakes

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "coming_from.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if re.match(r"\| (verl|slime|TRL|NeMo-RL) \|", line)
]
SETTING = r"`([a-z_]+(?:\.[a-z_]+)+): ([^`]+)`"


def alternatives(cell: str) -> list[list[str]]:
    """The overrides of a cell: those after a semicolon are another choice, the others go together."""
    return [[f"{key}={value}" for key, value in re.findall(SETTING, part)] for part in cell.split(";")]


def test_every_row_names_a_setting_or_says_why_there_is_none() -> None:
    assert len(ROWS) >= 40 and all(len(row) == 3 for row in ROWS)
    assert len({(project, theirs) for project, theirs, _ in ROWS}) == len(ROWS)
    assert {project for project, _, _ in ROWS} == {"verl", "slime", "TRL", "NeMo-RL"}
    for _, theirs, ours in ROWS:
        assert theirs.count("`") >= 2, theirs
        assert ours.startswith("not here: ") or re.match(SETTING, ours), ours


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]}")
def test_the_settings_of_a_row_are_accepted(row: list[str]) -> None:
    for overrides in alternatives(row[2]):
        mine = [one for one in overrides if not one.startswith("data.reward=")]
        if mine:
            config = load_config(ROOT / "examples" / "quickstart" / "run.yaml", mine)
            assert method_mistakes(config) == []
        if len(mine) < len(overrides):
            assert load_config(ROOT / "examples" / "own_methods" / "run.yaml").data.reward.count(":") == 1


def test_a_setting_that_does_not_exist_would_be_found() -> None:
    (wrong,) = alternatives("`algorithm.aggregation: {name: sequense}`")
    config = load_config(ROOT / "examples" / "quickstart" / "run.yaml", wrong)
    assert "Did you mean 'sequence'" in method_mistakes(config)[0]
    for other in ("`algorithm.agregation: {name: token}`", "`rollout.top_p: 1.0`"):
        (wrong,) = alternatives(other)
        with pytest.raises(ValueError, match="Unknown|unknown"):
            load_config(ROOT / "examples" / "quickstart" / "run.yaml", wrong)
