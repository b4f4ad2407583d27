"""From a method's name and YAML keys to its dataclass, with every mistake named."""

import difflib
import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def build(name: str, knobs: Mapping[str, Any], registry: Mapping[str, type], where: str) -> Any:
    """registry[name](**knobs). `where` is the place in the configuration, for example "algorithm.correction".

    Raises ValueError naming an unknown method or knob and the nearest known one, a value of the wrong type,
    or the rule of the method's own check that failed.
    """
    if name not in registry:
        raise ValueError(f"{where}.name = {name!r} is unknown. {nearest(name, list(registry))}")
    method = registry[name]
    known = [item.name for item in fields(method)]
    hints = get_type_hints(method)
    checked = {}
    for knob, value in knobs.items():
        if knob not in known:
            remedy = nearest(knob, known) if known else "It has no knobs."
            raise ValueError(f"Unknown knob '{where}.{knob}' of '{name}'. {remedy}")
        checked[knob] = _convert(value, hints[knob], f"{where}.{knob}")
    missing = [item.name for item in fields(method) if item.name not in checked and _required(item)]
    if missing:
        raise ValueError(f"{where}.{missing[0]} is missing: '{name}' needs it. Set it beside the name.")
    try:
        return method(**checked)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error


def nearest(word: str, known: list[str]) -> str:
    """'Did you mean ...?' for the closest known word, or the list of known words."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(sorted(known))}."


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raises ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(
            f"{name} = {value!r}: must be one of {', '.join(map(repr, choices))}. {_hint(value, choices)}"
        )


def _hint(value: Any, choices: tuple) -> str:
    close = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Use {choices[0]!r}."


def _required(item: Any) -> bool:
    return item.default is item.default_factory


def _convert(value: Any, hint: Any, where: str) -> Any:
    """The value as the annotated type; YAML reads 1e-6 as text and 1 as an integer."""
    if get_origin(hint) is Literal:
        check_choice(where, value, get_args(hint))
        return value
    if get_origin(hint) in (types.UnionType, Union):
        if value is None and type(None) in get_args(hint):
            return None
        (inner,) = (arg for arg in get_args(hint) if arg is not type(None))
        return _convert(value, inner, where)
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{where} = {value!r}: must be of type {hint.__name__}, got {type(value).__name__}.")
