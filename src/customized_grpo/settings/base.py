"""Base class of all settings. Each settings class is beside the code that reads it; `config.py` composes them."""

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic.errors import PydanticUserError
from pydantic_core import ErrorDetails

from customized_grpo.errors import UserError, nearest
from customized_grpo.store.yaml_text import missing_space

AtLeastOne = Annotated[int, Field(ge=1)]
"""The type of an argument that counts things."""


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

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse booleans (yes, no, on and off in YAML) for numbers, since Python would convert them to 1 and 0."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind in (int, float, int | None, float | None):
            raise ValueError("a whole number" if kind in (int, int | None) else "a number")
        return value

    @classmethod
    def default_of(cls, name: str, tree: Mapping[str, Any]) -> Any:
        """The default of a setting where `tree` is what is given of the others."""
        return cls.model_fields[name].default


class Spec(BaseModel):
    """A function or class named by import path, with its arguments: `{use: package.module:name, argument: value}`.

    A name without a colon is looked up in the default module of its slot: `use: sars` in `advantage` means
    `customized_grpo.functional.advantages:sars`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    use: str
    if TYPE_CHECKING:

        def __init__(self, *, use: str, **arguments: Any) -> None: ...

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def make_spec(fields: Mapping[str, Any], where: str) -> Spec:
    """A spec from plain data of a user. Raises UserError, which names the setting `where`."""
    try:
        return Spec(**fields)
    except ValidationError as error:
        raise UserError(sentence(error.errors(), fields, Spec, where)) from None


_EXPECTED = {
    "missing": "more values",
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
    "dict_type": "a mapping, such as {{name: value}}",
    "path_type": "a path",
    "none_required": "null",
    "callable_type": "a function, which only Python can give",
    "literal_error": "{expected}",
    "finite_number": "a finite number",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "{le:g} or less",
    "too_short": "at least {min_length}",
    "too_long": "at most {max_length}",
    "string_too_short": "some text",
    "value_error": "{error}",
}
_PYTHON_ONLY = ("is_instance_of", "needs_python_object")
"""Errors of types that YAML cannot represent, which are left out if another type of the union is possible."""


def expectation(problem: ErrorDetails) -> str:
    """The expected value according to an error of pydantic, in plain words."""
    if problem["type"] in ("model_type", "model_attributes_type"):
        spec = problem.get("ctx", {}).get("class_name") == "Spec"
        return "a name, or a mapping such as {use: name}" if spec else "a mapping of settings"
    if known := _EXPECTED.get(problem["type"]):
        return known.format(**problem.get("ctx", {}))
    return problem["msg"]


def sentence(problems: Sequence[ErrorDetails], value: Any, kind: Any = None, prefix: str = "") -> str:
    """What is wrong with settings, according to the errors of pydantic.

    Args:
        problems: one or more errors; those of the first wrong value are reported.
        value: the value that was validated.
        kind: its type, to suggest the nearest name.
        prefix: the setting that holds the value, such as `policy.lora`; empty for a whole configuration.
    """
    paths = [_given(problem["loc"], value) for problem in problems]
    path = max((path for path in paths if path[: len(paths[0])] == paths[0]), key=len)  # the most exact of a union
    here = [problem for problem, own in zip(problems, paths, strict=True) if own == path]
    first = next((problem for problem in here if problem["type"] == "missing"), here[0])
    where = ".".join([*[prefix] * bool(prefix), *path])
    if first["type"] == "extra_forbidden":
        parent = _model_at(kind, path[:-1])
        return f"There is no setting '{where}'.{nearest(path[-1], parent.model_fields if parent else ())}"
    if first["type"] == "missing" and isinstance(first["loc"][-1], str):
        return f"The setting '{'.'.join([where, first['loc'][-1]]).strip('.')}' is missing; give it a value."
    here = [problem for problem in here if problem["type"] not in _PYTHON_ONLY] or here
    others = len({tuple(own) for own in paths if own[: len(paths[0])] != paths[0]})
    more = f" ({others} more like this.)" if others else ""
    kinds = " or ".join(dict.fromkeys(expectation(problem) for problem in here))
    hint = missing_space(first["input"]) if "mapping" in kinds else ""
    shown = json.dumps(first["input"], default=str, ensure_ascii=False)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return f"The setting '{where}' is {shown}: expected {kinds}{hint}.{more}"


def mistakes(value: Any, kind: Any) -> list[ErrorDetails]:
    """The reasons why a value from YAML is not of a type. Empty if it is, or if the type cannot be checked.

    Nothing is converted: text that consists of digits is not a number.
    """
    try:
        adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
        text = json.dumps(value)
    except (PydanticUserError, NameError, TypeError, ValueError):
        return []
    try:
        adapter.validate_json(text, strict=_model_at(kind, ()) is None)  # settings have rules of their own
    except ValidationError as error:
        return error.errors()
    return []


def _given(location: Sequence[int | str], value: Any) -> list[str]:
    """The part of an error's location that exists in the input; the rest names the members of a union."""
    path: list[str] = []
    for part in location:
        in_list = isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)
        if in_list or (isinstance(value, Mapping) and part in value):
            path.append(str(part))
            value = value[part]  # pyright: ignore[reportCallIssue, reportArgumentType]
    return path


def _model_at(kind: Any, keys: Sequence[str]) -> type[BaseModel] | None:
    """The class of settings at a dotted name inside a type, which may be a union; None if there is none."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    if not models or not keys:
        return models[0] if models else None
    field = models[0].model_fields.get(keys[0])
    return _model_at(field.annotation, keys[1:]) if field else None
