"""Settings from YAML and the command line: reading, overrides, defaults, and errors of one sentence each."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from customized_grpo.errors import UserError, nearest
from customized_grpo.settings.base import Role, Settings, Spec, expectation
from customized_grpo.store import read_text


class Loader(yaml.SafeLoader):
    """YAML's safe loader, extended to parse 1e-3 as a number (YAML 1.1 requires 1.0e-3)."""


def _mapping(loader: Loader, node: yaml.MappingNode) -> Iterator[dict[Any, Any]]:
    """A mapping without duplicate keys, of which YAML would silently drop all but the last."""
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.MarkedYAMLError(problem=f"duplicate key '{key.value}'", problem_mark=key.start_mark)
        seen.add(key.value)
    yield from loader.construct_yaml_map(node)


Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


S = TypeVar("S", bound=BaseModel)


def load_settings(model: type[S], path: str | Path | None = None, overrides: Sequence[str] = ()) -> S:
    """Load a YAML file (or the defaults) and apply `a.b=value` overrides.

    Raises:
        UserError: for a missing or unreadable file, an unknown key (suggesting the closest one) or a wrong type.
    """
    tree: dict[str, Any] = read_yaml(path) if path is not None else {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise UserError(
                f"'{override}' is not an override; write section.setting=value, such as training.iterations=5."
            )
        try:
            value = yaml.load(text, Loader)
        except yaml.YAMLError as error:
            raise UserError(f"The value of '{override}' is not valid YAML: {_problem(error)}.") from error
        _assign(tree, key.strip().split("."), value)
    return parse_config(tree, model)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: if the file is missing, is not YAML, or is not a mapping.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"There is no configuration file '{file}'; see recipes/ for examples.")
    try:
        tree = yaml.load(read_text(file), Loader)
    except yaml.YAMLError as error:
        line = error.problem_mark.line + 1 if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark else None
        where = f"'{file}', line {line}" if line else f"'{file}'"
        raise UserError(f"{where}: invalid YAML: {_problem(error)}.") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"'{file}' contains a {type(tree).__name__}; expected a mapping of sections.")
    return tree


def _problem(error: Exception) -> str:
    said = error.problem if isinstance(error, yaml.MarkedYAMLError) and error.problem else str(error)
    return " ".join(said.split())


def parse_config(tree: Mapping[str, Any], model: type[S]) -> S:
    """Build a settings object from plain data merged over the defaults. Errors are one sentence."""
    values = _over_defaults(tree, model)
    try:
        return model(**values)
    except ValidationError as error:
        raise UserError(_sentence(error, model, tree)) from None


def to_yaml(config: BaseModel) -> str:
    """Serialize the resolved configuration, so that reading it back gives an equal one."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False, width=100)


def _assign(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        below = tree.setdefault(key, {})
        if not isinstance(below, dict):
            below = tree[key] = {}
        tree = below
    tree[keys[-1]] = value


def _over_defaults(tree: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Merge single arguments such as `policy.dtype` into the default spec. A new `use` or `path` discards the default
    arguments, because those of the embedded model, such as full fine-tuning, do not suit another model."""
    merged = dict(tree)
    for name, field in model.model_fields.items():
        given = tree.get(name)
        if not isinstance(given, Mapping):
            continue
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            default = field.default.model_dump(exclude_unset=True) if isinstance(field.default, kind) else {}
            merged[name] = _over_defaults({**default, **given}, kind)
        elif kind is Spec:
            merged[name] = _over_spec(given, field.default)
        elif get_origin(kind) is dict and get_args(kind)[1] is Spec:
            complete = all(isinstance(spec, Mapping) and "use" in spec for spec in given.values())
            merged[name] = {} if complete else dict(field.default)
            for key, spec in given.items():
                if isinstance(spec, Mapping):
                    merged[name][key] = _over_spec(spec, field.default.get(key))
                else:
                    merged[name][key] = {"use": spec} if isinstance(spec, str) else spec
    for name, field in model.model_fields.items():
        if field.annotation is Spec and isinstance(tree.get(name), str):
            merged[name] = {"use": tree[name]}
    return merged


def _over_spec(given: Mapping[str, Any], default: Spec | None) -> dict[str, Any]:
    if default is None or ("use" in given and given["use"] != default.use):
        return dict(given)
    kept = default.model_dump()
    if "path" in given and given["path"] != kept.get("path"):
        return {"use": default.use, **given}
    return {**kept, **given}


def _sentence(error: ValidationError, model: type[BaseModel], tree: Mapping[str, Any]) -> str:
    problems = error.errors()
    first, path = problems[0], _given(problems[0]["loc"], tree)
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        parent = _model_at(model, path[:-1])
        known = list(parent.model_fields) if parent else []
        printed = getattr(model, "LISTED", "")
        return f"There is no setting '{where}'.{nearest(path[-1], known)}{printed}"
    if first["type"] == "missing":
        return f"The setting '{'.'.join(map(str, first['loc']))}' is missing; `cgrpo config` prints an example."
    here = [problem for problem in problems if _given(problem["loc"], tree) == path]  # one for each kind of a union
    others = len({tuple(_given(problem["loc"], tree)) for problem in problems}) - 1
    more = f" ({others} more like this.)" if others else ""
    kinds = " or ".join(dict.fromkeys(expectation(problem) for problem in here))
    return f"The setting '{where}' is {json.dumps(first['input'], default=str)[:80]}: expected {kinds}.{more}"


def _given(location: Sequence[int | str], tree: Any) -> list[str]:
    """The part of an error's location that exists in the input; the rest names the members of a union."""
    path: list[str] = []
    for part in location:
        if path and not (isinstance(tree, Mapping) and part in tree):
            break
        path.append(str(part))
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return path


def _model_at(model: type[BaseModel], keys: list[str]) -> type[BaseModel] | None:
    for key in keys:
        field = model.model_fields.get(key)
        kinds = [field.annotation] if field else []
        if kinds and get_origin(kinds[0]) in (Union, UnionType):
            kinds = list(get_args(kinds[0]))
        found = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not found:
            return None
        model = found[0]
    return model


def describe_settings(model: type[BaseModel], prefix: str = "", section: BaseModel | None = None) -> str:
    """Every setting with its default (in `section`, if given) and its description, one paragraph each."""
    paragraphs = []
    for name, field in model.model_fields.items():
        kind, default = field.annotation, getattr(section, name, field.default)
        if isinstance(kind, type) and issubclass(kind, Settings):
            title = f"{prefix}{name}: {' '.join((kind.__doc__ or '').split())}"
            paragraphs += [title, describe_settings(kind, f"{prefix}{name}.", default)]
        else:
            default = default.model_dump() if isinstance(default, Spec) else default
            text = " ".join((field.description or "").split())
            role = next((f"  [{item.value} on resume]" for item in field.metadata if isinstance(item, Role)), "")
            paragraphs.append(f"{prefix}{name} = {default}{role}\n    {text}")
    return "\n\n".join(paragraphs)
