"""What tells runs apart: the settings in which they differ, for legends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_jackpot.run.provenance import CONFIG_FILE

SEED = "run.seed"
PLACES = ("run.folder", "run.resume", "servers.urls", "servers.port")
"""Settings that say where a run took place, not what it was."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    label: str
    """Example: "algorithm.correction.name=tis"; "" where nothing else differs."""
    members: tuple[int, ...]
    """Places in the list of runs."""


def labels(folders: Sequence[Path]) -> list[str]:
    """A name for each run: the settings in which they differ, else their folders' names.

    Example: ["run.seed=0", "run.seed=1"].
    """
    settings = [_settings(Path(folder)) for folder in folders]
    found = _differing(settings)
    return found if all(found) and len(set(found)) == len(found) else names(folders)


def groups(folders: Sequence[Path]) -> list[Group]:
    """The runs in order of their first member; each for itself where it has no configuration, or where two
    that are otherwise alike have the same seed."""
    settings = [_settings(Path(folder)) for folder in folders]
    seeds = [repr(one.pop(SEED, None)) for one in settings]
    found = _differing(settings)
    members: dict[str, list[int]] = {}
    for place, label in enumerate(found):
        members.setdefault(label, []).append(place)
    alike = any(len({seeds[place] for place in group}) < len(group) for group in members.values())
    if alike or not all(settings):
        return [Group(label, (place,)) for place, label in enumerate(labels(folders))]
    return [Group(label, tuple(group)) for label, group in members.items()]


def names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names where they differ, else with their parents."""
    paths = [Path(folder).resolve() for folder in folders]
    own = [path.name for path in paths]
    return own if len(set(own)) == len(own) else [f"{path.parent.name}/{path.name}" for path in paths]


def _differing(settings: Sequence[Mapping[str, object]]) -> list[str]:
    keys = sorted(
        key for key in set().union(*settings) if len({repr(one.get(key, "")) for one in settings}) > 1
    )
    return [", ".join(f"{key}={one[key]}" for key in keys if key in one) for one in settings]


def _settings(folder: Path) -> dict[str, object]:
    """Dotted key -> value of the run's configuration, less its places; {} where it has none."""
    config = folder / CONFIG_FILE
    found = _flat(yaml.safe_load(config.read_text(encoding="utf-8"))) if config.is_file() else {}
    return {key: value for key, value in found.items() if key not in PLACES}


def _flat(tree: Mapping[str, object], above: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat
