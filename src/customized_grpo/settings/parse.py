"""Settings from YAML and the command line: reading, overrides, defaults, and errors of one sentence each."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from customized_grpo.errors import UserError, nearest
from customized_grpo.settings.base import Role, Settings, Spec, sentence
from customized_grpo.settings.recipes import find_recipe, recipe_names
from customized_grpo.shell import command
from customized_grpo.store import is_file
from customized_grpo.store.yaml_text import dump_yaml, missing_space, parse_yaml, read_yaml

S = TypeVar("S", bound=BaseModel)


def load_settings(
    model: type[S],
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    inner: Mapping[str, type[BaseModel]] | None = None,
) -> S:
    """Load a YAML file (or the defaults) and apply `a.b=value` overrides, which change one setting each.

    Args:
        model: the settings.
        path: of the file.
        overrides: in order; of two for the same setting, the later one counts.
        inner: settings that hold those of another model as a mapping, such as the configuration in a grid.

    Raises:
        UserError: for a missing or unreadable file, an unknown key (suggesting the closest one) or a wrong type.
    """
    tree = read_tree(path) if path is not None else {}
    changes = [_read_override(override) for override in overrides]
    for keys, value in sorted(changes, key=lambda change: "metrics" in change[0][:2]):  # whose default depends on data
        _change(tree, keys, value, model, inner or {})
    return parse_config(tree, model)


def read_tree(path: str | Path, *, stored: bool = False) -> dict[str, Any]:
    """Read a YAML mapping, laid over those that its `extends` names.

    Args:
        path: of the file, or the name of a packaged recipe.
        stored: whether a command wrote the file, which then cannot be empty.

    Raises:
        UserError: if the file or one that it extends is missing, is not YAML, is not a mapping, or is empty and may not
            be, or if it extends itself.
    """
    return _read_file(find_recipe(path), path, stored=stored)


def _read_file(
    file: Path, path: str | Path, extending: tuple[Path, ...] = (), *, stored: bool = False
) -> dict[str, Any]:
    if not is_file(file):
        raise UserError(
            f"There is no configuration file '{str(path)[:100]}'; give a YAML file, or a packaged recipe "
            f"(`{command('config', '--help')}` names them){_named_in(extending)}.{nearest(str(path), recipe_names())}"
        )
    tree = read_yaml(file)
    if tree is None and not stored:
        return {}
    if not isinstance(tree, dict) or (stored and not tree):
        seen = "is empty" if not tree else f"contains {'a list' if isinstance(tree, list) else json.dumps(tree)[:60]}"
        advice = "; restore the file, or name another folder" if stored else missing_space(tree)
        raise UserError(f"'{path}' {seen}; expected a mapping of settings, such as 'seed: 0'{advice}.")
    return _extended(tree, file, (*extending, file.resolve()))


def _extended(tree: dict[str, Any], file: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    """The content of a file merged over the files that it extends, which lie beside it or are packaged recipes."""
    names = tree.pop("extends", None) or []
    names = names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"The setting 'extends' of '{file}' is {json.dumps(names)[:60]}: expected a recipe or a file.")
    merged: dict[str, Any] = {}
    for name in names:
        other = find_recipe(name, file.parent)
        if other.resolve() in extending:
            raise UserError(f"'{file}' extends '{name}', which extends it in turn; remove one of the two.")
        merged = _laid_over(_read_file(other, name, extending), merged)
    merged.pop("verified", None)  # which describes that file alone
    return _laid_over(tree, merged)


def _laid_over(given: Any, below: Any) -> Any:
    """Merge mappings. Any other value replaces the one below it, and so does another function or class."""
    below = {"use": below} if isinstance(below, str) and isinstance(given, Mapping) else below
    if not isinstance(given, Mapping) or not isinstance(below, Mapping):
        return given
    if "use" in given and given["use"] != below.get("use"):
        return given
    return {**below, **{key: _laid_over(value, below.get(key)) for key, value in given.items()}}


def _named_in(extending: tuple[Path, ...]) -> str:
    return f"; '{extending[-1]}' extends it" if extending else ""


def parse_config(tree: Mapping[str, Any], model: type[S], prefix: str = "") -> S:
    """Build a settings object from plain data merged over the defaults. Errors are one sentence.

    `prefix` is the setting that holds the tree, for errors.
    """
    values = _over_defaults(tree, model)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        if isinstance(told := problems[0].get("ctx", {}).get("error"), UserError):  # a validator sees several settings
            raise told from None
        listed = getattr(model, "LISTED", "") if problems[0]["type"] == "extra_forbidden" else ""
        raise UserError(f"{sentence(problems, values, model, prefix)}{listed}") from None


def to_yaml(config: BaseModel) -> str:
    """Serialize the resolved configuration, so that reading it back gives an equal one."""
    return dump_yaml(json.loads(config.model_dump_json()))


# ---- overrides


def _read_override(text: str) -> tuple[list[str], Any]:
    """The dotted name and the value of `a.b=value`."""
    name, separator, value = text.partition("=")
    keys = [key.strip() for key in name.split(".")]
    if not separator or not all(keys):
        raise UserError(
            f"'{text[:80]}' is not an override; write section.setting=value, such as training.iterations=5."
        )
    return keys, parse_yaml(value, f"The value of '{text[:80]}'")


def _change(
    tree: dict[str, Any], keys: Sequence[str], value: Any, model: type[BaseModel], inner: Mapping[str, type[BaseModel]]
) -> None:
    """Set one value in a tree and keep all others, including defaults that are not written in it."""
    branch: type[BaseModel] | None = model
    for depth, key in enumerate(keys[:-1], start=1):
        below = tree.get(key)
        if branch is not None and _is_mapping(branch, key) and key not in inner:
            below = _entries(branch, key, tree, keys[depth])
        elif isinstance(below, str):
            below = {"use": below}  # a name stands for a function or class without arguments
        elif below is None:
            below = {}
        if not isinstance(below, dict):
            raise UserError(
                f"'{'.'.join(keys[:depth])}' is {json.dumps(below)[:60]}, which holds no '{keys[depth]}'; "
                f"expected a mapping of settings."
            )
        tree[key] = below
        tree, branch = below, inner.get(key) or (_section(branch, key) if branch is not None else None)
    tree[keys[-1]] = value


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    field = model.model_fields.get(key)
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, Settings) else None


def _is_mapping(model: type[BaseModel], key: str) -> bool:
    field = model.model_fields.get(key)
    return field is not None and get_origin(field.annotation) is dict


def _entries(model: type[BaseModel], key: str, tree: Mapping[str, Any], changing: str) -> Any:
    """The entries in force of a mapping such as `rewards`: of the tree, the default ones, or both merged. The entry
    that is about to change is as in the tree, so that the change is merged with the default by the usual rules."""
    given, default = tree.get(key), _default(model, key, tree)
    if given is not None and not (isinstance(given, Mapping) and _is_merged(model, key, given)):
        return given
    known = {name: spec.model_dump() if isinstance(spec, Spec) else spec for name, spec in default.items()}
    return {**known, changing: {}, **(given or {})} if changing in known else {**known, **(given or {})}


# ---- defaults


def _default(model: type[BaseModel], key: str, tree: Mapping[str, Any]) -> Any:
    return model.default_of(key, tree) if issubclass(model, Settings) else model.model_fields[key].default


def _is_merged(model: type[BaseModel], key: str, given: Mapping[str, Any]) -> bool:
    """Whether a mapping is merged with the default: entries without `use` change the default ones."""
    of_specs = get_args(model.model_fields[key].annotation)[1] is Spec
    return of_specs and any(isinstance(spec, Mapping) and "use" not in spec for spec in given.values())


def _over_defaults(tree: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Merge single arguments such as `policy.dtype` into the default spec. A new `use` or `path` discards the default
    arguments, because those of the embedded model, such as full fine-tuning, do not suit another model."""
    merged = dict(tree)
    for name, field in model.model_fields.items():
        given, kind, default = tree.get(name), field.annotation, _default(model, name, tree)
        if kind in (Spec, Spec | None) and isinstance(given, str):
            merged[name] = {"use": given}
        elif not isinstance(given, Mapping):
            continue
        elif isinstance(kind, type) and issubclass(kind, Settings):
            below = default.model_dump(exclude_unset=True) if isinstance(default, kind) else {}
            merged[name] = _over_defaults({**below, **given}, kind)
        elif kind is Spec:
            merged[name] = over_spec(given, default)
        elif get_origin(kind) is dict and get_args(kind)[1] is Spec:
            merged[name] = dict(default) if _is_merged(model, name, given) else {}
            for key, spec in given.items():
                spec = {"use": spec} if isinstance(spec, str) else spec
                merged[name][key] = over_spec(spec, default.get(key)) if isinstance(spec, Mapping) else spec
    return merged


def over_spec(given: Mapping[str, Any], default: Spec | None) -> dict[str, Any]:
    """The given spec, with the arguments of the default where these still apply."""
    if default is None or ("use" in given and given["use"] != default.use):
        return dict(given)
    kept = default.model_dump()
    if "path" in given and given["path"] != kept.get("path"):
        return {"use": default.use, **given}
    return {**kept, **given}


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
