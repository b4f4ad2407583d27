"""From YAML keys to a method: what is said holds for every method of every registry, and the documents name
each of them with its defaults."""

import re
import typing
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from megatron_jackpot.algorithm.advantages import ADVANTAGES
from megatron_jackpot.algorithm.allocators import ALLOCATORS
from megatron_jackpot.algorithm.corrections import CORRECTIONS
from megatron_jackpot.algorithm.distill import DISTILL
from megatron_jackpot.algorithm.objectives import OBJECTIVES
from megatron_jackpot.algorithm.registry import build
from megatron_jackpot.algorithm.selectors import SELECTORS

REPOSITORY = Path(__file__).parents[2]
REGISTRIES: dict[str, dict[str, type]] = {
    "algorithm.correction": CORRECTIONS,
    "algorithm.objective": OBJECTIVES,
    "algorithm.advantage": ADVANTAGES,
    "algorithm.selector": SELECTORS,
    "rollout.allocator": ALLOCATORS,
    "actor.distill": DISTILL,
}
EVERY = [(where, name) for where, registry in REGISTRIES.items() for name in registry]


@pytest.fixture(params=EVERY, ids=lambda pair: f"{pair[0]}: {pair[1]}")
def method(request: pytest.FixtureRequest) -> tuple[str, str, type]:
    """(place in the configuration, name, class) of one method."""
    where, name = request.param
    return where, name, REGISTRIES[where][name]


def refusal(where: str, name: str, knobs: dict[str, object]) -> str:
    with pytest.raises(ValueError) as caught:
        build(name, knobs, REGISTRIES[where], where)
    return str(caught.value)


def test_a_name_with_a_letter_too_many_is_told_the_right_one(method):
    where, name, _ = method
    wrong = f"{name}z"
    assert refusal(where, wrong, {}) == f"{where}.name = '{wrong}' is unknown. Did you mean '{name}'?"


@pytest.mark.parametrize("where", REGISTRIES)
def test_a_name_like_no_other_is_told_them_all(where):
    known = ", ".join(sorted(REGISTRIES[where]))
    assert refusal(where, "%%%", {}) == f"{where}.name = '%%%' is unknown. Known: {known}."


def test_without_keys_a_method_is_that_of_its_class_with_the_defaults(method):
    where, name, kind = method
    assert all(item.default is not MISSING for item in fields(kind)), "a knob without a default"
    assert build(name, {}, REGISTRIES[where], where) == kind()


def test_a_key_that_is_no_knob_is_told_the_nearest_or_that_there_is_none(method):
    where, name, kind = method
    knobs = [item.name for item in fields(kind)]
    if not knobs:
        assert refusal(where, name, {"cap": 1}) == (
            f"Unknown setting '{where}.cap' of '{name}'. It has no settings."
        )
    for knob in knobs:
        message = refusal(where, name, {f"{knob}z": 1})
        assert message == f"Unknown setting '{where}.{knob}z' of '{name}'. Did you mean '{knob}'?"


def test_a_value_of_another_type_is_refused_by_the_knob_s_name(method):
    where, name, kind = method
    for knob, hint in typing.get_type_hints(kind).items():
        if knob not in {item.name for item in fields(kind)}:
            continue
        message = refusal(where, name, {knob: [2]})
        rule = "must be one of" if "Literal" in str(hint) else "must be of type"
        assert message.startswith(f"{where}.{knob} = [2]: {rule}"), message


def test_numbers_that_yaml_reads_as_text_or_as_integers_are_numbers(method):
    where, name, kind = method
    for item in fields(kind):
        if isinstance(item.default, float):
            written = f"{item.default:e}" if item.default != int(item.default) else int(item.default)
            built = build(name, {item.name: written}, REGISTRIES[where], where)
            assert getattr(built, item.name) == item.default and built == kind()


METHODS_TABLE = re.search(r"## Methods\n(.*?)\n## ", (REPOSITORY / "README.md").read_text(), re.S)[1]


@pytest.mark.parametrize("where", REGISTRIES)
def test_the_readme_lists_every_method_of_a_registry(where):
    (row,) = (line for line in METHODS_TABLE.splitlines() if line.startswith(f"| `{where}`"))
    assert set(re.findall(r"`([^`]+)`", row)) >= set(REGISTRIES[where])


PAGES = {
    "algorithm.correction": "corrections.md",
    "algorithm.objective": "objectives.md",
    "algorithm.advantage": "advantages.md",
    "algorithm.selector": "sampling.md",
    "rollout.allocator": "allocation.md",
    "actor.distill": "distillation.md",
}


@pytest.mark.parametrize("where", REGISTRIES)
def test_the_page_of_a_registry_has_a_row_or_a_section_for_each_method_and_for_nothing_else(where):
    page = (REPOSITORY / "docs" / PAGES[where]).read_text()
    table = re.search(r"\| name \|.*?\n\n", page, re.S)[0]
    named = set(re.findall(r"^\| `([^`]+)` \|", table, re.M))
    named |= {title.lower() for title in re.findall(r"^## (\S+)$", page, re.M)} & set(REGISTRIES[where])
    assert named == set(REGISTRIES[where])


def test_the_defaults_that_the_page_of_objectives_states_are_those_of_the_classes():
    page = (REPOSITORY / "docs/objectives.md").read_text()
    stated = 0
    for title, text in re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", page, re.M | re.S):
        for name in title.split(", "):
            defaults = {item.name: item.default for item in fields(OBJECTIVES[name])}
            for knob, value in re.findall(r"`([a-z_]+) ([-\w.]+)`", text):
                if knob not in defaults:
                    continue
                default = defaults[knob]
                stated += 1
                if default is None:
                    assert value == "null", f"{name}.{knob}"
                else:
                    assert type(default)(value) == default, f"{name}.{knob} = {default}, the page has {value}"
    assert stated > len(OBJECTIVES)


def test_every_wrong_setting_of_a_method_is_told_at_once():
    told = refusal("algorithm.correction", "tis", {"cap": 0.5, "powr": 1})
    for part in ("algorithm.correction.cap = 0.5", "'algorithm.correction.powr'"):
        assert sum(part in line for line in told.splitlines()) == 1, told
    told = refusal("algorithm.objective", "ppo", {"clip_low": -1, "clip_high": "x", "dual_clip": 0.5})
    assert [line.split(" = ")[0].rsplit(".")[-1] for line in told.splitlines()] == [
        "clip_high", "clip_low", "dual_clip",
    ], told  # fmt: skip


def test_what_goes_with_a_choice_is_not_judged_where_the_choice_cannot_be_read():
    known = refusal("algorithm.correction", "k_filter", {"kind": "k3", "low": 0.1})
    assert "only kind = 'k1' has a lower bound" in known
    assert len(refusal("algorithm.correction", "k_filter", {"kind": "k7", "low": 0.1}).splitlines()) == 1
