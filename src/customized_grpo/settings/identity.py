"""Which settings identify a run or study, and which ones a resumed run may change.

Every setting declares its `Role` in its annotation. Arguments of a spec have the role of their setting, except those
that the function or class lists in an attribute `RUNTIME`, such as the device and the batch size of a reward.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from customized_grpo.errors import UserError
from customized_grpo.settings import Role, Settings, Spec
from customized_grpo.settings.build import exported, resolve
from customized_grpo.settings.parse import parse_config, read_tree

SLOTS = {"rewards": "reward", "metrics": "metric", "train": "dataset", "eval": "dataset"}
"""The slot of a spec, where it is not the name of its setting."""


def flatten(config: BaseModel) -> dict[str, Any]:
    """Every setting, down to the arguments of specs, as plain data by its dotted name."""
    return _flat(json.loads(config.model_dump_json()))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat


def declared_roles(model: type[Settings], prefix: str = "") -> dict[str, Role]:
    """The role of every setting by its dotted name, as its annotation declares it.

    Raises:
        TypeError: for a setting that declares none.
    """
    roles: dict[str, Role] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            roles |= declared_roles(field.annotation, f"{prefix}{name}.")
            continue
        declared = [item for item in field.metadata if isinstance(item, Role)]
        if len(declared) != 1:
            raise TypeError(f"{prefix}{name} declares {len(declared)} roles; annotate it as Annotated[..., Role...].")
        roles[prefix + name] = declared[0]
    return roles


def setting_of(name: str, model: type[Settings]) -> tuple[str, Role]:
    """The setting that one of the names in `flatten(config)` belongs to, and the role that it declares."""
    return next((s, role) for s, role in declared_roles(model).items() if f"{name}.".startswith(f"{s}."))


def runtime_arguments(spec: Spec, slot: str, *, foreign: bool = True) -> Collection[str]:
    """The arguments of a spec that do not change the result.

    Args:
        foreign: whether to import code from outside this package. If not, all its arguments count.

    Raises:
        UserError: if the spec cannot be imported.
    """
    return getattr((resolve if foreign else exported)(spec.use, slot), "RUNTIME", ())


def same_result(before: Spec, after: Spec, slot: str, *, foreign: bool = True) -> bool:
    """Whether two specs differ at most in arguments that do not change the result. `foreign` as in
    `runtime_arguments`."""
    free = runtime_arguments(after, slot, foreign=foreign)
    one, other = ({k: v for k, v in spec.model_dump().items() if k not in free} for spec in (before, after))
    return one == other


def role_of(name: str, config: Settings, *, foreign: bool = True) -> Role:
    """The role of one of the names in `flatten(config)`. `foreign` and errors as in `runtime_arguments`."""
    setting, role = setting_of(name, type(config))
    value: Any = config
    for part in setting.split("."):
        value = getattr(value, part)
    inner = name.removeprefix(setting).strip(".").split(".")
    if isinstance(value, dict):
        value, inner = value.get(inner[0]), inner[1:]
    if not isinstance(value, Spec) or inner[:1] == ["use"]:
        return Role.KEPT if role is Role.ARGUMENTS else role
    slot = setting.rpartition(".")[2]
    if inner and inner[0] in runtime_arguments(value, SLOTS.get(slot, slot), foreign=foreign):
        return Role.RUNTIME
    return Role.APPLIED if role is Role.ARGUMENTS else role


def differences(before: BaseModel, after: BaseModel) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, by dotted name: the value before (None if it was not set) and after."""
    old, new = flatten(before), flatten(after)
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def result_settings(config: Settings) -> dict[str, Any]:
    """`flatten(config)` without the settings that do not change the result."""
    return {name: value for name, value in flatten(config).items() if role_of(name, config) is not Role.RUNTIME}


def result_differences(before: Settings, after: Settings, *, foreign: bool = True) -> dict[str, tuple[Any, Any]]:
    """`differences` without the settings that do not change the result. `foreign` as in `runtime_arguments`."""
    changed = differences(before, after).items()
    return {name: pair for name, pair in changed if role_of(name, after, foreign=foreign) is not Role.RUNTIME}


def overrides(before: Settings, after: Settings) -> dict[str, str]:
    """Every setting that differs, with its new value as an override. Specs are written in full, so that arguments which
    are no longer set are removed."""
    values = {}
    for setting, _ in (setting_of(name, type(after)) for name in differences(before, after)):
        value: Any = json.loads(after.model_dump_json())
        for part in setting.split("."):
            value = value[part]
        values[setting] = json.dumps(value)
    return values


def changes_on_resume(checkpoint: Path, config: Settings) -> Mapping[str, tuple[Any, Any]]:
    """The settings that differ from those that a checkpoint was trained with.

    Args:
        checkpoint: its folder, which holds the configuration in force when it was written.
        config: the settings of the resumed run.

    Raises:
        UserError: if one of them cannot change in a resumed run.
    """
    known = read_tree(checkpoint / "config.yaml", stored=True)
    before = parse_config({k: v for k, v in known.items() if k in type(config).model_fields}, type(config))
    changed = differences(before, config)
    refused = next((name for name in changed if role_of(name, config) is Role.KEPT), None)
    if refused is not None:
        old, new = (json.dumps(value) for value in changed[refused])
        raise UserError(
            f"The run was trained with {refused} = {old}, and a resumed run cannot change it to {new}; set it to {old} "
            f"again, or start a new run in another output."
        )
    columns, now = (list(getattr(some, "rewards", ())) for some in (before, config))
    if columns != now:
        raise UserError(
            f"The run was trained with its rewards in the order {', '.join(columns)}, not {', '.join(now)}; keep that "
            f"order, or start a new run in another output."
        )
    return changed
