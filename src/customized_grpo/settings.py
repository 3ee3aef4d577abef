"""The base of every settings class. A settings class lives beside the code that reads it; `config.py` composes them."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Frozen, typed, no unknown keys. The string under a field is its documentation (`cgrpo config --describe`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class Spec(BaseModel):
    """A function or class named by import path, with its arguments: `{use: package.module:name, argument: value}`.

    A name without a colon is looked up in the home module of its slot: `use: sars` in `advantage` is
    `customized_grpo.functional.advantages:sars`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    use: str

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})
