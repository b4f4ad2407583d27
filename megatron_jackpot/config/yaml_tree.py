"""A run's YAML as a nested mapping, before it is checked: base files and overrides."""

from pathlib import Path
from typing import Any

import yaml

from megatron_jackpot.config.base import ConfigError

Tree = dict[str, Any]
"""Sections, keys and values as YAML gives them."""


def read_tree(path: Path, above: tuple[Path, ...] = ()) -> Tree:
    """The mapping in a YAML file, over that of its `base`. Raises ConfigError for what is not one, or a
    circle."""
    if path.resolve() in above:
        raise ConfigError(f"{path}: base files form a circle. Remove one of their `base` keys.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, got {type(tree).__name__}.")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return _merge(read_tree(path.parent / str(base), (*above, path.resolve())), tree)


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
        raise ConfigError(f"Override '{override}' is not of the form section.key=value.")
    *parents, last = key.split(".")
    for parent in parents:
        node = tree.get(parent)
        if node is None:
            node = tree[parent] = {}
        if not isinstance(node, dict):
            raise ConfigError(f"Override '{override}': '{parent}' holds {node!r}, which is not a section.")
        tree = node
    try:
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"Override '{override}' has a value that is not YAML: {error}") from error
