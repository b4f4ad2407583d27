"""From YAML and overrides to a checked configuration; the list of its settings for --help."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_jackpot.algorithm.registry import nearest
from megatron_jackpot.config.base import ConfigError, Section
from megatron_jackpot.config.schema import Config
from megatron_jackpot.config.yaml_tree import Tree, apply_override, read_tree

RENAMED = {"cluster.time": "cluster.minutes"}
"""Key that was once read -> the one that says it now."""


def load_config(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read YAML, apply `a.b=value` overrides (values are YAML), check everything.

    `base: FILE`, relative to the YAML, is a file whose keys count where the YAML has none; a method counts
    whole.
    Raises ConfigError naming the field, the value and what to do, FileNotFoundError for a missing file.
    """
    tree = read_tree(Path(path))
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree)


def parse_config(tree: Tree) -> Config:
    """Check a nested mapping. Raises ConfigError with one line per mistake."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from error


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        section: Any = Config
        prefix = item["loc"][:-1]
        for part in prefix:
            section = section.model_fields[part].annotation
        if where in RENAMED:
            return f"Unknown config key '{where}'. It is '{RENAMED[where]}' now: docs/changelog.md."
        full = [".".join([*map(str, prefix), name]) for name in section.model_fields]
        return f"Unknown config key '{where}'. {nearest(where, full)}"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if item["type"] == "missing":
        return f"Config key '{where}' is missing. Set it in the YAML file or as {where}=VALUE."
    return f"{where} = {item['input']!r}: {item['msg']}."


def describe(section: type[BaseModel] = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted key, default, meaning) of every setting, in file order."""
    rows = []
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            rows += describe(field.annotation, f"{key}.")
        else:
            default = "required" if field.is_required() else str(field.get_default(call_default_factory=True))
            rows.append((key, default, field.description or ""))
    return rows
