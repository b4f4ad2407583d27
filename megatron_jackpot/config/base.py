"""What every section of the configuration is made of."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """The input cannot work; the message names the field and the remedy."""


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


class Method(BaseModel):
    """A method of a registry: `name` and that method's own fields as keys, checked by the method itself."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})
