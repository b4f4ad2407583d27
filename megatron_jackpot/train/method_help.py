"""What may stand in a method's place in the configuration, for `launch --help algorithm.correction`."""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass
from typing import get_type_hints

from megatron_jackpot.algorithm.advantages import ADVANTAGES
from megatron_jackpot.algorithm.aggregation import AGGREGATIONS
from megatron_jackpot.algorithm.allocators import ALLOCATORS
from megatron_jackpot.algorithm.corrections import CORRECTIONS
from megatron_jackpot.algorithm.distill import DISTILL
from megatron_jackpot.algorithm.objectives import OBJECTIVES
from megatron_jackpot.algorithm.registry import fields_of
from megatron_jackpot.algorithm.selectors import SELECTORS
from megatron_jackpot.config import as_yaml

CHOICES: dict[str, Mapping[str, type]] = {
    "algorithm.correction": CORRECTIONS,
    "algorithm.objective": OBJECTIVES,
    "algorithm.advantage": ADVANTAGES,
    "algorithm.selector": SELECTORS,
    "rollout.allocator": ALLOCATORS,
    "algorithm.aggregation": AGGREGATIONS,
    "actor.objective": OBJECTIVES,
    "actor.distill": DISTILL,
}
"""Key -> the methods that may stand there, beside those of the user's own."""


@dataclass(frozen=True)
class Choice:
    """A method by name."""

    name: str
    meaning: str
    settings: list[tuple[str, str, str]]
    """(name, default, meaning) of each."""


def choices(key: str) -> list[Choice]:
    """Every method that `key` takes."""
    return [Choice(name, _meaning(method), list(_settings(method))) for name, method in CHOICES[key].items()]


def _meaning(method: type) -> str:
    return " ".join((inspect.getdoc(method) or "").partition("\n\n")[0].split())


def _settings(method: type) -> Iterator[tuple[str, str, str]]:
    presets = getattr(method, "presets", {})
    if presets:
        yield "preset", next(iter(presets)), f"{', '.join(presets)}: names settings; those beside it win."
    meanings, hints = _docs(method), get_type_hints(method)
    for item in fields_of(method):
        hint = hints[item.name]
        kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        yield item.name, _default(item), f"{meanings.get(item.name, '')} ({kind})".strip()


def _default(item: Field[object]) -> str:
    if item.default is MISSING:
        return "required"
    return as_yaml(item.default)


def _docs(method: type) -> dict[str, str]:
    """The text under each field, of the class and those above it, which Python itself does not keep."""
    docs: dict[str, str] = {}
    for owner in reversed(method.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs
