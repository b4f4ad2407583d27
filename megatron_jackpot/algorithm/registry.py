"""From a method's name and YAML keys to its dataclass, with every mistake named.

A name stands in a registry, or is `package.module:Class`: a class of the user's own, found on PYTHONPATH.
"""

import difflib
import importlib
import sys
import traceback
import types
from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

M = TypeVar("M")
SETTING_TYPES = (bool, int, float, str)
"""What YAML holds of a method's field, beside a Literal, and null where the annotation says `| None`."""
SHOWN = 4000
"""Characters of a traceback that an error carries: the last ones."""


class Registry(dict[str, type[M]], Generic[M]):
    """Name -> class of the methods that may stand in one place; `base` is what a user's own derives from."""

    def __init__(self, base: type[M], methods: Mapping[str, type[M]]) -> None:
        super().__init__(methods)
        self.base = base


def build(name: str, settings: Mapping[str, object], registry: Registry[M], where: str) -> M:
    """The method `name` with its settings. `where` is its place in the configuration, for example
    "algorithm.correction".

    Raises ValueError, with a line for each mistake: an unknown method or setting and the nearest known one, a
    value of the wrong type, the rule of the method's own check that failed.
    """
    return make(find(name, registry, where), name, settings, where)


def is_own(name: str) -> bool:
    """Whether a method is named by its path, not by its place in a registry."""
    return ":" in name


def find(name: str, registry: Registry[M], where: str) -> type[M]:
    """The class of a method, checked as far as that is possible without one. Raises ValueError."""
    if name in registry:
        return registry[name]
    if is_own(name):
        return _checked(load(name, f"{where}.name"), name, f"{where}.name", registry.base)
    remedy = "Own methods are package.module:Class." if "." in name else nearest(name, list(registry))
    raise ValueError(f"{where}.name = {name!r} is unknown. {remedy}")


def make(method: type[M], name: str, settings: Mapping[str, object], where: str) -> M:
    """An instance of `method`, whose fields are the known settings. Raises ValueError as `build` does."""
    items = fields_of(method)
    known = [item.name for item in items]
    hints = get_type_hints(method)
    checked: dict[str, Any] = {}
    mistakes = []
    for setting, value in settings.items():
        if setting not in known:
            remedy = nearest(setting, known) if known else "It has no settings."
            mistakes.append(f"Unknown setting '{where}.{setting}' of '{name}'. {remedy}")
            continue
        try:
            checked[setting] = _convert(value, hints[setting], f"{where}.{setting}")
        except ValueError as error:
            mistakes.append(str(error))
    required = _required(method)
    mistakes += [
        f"{where}.{item} is missing: '{name}' needs it. Set it beside the name."
        for item in required
        if item not in settings
    ]
    made = None
    # A choice that cannot be read may be what other settings go with: without it nothing is said of them.
    choices = [item for item in settings.keys() & hints.keys() if not _is_number(hints[item])]
    if all(item in checked for item in [*required, *choices]):
        made, refused = _tried(method, checked, name, where)
        mistakes += refused
    if made is None or mistakes:
        raise ValueError("\n".join(mistakes))
    return made


def _tried(method: type[M], given: Mapping[str, object], name: str, where: str) -> tuple[M | None, list[str]]:
    """The method, and every setting that its own check refuses: a number that is refused counts as not given,
    so that the rest can be looked at. None where that is not possible."""
    settings, mistakes, required = dict(given), [], _required(method)
    hints = get_type_hints(method)
    while True:
        try:
            return method(**settings), mistakes
        except ValueError as error:
            mistakes.append(f"{where}.{error}")
            # Its message begins with the field: "cap = -1: must be ...".
            culprit = str(error).partition(" ")[0]
            if culprit not in settings or culprit in required or not _is_number(hints[culprit]):
                return None, mistakes
            del settings[culprit]
        except Exception as error:
            if not is_own(name):
                raise
            raise ValueError(
                f"{where}.name = '{name}' cannot be made from its settings.\n{shown()}"
            ) from error


def load(path: str, where: str) -> object:
    """What `package.module:Name` names. Raises ValueError with `where`, the field that holds the path."""
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute.isidentifier():
        raise ValueError(f"{where} = '{path}': must be package.module:Name, with one colon.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"{where} = '{path}': {error}. Put its folder on PYTHONPATH.") from error
        raise ValueError(f"{where} = '{path}' cannot be imported. Mend it there:\n{shown()}") from error
    except Exception as error:
        raise ValueError(f"{where} = '{path}' cannot be imported. Mend it there:\n{shown()}") from error
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise ValueError(
            f"{where} = '{path}': module {module_name} has no '{attribute}'. {nearest(attribute, public)}"
        )
    return getattr(module, attribute)


def fields_of(method: type) -> tuple[Field[Any], ...]:
    assert is_dataclass(method), "methods are dataclasses"
    return fields(method)


def shown() -> str:
    """Of the exception that is being handled what it says, and where in the user's own files: the way there
    through Python's imports and this package is left out."""
    handled = sys.exception()
    assert handled is not None, "asked for where an exception is handled"
    error = traceback.TracebackException.from_exception(handled)
    passed = ("<frozen importlib", importlib.__file__, f"{Path(__file__).parents[1]}/")
    own = [one for one in error.stack if not one.filename.startswith(passed)]
    lines = [*traceback.StackSummary.from_list(own).format(), *error.format_exception_only()]
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        lines.append(f"because of {''.join(cause.format_exception_only())}")
    return "".join(lines)[-SHOWN:]


def _checked(found: object, name: str, where: str, base: type[M]) -> type[M]:
    """A class from outside that is a frozen dataclass of its seam, with fields that YAML can hold."""
    wanted = f"{base.__module__}.{base.__qualname__}"
    if not isinstance(found, type) or not issubclass(found, base) or found is base:
        raise ValueError(f"{where} = '{name}': must be a class derived from {wanted}. Derive it.")
    # Its own: a subclass without the decorator has its base's, and its fields would be none.
    parameters = vars(found).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise ValueError(
            f"{where} = '{name}': must be a frozen dataclass. Write @dataclass(frozen=True, kw_only=True)."
        )
    try:
        hints = get_type_hints(found)
    except Exception as error:
        raise ValueError(f"{where} = '{name}': its annotations cannot be read.\n{shown()}") from error
    for item in fields_of(found):
        if not _is_setting(hints[item.name]):
            raise ValueError(
                f"{where} = '{name}': its field {item.name} is of type {hints[item.name]}, must be what YAML "
                "holds: bool, int, float, str or a Literal, with `| None` or without. Use one of them."
            )
    return found


def _is_setting(hint: object) -> bool:
    if get_origin(hint) in (types.UnionType, Union):
        inner = [arg for arg in get_args(hint) if arg is not type(None)]
        return len(inner) == 1 and _is_setting(inner[0])
    return get_origin(hint) is Literal or hint in SETTING_TYPES


def _is_number(hint: object) -> bool:
    return bool({int, float} & {hint, *get_args(hint)})


def nearest(word: str, known: list[str]) -> str:
    """'Did you mean ...?' for the closest known word, or the list of known words."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(sorted(known))}."


def check_choice(name: str, value: object, choices: tuple) -> None:
    """Raises ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(
            f"{name} = {value!r}: must be one of {', '.join(map(repr, choices))}. {_hint(value, choices)}"
        )


def _hint(value: object, choices: tuple) -> str:
    close = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Use {choices[0]!r}."


def _required(method: type) -> list[str]:
    return [item.name for item in fields_of(method) if item.default is item.default_factory]


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
