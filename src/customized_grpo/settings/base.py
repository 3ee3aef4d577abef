"""Base class of all settings. Each settings class is beside the code that reads it; `config.py` composes them."""

from enum import Enum
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import ErrorDetails


class Role(Enum):
    """How a setting affects the result of a run. The annotation of every setting of a run declares one."""

    KEPT = "kept"
    """Part of the result. A resumed run refuses another value."""
    APPLIED = "applied"
    """Part of the result. A resumed run uses the new value from its first iteration on."""
    ARGUMENTS = "arguments applied"
    """Part of the result. A resumed run refuses another function or class, but applies changed arguments."""
    RUNTIME = "free"
    """No effect on the result: where and how the run is computed and logged. A resumed run uses the new value."""


class Settings(BaseModel):
    """Frozen and typed, without unknown keys. The string below a field documents it (`cgrpo config --describe`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse booleans (yes, no, on and off in YAML) for numbers, since Python would convert them to 1 and 0."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind in (int, float, int | None, float | None):
            raise ValueError("a number")
        return value


class Spec(BaseModel):
    """A function or class named by import path, with its arguments: `{use: package.module:name, argument: value}`.

    A name without a colon is looked up in the default module of its slot: `use: sars` in `advantage` means
    `customized_grpo.functional.advantages:sars`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    use: str

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


_EXPECTED = {
    "missing": "a value",
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list, such as [a, b]",
    "tuple_type": "a list, such as [a, b]",
    "dict_type": "a mapping, such as {name: value}",
    "path_type": "a path",
    "literal_error": "{expected}",
    "finite_number": "a finite number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "too_short": "at least {min_length}",
    "string_too_short": "some text",
    "value_error": "{error}",
}


def expectation(problem: ErrorDetails) -> str:
    """The expected value according to an error of pydantic, without pydantic's vocabulary."""
    if problem["type"] in ("model_type", "model_attributes_type"):
        spec = problem.get("ctx", {}).get("class_name") == "Spec"
        return "a name, or a mapping such as {use: name}" if spec else "a mapping of settings"
    if known := _EXPECTED.get(problem["type"]):
        return known.format(**problem.get("ctx", {}))
    return problem["msg"]
