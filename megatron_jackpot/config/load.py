"""From YAML and overrides to a checked configuration; the list of its settings for --help."""

import copy
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megatron_jackpot.config.base import ConfigError, section_of
from megatron_jackpot.config.schema import METHOD_KEYS, MISTAKES, Config
from megatron_jackpot.config.suggest import meant
from megatron_jackpot.config.yaml_tree import Tree, apply_override, as_yaml, place_of, read_tree, spell_out

NAME = "NAME"
RENAMED = {"cluster.time": "cluster.minutes"}
"""Key that was once read -> the one that says it now."""


def load_config(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read YAML, apply `a.b=value` overrides (values are YAML), check everything.

    `base: FILE`, relative to the YAML, is a file whose keys count where the YAML has none; a method counts
    whole, and may be its name alone.
    Raises ConfigError naming the field, the value and what to do, FileNotFoundError for a missing file.
    """
    config, mistakes = examine_config(path, overrides)
    if config is None or mistakes:
        raise ConfigError("\n".join(mistakes))
    return config


def examine_config(
    path: Path, overrides: list[str] | tuple[str, ...] = ()
) -> tuple[Config | None, list[str]]:
    """The configuration and its mistakes, a line each.

    Settings that cannot be read count as not given, so that the rest can be looked at; None where too much is
    missing. Raises ConfigError for a file or an override that is no YAML, FileNotFoundError for none.
    """
    tree = read_tree(Path(path))
    for override in overrides:
        apply_override(tree, override)
    return examine(tree)


def parse_config(tree: Tree) -> Config:
    """Check a nested mapping. Raises ConfigError with one line per mistake."""
    config, mistakes = examine(tree)
    if config is None or mistakes:
        raise ConfigError("\n".join(mistakes))
    return config


def examine(tree: dict[str, Any]) -> tuple[Config | None, list[str]]:
    """As `examine_config`, of a nested mapping."""
    mistakes: list[str] = []
    tree = spell_out(copy.deepcopy(tree))
    for _ in range(2):
        across: list[str] = []
        try:
            return Config.model_validate(tree, context={MISTAKES: across}), mistakes + across
        except ValidationError as error:
            if mistakes:
                break  # What is left cannot be mended by leaving it out.
            mistakes = [line for item in _one_each(error.errors(), tree) for line in _explain(item)]
            for item in error.errors():
                # A method without a name counts as not given; a folder that is missing has no substitute.
                _leave_out(tree, item["loc"][: -1 if item["type"] == "missing" else None])
    return None, mistakes


def _one_each(errors: Sequence[ErrorDetails], tree: Tree) -> list[ErrorDetails]:
    """Of a value that is none of several kinds one mistake, in place of one for each kind."""
    found = dict[tuple[int | str, ...], ErrorDetails]()
    for item in errors:
        above = item["loc"][:-1]
        alone = item["type"] in ("extra_forbidden", "missing", "value_error")
        if alone or _value(tree, above) != item["input"]:
            found[(*item["loc"], item["type"])] = item
        elif above in found:
            found[above]["msg"] += f", or {item['msg'].removeprefix('Input should be ')}"
        else:
            found[above] = item.copy()
            # The kind stands last, as if it were a key.
            found[above]["loc"], found[above]["msg"] = above, item["msg"].partition(", ")[0]
    return list(found.values())


def _value(tree: object, where: tuple[int | str, ...]) -> object:
    for part in where:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _leave_out(tree: Any, where: tuple[int | str, ...]) -> None:
    """Remove the setting that a mistake is about, or the nearest one above it."""
    for depth, part in enumerate(where):
        below = tree.get(part) if isinstance(tree, dict) else None
        if depth == len(where) - 1 or not isinstance(below, dict):
            if isinstance(tree, dict):
                tree.pop(part, None)
            return
        tree = below


def _explain(item: Any) -> list[str]:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return _unknown(where, item["loc"][:-1], item["input"])
    if item["type"] == "value_error":
        return str(item["ctx"]["error"]).splitlines()
    if item["type"] == "missing":
        return [f"Config key '{where}' is missing. Set it in the YAML file or as {where}=VALUE."]
    if where in METHOD_KEYS:
        return [
            f"{where} = {item['input']!r}: must be a method's name, or {{name: ..., key: value}}. "
            "Write it so."
        ]
    defaults = {key: default for key, default, _ in describe()}
    named = _described(item["loc"])
    known = next((key for key in defaults if f"{named}.".startswith(f"{key}.")), None)
    if known is None:
        return [f"{where} = {item['input']!r}: must be a section. Put its keys below it."]
    remedy = "Set one that is" if defaults[known] == "required" else f"Its default is {defaults[known]}"
    if item["type"] == "string_type" and isinstance(item["input"], dict | list):
        remedy = "Braces and brackets make no text in YAML: put it in quotes"
    given = repr(item["input"])
    if isinstance(item["input"], date):
        given, remedy = str(item["input"]), "It is a date in YAML: put it in quotes"
    # Its own words name the type of Python.
    rule = "must be a path" if item["type"] == "path_type" else item["msg"]
    return [f"{where} = {given}: {rule}. {remedy}; `launch --help {known}` says what it is."]


def _unknown(where: str, above: tuple[int | str, ...], value: object) -> list[str]:
    """A line for an unknown key, or for each key in an unknown section that is not just misspelled."""
    if where in RENAMED:
        return [f"Unknown config key '{where}'. It is '{RENAMED[where]}' now: docs/changelog.md."]
    section: Any = Config
    parts = iter(above)
    for part in parts:
        annotation = section.model_fields[part].annotation
        section = section_of(annotation)
        if get_origin(annotation) is dict:
            next(parts)
    names, keys = list(section.model_fields), [key for key, _, _ in describe()]
    strangers = [where] if meant(where, names, ()) else _leaves(where, value)
    lines = []
    for stranger in strangers:
        found = " or ".join(f"'{key}'" for key in meant(stranger, names if stranger == where else (), keys))
        remedy = f"Did you mean {found}?" if found else f"Known: {', '.join(sorted(names))}."
        lines.append(f"Unknown config key '{stranger}'. {remedy}")
    return lines


def _described(where: tuple[int | str, ...]) -> str:
    """The dotted key at `where` as `describe` writes it: sections that have names of the user's own under
    NAME."""
    section: type[BaseModel] | None = Config
    parts, found = iter(where), list[str]()
    for part in parts:
        found.append(str(part))
        field = None if section is None else section.model_fields.get(str(part))
        section = None if field is None else section_of(field.annotation)
        if field is not None and get_origin(field.annotation) is dict and next(parts, None) is not None:
            found.append(NAME)
    return ".".join(found)


def _leaves(where: str, value: object) -> list[str]:
    if not isinstance(value, dict) or not value:
        return [where]
    return [leaf for key, below in value.items() for leaf in _leaves(f"{where}.{key}", below)]


def placed(mistakes: list[str], path: Path, overrides: list[str]) -> list[str]:
    """Mistakes, each that begins with a key with where that stands: "[run.yaml]", "[command line]"."""
    sections = "|".join(Config.model_fields)
    begins = re.compile(rf"(?:(?:Unknown|Config) [a-z ]*'([\w.]+)'|((?:{sections})(?:\.[\w.]+\w|(?= = ))))")
    found = []
    for line in mistakes:
        key = begins.match(line)
        place = place_of(key[1] or key[2], path, overrides) if key else ""
        found.append(f"{line} [{place}]" if place else line)
    return found


def describe(section: type[BaseModel] = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted key, default, meaning) of every setting, in file order; NAME stands for one of the user's."""
    rows = []
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        if (below := section_of(field.annotation)) is not None:
            rows += describe(below, f"{key}.{NAME}." if get_origin(field.annotation) is dict else f"{key}.")
        else:
            default = (
                "required" if field.is_required() else as_yaml(field.get_default(call_default_factory=True))
            )
            rows.append((key, default, field.description or ""))
    return rows
