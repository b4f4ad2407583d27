"""What tells runs apart: the settings in which they differ, for legends."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_jackpot.monitor.metrics import Row
from megatron_jackpot.run.provenance import CONFIG_FILE

SEED = "run.seed"
PLACES = ("run.folder", "run.resume", "servers.urls", "servers.port")
"""Settings that say where a run took place, not what it was."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    label: str
    """Example: "correction=tis"; "" where nothing else differs."""
    members: tuple[int, ...]
    """Places in the list of runs."""


def labels(folders: Sequence[Path]) -> list[str]:
    """A name for each run: the settings in which they differ, else their folders' names.

    Example: ["run.seed=0", "run.seed=1"], or "seed=0" where no other section has one.
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
    told = {key: _told_apart([one.get(key, "") for one in settings]) for key in keys}
    called = _called(set().union(*settings))
    return [
        ", ".join(f"{called[key]}={told[key][place]}" for key in keys if key in one)
        for place, one in enumerate(settings)
    ]


def _called(keys: Iterable[str]) -> dict[str, str]:
    """The fewest last parts of each key that no other one ends with; a method's name stands for the method.

    Example: {"algorithm.correction.name": "correction", "actor.hf": "actor.hf", "policy.hf": "policy.hf"}.
    """
    parts = {key: key.removesuffix(".name").split(".") for key in keys}
    ends = Counter(tuple(own[-n:]) for own in parts.values() for n in range(1, len(own) + 1))
    short = {
        key: next((n for n in range(1, len(own)) if ends[tuple(own[-n:])] == 1), len(own))
        for key, own in parts.items()
    }
    return {key: ".".join(own[-short[key] :]) for key, own in parts.items()}


def _told_apart(values: Sequence[object]) -> list[str]:
    """The values; of paths the parts that are not common to the ends of all.

    Example: ["/a/x/models", "/b/models"] -> ["a/x", "b"].
    """
    texts = [str(value) for value in values]
    if not all(text.startswith("/") for text in texts):
        return texts
    parts = [text.strip("/").split("/") for text in texts]
    shortest = min(map(len, parts))
    tail = next((i for i in range(shortest) if len({one[-1 - i] for one in parts}) > 1), shortest - 1)
    parts = [one[: len(one) - tail] for one in parts]
    shortest = min(map(len, parts))
    head = next((i for i in range(shortest) if len({one[i] for one in parts}) > 1), shortest - 1)
    return ["/".join(one[head:]) for one in parts]


def config_of(folder: Path) -> Row:
    """The run's configuration as it stands in its folder; {} where it has none. Raises ValueError for a
    damaged one."""
    path = folder / CONFIG_FILE
    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged: {' '.join(str(error).split())}. Mend it or move it away."
        ) from error
    return held if isinstance(held, dict) else {}


def _settings(folder: Path) -> dict[str, object]:
    """Dotted key -> value of the run's configuration, less its places."""
    return {key: value for key, value in _flat(config_of(folder)).items() if key not in PLACES}


def _flat(tree: Mapping[str, object], above: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat
