"""The examples of docs/contributing.md: what they define can be built by name, and their own tests pass."""

import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from megatron_jackpot.algorithm.corrections import CORRECTIONS, NoCorrection, TokenIS
from megatron_jackpot.algorithm.objectives import OBJECTIVES
from megatron_jackpot.algorithm.registry import build
from megatron_jackpot.records import ObjectiveInputs
from tests.unit.flat import run
from tests.unit.test_corrections import make_scores

PAGE = (Path(__file__).parents[2] / "docs" / "contributing.md").read_text()


def blocks(title: str) -> list[str]:
    """The Python of one section of the page."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert section is not None, f"no section '{title}'"
    return re.findall(r"^```python\n(.*?)^```", section[1], re.M | re.S)


def inputs(logp: list[float], old_logp: list[float], advantage: list[float]) -> ObjectiveInputs:
    """Tokens of one rollout; the live log-probs want a gradient."""
    length = len(logp)
    return ObjectiveInputs(
        logp_T=torch.tensor(logp, requires_grad=True),
        old_logp_T=torch.tensor(old_logp),
        server_logp_T=torch.tensor(old_logp),
        reference_logp_T=torch.zeros(length),
        candidate_logp_TK=torch.empty(length, 0),
        candidate_old_logp_TK=torch.empty(length, 0),
        candidate_server_logp_TK=torch.empty(length, 0),
        advantage_T=torch.tensor(advantage),
        rollout_id_T3=torch.zeros(1, 3, dtype=torch.int64),
        position_T=torch.zeros(1, dtype=torch.int64),
        segment_T=torch.zeros(length, dtype=torch.int64),
        valid_T=torch.ones(length, dtype=torch.bool),
    )


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Where the blocks of a section are run, one after another."""
    module = types.ModuleType("contributed")
    known = dict(NoCorrection=NoCorrection, TokenIS=TokenIS, inputs=inputs, make_scores=make_scores)
    vars(module).update(known, math=math, run=run, torch=torch)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize(
    ("title", "name", "registry"),
    [("A correction", "TemperedIS", CORRECTIONS), ("An objective", "SPO", OBJECTIVES)],
)
def test_a_method_of_the_page_is_built_by_name_and_passes_its_own_test(module, title, name, registry) -> None:
    for source in blocks(title):
        exec(compile(source, f"docs/contributing.md, {title}", "exec"), vars(module))
    method = vars(module)[name]
    assert build("new", {}, {**registry, "new": method}, "algorithm") == method()
    tests = [function for key, function in vars(module).items() if key.startswith("test_")]
    assert tests
    for test in tests:
        test()


def test_the_reward_of_the_page_scores_and_checks(module) -> None:
    (source,) = blocks("A reward")
    exec(compile(source, "docs/contributing.md, A reward", "exec"), vars(module))
    assert [module.score(text, 2) for text in ("two words", "one", "", "a b c d")] == [1.0, 0.5, 0.0, 0.0]
    with pytest.raises(ValueError, match="number of words >= 1, got 0"):
        module.check(0)
