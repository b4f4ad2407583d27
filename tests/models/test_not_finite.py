"""NaN and both infinities at every bound and every guard, found by the registries and the configuration."""

import ast
import math
import typing
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import BaseModel, ValidationError

from megatron_jackpot.algorithm.advantages import ADVANTAGES
from megatron_jackpot.algorithm.controllers import SteeredWeight, TargetAcceptance
from megatron_jackpot.algorithm.registry import build
from megatron_jackpot.config import Config
from megatron_jackpot.config.run import Guards
from megatron_jackpot.config.servers import Sync
from megatron_jackpot.train.guard import Guard
from megatron_jackpot.train.probe import refuse_gap
from megatron_jackpot.train.trainer import Trainer
from tests.unit.test_registry import REGISTRIES

PACKAGE = Path(__file__).parents[2] / "megatron_jackpot"
WILD = [math.nan, math.inf, -math.inf]
UPPER = {"cap", "policy_cap", "high", "clip_high", "dual_clip", "limit", "delta", "delta_low", "delta_high"}
"""Knobs that are upper limits: inf switches one off, but that of k3_sample, which is its definition's."""


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for item in model.model_fields.values():
        for part in (item.annotation, *typing.get_args(item.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from sections(part)


NUMBERS = sorted(
    {
        (section.__name__, name): (section, name)
        for section in sections(Config)
        for name, item in section.model_fields.items()
        if float in (item.annotation, *typing.get_args(item.annotation))
    }.values(),
    key=lambda pair: (pair[0].__name__, pair[1]),
)


@pytest.mark.parametrize(("section", "name"), NUMBERS, ids=[f"{s.__name__}.{n}" for s, n in NUMBERS])
def test_no_number_of_the_configuration_may_be_other_than_finite(section, name) -> None:
    for value in WILD:
        if (name, value) == ("tis_cap", math.inf):
            assert section(hf="x", tis_cap=value).tis_cap == value  # An upper limit.
            continue
        with pytest.raises(ValidationError) as caught:
            section(**{name: value})
        assert any(error["loc"] == (name,) for error in caught.value.errors()), (name, value)


def test_the_configuration_has_the_bounds_that_guards_compare_with() -> None:
    names = {name for _, name in NUMBERS}
    assert {"max_trained_gap", "max_logp_gap", "mean_logp_gap", "quantile_logp_gap"} <= names
    assert {"acceptance_floor", "kl_ceiling", "max_failed_groups", "clip_grad", "lr"} <= names


def knobs() -> Iterator[tuple[str, str, str]]:
    for where, registry in REGISTRIES.items():
        for method, kind in registry.items():
            hints = typing.get_type_hints(kind)
            yield from ((where, method, f.name) for f in fields(kind) if "float" in str(hints[f.name]))


@pytest.mark.parametrize(("where", "method", "knob"), knobs())
def test_no_knob_of_a_method_is_nan_and_only_an_upper_limit_is_inf(where, method, knob) -> None:
    more = {"kind": "k1"} if (method, knob) == ("k_filter", "low") else {}
    for value in WILD:
        if value == math.inf and knob in UPPER and method != "k3_sample":
            build(method, {knob: value, **more}, REGISTRIES[where], where)
            continue
        with pytest.raises(ValueError, match=knob):
            build(method, {knob: value, **more}, REGISTRIES[where], where)


@pytest.mark.parametrize("value", WILD)
@pytest.mark.parametrize("bound", [n for n, item in Guards.model_fields.items() if item.default is None])
def test_a_guards_bound_holds_against_what_is_not_finite(bound, value) -> None:
    guard = Guard(Guards(**{bound: 0.5}))
    sane, at = {"acceptance": 1.0, "kl": 0.0}, bound.split("_")[0]
    guard.watch(**sane)
    assert not guard.paused
    guard.watch(**{**sane, at: value})
    assert guard.paused
    assert not guard.may_step("policy", value)


@pytest.mark.parametrize("value", WILD)
@pytest.mark.parametrize("bound", [name for name in Sync.model_fields if name.endswith("_gap")])
def test_a_probe_refuses_what_is_not_finite(bound, value) -> None:
    key = {"max": "probe/max", "mean": "probe/mean", "quantile": "probe/quantile99"}[bound.split("_")[0]]
    report = {"probe/max": 0.0, "probe/mean": 0.0, "probe/quantile99": 0.0}
    dtype = "float32" if key == "probe/max" else "bfloat16"
    refuse_gap(report, "actor", dtype, Sync())
    with pytest.raises(RuntimeError, match=f"sync.{bound}"):
        refuse_gap({**report, key: value}, "actor", dtype, Sync())


@pytest.mark.parametrize("value", WILD)
def test_a_trained_gap_that_is_not_finite_stops_the_run(value) -> None:
    precision = SimpleNamespace(max_trained_gap=0.1)
    trainer = SimpleNamespace(config=SimpleNamespace(precision=precision), state=SimpleNamespace(num_steps=3))
    Trainer.check_trained_gap(trainer, torch.tensor([0.1, 10.0]))
    with pytest.raises(RuntimeError, match="gap/trained_scored = "):
        Trainer.check_trained_gap(trainer, torch.tensor([value, 10.0]))


@pytest.mark.parametrize("value", WILD)
def test_rewards_and_controllers_refuse_what_is_not_finite(value) -> None:
    for kind in ADVANTAGES.values():
        with pytest.raises(ValueError, match="rewards = .*must be finite"):
            kind()([0.0, value])
    with pytest.raises(ValueError, match="lam = .* must be finite"):
        TargetAcceptance(acceptance=0.9, lam=1.0).load_state_dict({"lam": value})
    with pytest.raises(ValueError, match="weight = .* must be finite"):
        SteeredWeight().load_state_dict({"weight": value, "integral": 0.0})


def test_an_advantage_that_fp32_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="too large for fp32"):
        ADVANTAGES["dr_grpo"]()([1e300, -1e300])


BOUNDS = {
    n for _, n in NUMBERS if n.startswith(("max_", "mean_", "quantile_")) or "floor" in n or "ceil" in n
}


def compared_the_wrong_way(source: str) -> list[int]:
    """Lines that ask whether a number is beyond a bound of the configuration: NaN is not, and would pass."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare)
        and any(isinstance(part, ast.Attribute) and part.attr in BOUNDS for part in node.comparators)
        and any(isinstance(operator, ast.Gt) for operator in node.ops)
    ]


def test_no_code_asks_whether_a_number_is_above_a_bound_of_the_configuration() -> None:
    assert compared_the_wrong_way("if gap > config.max_trained_gap: stop()") == [1]
    assert not compared_the_wrong_way("if not gap <= config.max_trained_gap: stop()")
    for path in PACKAGE.rglob("*.py"):
        assert not compared_the_wrong_way(path.read_text(encoding="utf-8")), path
