"""What makes two runs the same, and what a resumed run may change.

Every setting declares its `Role` in its annotation. Arguments of a spec have the role of their setting, except those
that the function or class lists in an attribute `RUNTIME`, such as the device and the batch size of a reward.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from customized_grpo.build import resolve
from customized_grpo.config import TrainerConfig, parse_config, read_yaml
from customized_grpo.errors import UserError
from customized_grpo.settings import Role, Settings, Spec

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


def role_of(name: str, config: Settings) -> Role:
    """The role of one of the names in `flatten(config)`.

    Raises:
        UserError: if the spec that the name belongs to cannot be imported.
    """
    setting, role = next((s, r) for s, r in declared_roles(type(config)).items() if f"{name}.".startswith(f"{s}."))
    value: Any = config
    for part in setting.split("."):
        value = getattr(value, part)
    inner = name.removeprefix(setting).strip(".").split(".")
    if isinstance(value, dict):
        value, inner = value.get(inner[0]), inner[1:]
    if not isinstance(value, Spec) or inner[:1] == ["use"]:
        return Role.KEPT if role is Role.ARGUMENTS else role
    slot = setting.rpartition(".")[2]
    if inner and inner[0] in getattr(resolve(value.use, SLOTS.get(slot, slot)), "RUNTIME", ()):
        return Role.RUNTIME
    return Role.APPLIED if role is Role.ARGUMENTS else role


def differences(before: BaseModel, after: BaseModel) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, by dotted name: the value before (None if it was not set) and after."""
    old, new = flatten(before), flatten(after)
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def changes_on_resume(checkpoint: Path, config: TrainerConfig) -> Mapping[str, tuple[Any, Any]]:
    """The settings that differ from those that a checkpoint was trained with.

    Args:
        checkpoint: its folder, which holds the configuration in force when it was written.
        config: what the resumed run is to use.

    Raises:
        UserError: if one of them cannot change in a resumed run.
    """
    known = read_yaml(checkpoint / "config.yaml")
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
