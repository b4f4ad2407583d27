"""A run's YAML as a nested mapping, before it is checked: base files, overrides, where each key stands."""

import sys
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from megatron_jackpot.config.base import ConfigError
from megatron_jackpot.config.schema import METHOD_KEYS, METHOD_LIST_KEYS

Tree = dict[str, Any]
"""Sections, keys and values as YAML gives them."""


def read_tree(path: Path) -> Tree:
    """The mapping in a YAML file, over that of its `base`. Raises ConfigError for what is not one, or a
    circle; FileNotFoundError for a file that is not there."""
    trees = [tree for _, tree in files_of(path)]
    return reduce(_merge, reversed(trees))


def files_of(path: Path) -> Iterator[tuple[Path, Tree]]:
    """A YAML file, its `base`, the base of that, and so on, with the keys that each gives."""
    above: list[Path] = []
    base: Path | None = path
    while base is not None:
        path, base = base, None
        if path.resolve() in above:
            raise ConfigError(f"{path}: base files form a circle. Remove one of their `base` keys.")
        above.append(path.resolve())
        tree = _read(path)
        if (name := tree.pop("base", None)) is not None:
            if not isinstance(name, str):
                raise ConfigError(
                    f"{path}: base = {name!r} must be the path of a YAML file, from this one's folder. "
                    "Give it, or remove the key."
                )
            base = path.parent / name
        yield path, spell_out(tree)


class _Loader(yaml.SafeLoader):
    """YAML whose mappings have each key once: of two the last would count, and the first be lost unseen."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._checked: dict[int, yaml.MappingNode] = {}

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # As it is written, for `<<` then puts the keys of others before its own; a merged one comes twice.
        seen = set[str]()
        written = () if id(node) in self._checked else node.value
        for key in (key for key, _ in written if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key '{key.value}' stands here a second time", problem_mark=key.start_mark
                )
            seen.add(key.value)
        self._checked[id(node)] = node
        super().flatten_mapping(node)


def _read(path: Path) -> Tree:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        there = ", ".join(sorted(found.name for found in path.parent.glob("[!.]*.yaml"))[:5])
        known = (
            f"There {'are' if ',' in there else 'is'} {there}." if there else "Give the path of a YAML file."
        )
        raise FileNotFoundError(f"{path} does not exist. {known}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder. Give the path of a YAML file in it.") from error
    except NotADirectoryError as error:
        raise ConfigError(f"{path} does not exist: a part of the path is a file. Mend it.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8: {error}. Save it as UTF-8.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has.
        said = " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")
        raise ConfigError(f"{path} is not valid YAML: {said}. Mend it there.") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} must hold a mapping of sections, got "
            f"{'nothing' if tree is None else type(tree).__name__}. See examples/quickstart/run.yaml."
        )
    return tree


def as_yaml(value: object) -> str:
    """A setting's value as it is written in YAML, on one line: null, false, [], {name: tis}."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    elif isinstance(value, Path):
        value = str(value)
    elif isinstance(value, tuple | list):
        return f"[{', '.join(map(as_yaml, value))}]"
    return yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize).strip().removesuffix("\n...")


def spell_out(tree: Tree) -> Tree:
    """`tree`, in place: where a method is given by its name alone, `tis` becomes {name: tis}."""
    for key in (*METHOD_KEYS, *METHOD_LIST_KEYS):
        *parents, last = key.split(".")
        section: object = tree
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            continue
        given = section.get(last)
        if key in METHOD_KEYS and isinstance(given, str):
            section[last] = {"name": given}
        elif key in METHOD_LIST_KEYS and isinstance(given, str):
            section[last] = [{"name": given}]
        elif key in METHOD_LIST_KEYS and isinstance(given, list):
            section[last] = [{"name": one} if isinstance(one, str) else one for one in given]
    return tree


def _merge(base: Tree, tree: Tree) -> Tree:
    merged = dict(base)
    for key, value in tree.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict) and "name" not in value:
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def apply_override(tree: Tree, override: str) -> None:
    """Set `a.b=value` in place, the value in YAML. Raises ConfigError for another form."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"Override '{override}' is not of the form section.key=value. Write it so, without spaces."
        )
    *parents, last = key.split(".")
    section = tree
    for parent in parents:
        node = section.get(parent)
        if node is None:
            node = section[parent] = {}
        if not isinstance(node, dict):
            raise ConfigError(
                f"Override '{override}': '{parent}' holds {node!r}, which is not a section. Leave out what "
                f"follows '{parent}'."
            )
        section = node
    try:
        section[last] = yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f"Override '{override}' has a value that is not YAML: {' '.join(str(error).split())}. "
            f"Quote it: '{key}=\"...\"'."
        ) from error
    spell_out(tree)


def place_of(key: str, path: Path, overrides: list[str] | tuple[str, ...]) -> str:
    """Where a key, or what is below it, is given: "command line", a file, or "default"."""
    for override in overrides:
        given = override.partition("=")[0]
        if f"{given}.".startswith(f"{key}.") or f"{key}.".startswith(f"{given}."):
            return "command line"
    for file, tree in files_of(path):
        node: object = tree
        for part in key.split("."):
            node = node.get(part, {}) if isinstance(node, dict) else node
        if node != {}:
            return str(file)
    return "default"
