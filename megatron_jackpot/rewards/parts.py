"""Several rewards of one response: which of them a row gets, each one's number, and their weighted sum."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

from megatron_jackpot.rewards.remote import is_remote

COLUMN = "reward"
"""Of a row that names its reward, or several in a list."""


class Part(NamedTuple):
    """One of `data.rewards`."""

    reward: str
    """A built-in reward, one's own by its path, or a service by its address."""
    weight: float
    rows: Literal["all", "named"]
    """Every row, or only rows that name it."""


class Given(Protocol):
    """A part as the configuration has it."""

    @property
    def reward(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def rows(self) -> Literal["all", "named"]: ...


Parts = Mapping[str, Part]
"""name -> part, in the order of the configuration: of those that a row gets the first says what is
correct."""


def written(reward: str | Mapping[str, Given]) -> str:
    """One reward's name, or several as JSON: what a worker is started with, and labels are remembered by."""
    if isinstance(reward, str):
        return reward
    return json.dumps({name: [part.reward, part.weight, part.rows] for name, part in reward.items()})


def read(text: str) -> Parts | None:
    """The parts that were `written`; None of one reward."""
    if not text.startswith("{"):
        return None
    return {name: Part(*values) for name, values in json.loads(text).items()}


def of_row(parts: Parts | None, label: object) -> list[str]:
    """Names of the rewards that a row gets, in the order of `parts`: those it names, else those of all rows.
    Where there is one alone, that has none.

    Raises ValueError for a name that is none, and where none is left.
    """
    if parts is None:
        return [""]
    named = label.get(COLUMN) if isinstance(label, Mapping) else None
    if named is None:
        chosen = [name for name, part in parts.items() if part.rows == "all"]
    else:
        wanted = named if isinstance(named, list) else [named]
        unknown = [name for name in wanted if name not in parts]
        if unknown:
            raise ValueError(
                f"its '{COLUMN}' names {unknown[0]!r}, must be of data.rewards: {', '.join(parts)}."
            )
        chosen = [name for name in parts if name in wanted]
    if not chosen:
        raise ValueError(f"no reward is for this row: name one of data.rewards under '{COLUMN}'.")
    return chosen


def fault_of(parts: Parts, label: object) -> str | None:
    """What is wrong with the names in a row."""
    try:
        of_row(parts, label)
    except ValueError as error:
        return str(error)
    return None


def weighted(parts: Parts, values: Mapping[str, float]) -> float:
    """The reward of which `values` are the parts."""
    return sum(parts[name].weight * value for name, value in values.items())


class Several:
    """The rewards of a run as one that returns what each part does; those of services are not here."""

    def __init__(
        self,
        parts: Parts,
        find: Callable[[str], tuple[Callable[..., object], Callable[[object], None] | None]],
        asked_for: Callable[[Callable[..., object]], list[str]],
    ) -> None:
        """Raises ValueError as `find` does, which loads a reward by its name."""
        self.parts = parts
        self.found = {n: find(part.reward) for n, part in parts.items() if not is_remote(part.reward)}
        self.wants = {name: asked_for(score) for name, (score, _) in self.found.items()}
        self.asks = sorted({what for wants in self.wants.values() for what in wants})

    def __call__(
        self, response_text: str, label: object, *, names: Sequence[str], **seen: object
    ) -> dict[str, object]:
        """`names` of those that are here; `seen` has what any of them asks for."""
        return {
            name: self.found[name][0](response_text, label, **{what: seen[what] for what in self.wants[name]})
            for name in names
        }

    def check(self, label: object) -> None:
        """Raises ValueError when a reward of the row could score no response."""
        for name in of_row(self.parts, label):
            check = self.found[name][1] if name in self.found else None
            if check is not None:
                check(label)
