"""What every section of the configuration is made of."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from megatron_jackpot.algorithm.registry import is_own


class ConfigError(ValueError):
    """The input cannot work; the message names the field and the remedy."""


Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Check(Generic[Subject]):
    """One thing that is refused at start; docs/refused.md is made of these."""

    name: str
    """The settings that it looks at."""
    rule: str
    """What must hold."""
    remedy: str
    """What to do where it does not."""
    find: Callable[[Subject], Iterable[str]]
    """The mistakes: a line each, with field, value, rule and remedy."""


class Section(BaseModel):
    """A frozen block of settings; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        # A bound of nan or inf would bind nothing; what can be switched off is null.
        allow_inf_nan=False,
    )

    @field_validator("*")
    @classmethod
    def _from_home(cls, value: Any, info: ValidationInfo) -> Any:
        """A path's "~" is the home folder, as no shell has seen what stands in YAML or behind key=."""
        try:
            return value.expanduser() if isinstance(value, Path) else value
        except RuntimeError as error:
            raise ValueError(f"{info.field_name} = '{value}': {error} Write the path in full.") from error


def section_of(annotation: object) -> type[Section] | None:
    """The section that a field holds, also where it may be null; None for a setting."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


class Method(BaseModel):
    """A method of a registry: `name` and that method's own fields as keys, checked by the method itself."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @property
    def is_own(self) -> bool:
        """Whether it is a class of the user's own, named by its path."""
        return is_own(self.name)
