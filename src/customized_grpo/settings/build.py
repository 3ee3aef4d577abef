"""Resolve a `Spec`, which names a function or class by import path with its arguments, to an object."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from customized_grpo.errors import UserError, nearest
from customized_grpo.settings import Spec

REWARDS = ("customized_grpo.rewards", "customized_grpo.toyworld.oracle", "customized_grpo.rewards.copying")
HOMES = {
    "advantage": ("customized_grpo.functional.advantages",),
    "time_weights": ("customized_grpo.functional.time_weights", "customized_grpo.train.fitted"),
    "dynamics": ("customized_grpo.functional.sde",),
    "steps": ("customized_grpo.functional.schedule",),
    "reward": REWARDS,
    "metric": REWARDS,
    "policy": ("customized_grpo.policies",),
    "dataset": ("customized_grpo.data", "customized_grpo.toyworld.dataset"),
    "optimizer": ("torch.optim",),
}
"""Modules in which a name without a module is looked up, by slot and in this order; only names in `__all__` count."""


def exported(use: str, slot: str) -> Any | None:
    """The object with this name if a default module of the slot exports it and its type fits the slot, else None.

    Only modules of this package and of torch are imported.
    """
    module, separator, name = use.partition(":")
    name = name if separator else use
    for path in HOMES[slot]:
        if separator and module != path and not module.startswith(f"{path}."):
            continue
        home = import_module(path)
        found = getattr(home, name) if name in home.__all__ else None
        if _fits(found, slot) and (not separator or _same(module, name, found)):
            return found
    return None


def _fits(found: Any, slot: str) -> bool:
    """Whether an object has the type that a slot requires."""
    if slot in ("reward", "metric"):
        return inspect.isclass(found) and "__call__" in dir(found) and not getattr(found, "_is_protocol", False)
    if slot == "policy":
        return inspect.isclass(found) and hasattr(found, "velocity") and not inspect.isabstract(found)
    if slot == "dataset":
        return inspect.isclass(found) and issubclass(found, Sequence)
    if slot == "optimizer":
        from torch.optim import Optimizer

        return inspect.isclass(found) and issubclass(found, Optimizer) and found is not Optimizer
    return inspect.isfunction(found)


def _same(module: str, name: str, found: Any) -> bool:
    """Whether another path, such as that of the defining module, leads to the same object."""
    try:
        return getattr(import_module(module), name, None) is found
    except ImportError:
        return False


def resolve(use: str, slot: str) -> Any:
    """Import the object named by `package.module:name`, or by a bare name in a default module of the slot.

    Raises:
        UserError: if the module or the name does not exist, suggesting the closest name.
    """
    if (found := exported(use, slot)) is not None:
        return found
    path, separator, name = use.partition(":")
    if not separator:
        known = [known for home in HOMES[slot] for known in import_module(home).__all__]
        raise UserError(f"{slot}: there is no '{use}' in {' or '.join(HOMES[slot])}.{nearest(use, known)}")
    module = _import(path, use, slot)
    if not hasattr(module, name):
        known = [n for n in dir(module) if not n.startswith("_") and callable(getattr(module, n))]
        raise UserError(f"{slot}: there is no '{name}' in {path}.{nearest(name, known)}")
    return getattr(module, name)


def _import(module: str, use: str, slot: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"{slot}: cannot import '{module}' for '{use}' ({error}); write package.module:name and make sure "
            f"that the package is installed, on PYTHONPATH, or a file in the current folder."
        ) from error
    except Exception as error:  # third-party code
        raise UserError(
            f"{slot}: importing '{module}' for '{use}' failed ({type(error).__name__}: {error}); "
            f"make sure that `python -c 'import {module}'` works."
        ) from error


def bind(spec: Spec, slot: str) -> Callable[..., Any]:
    """Bind the arguments of a spec to its function, after checking them against its signature."""
    function = check_spec(spec, slot)
    return partial(function, **spec.arguments) if spec.arguments else function


def construct(spec: Spec, slot: str, **extra: Any) -> Any:
    """Construct the object of a spec: call a class, through `from_pretrained` if it has one, or bind a function.
    `extra` arguments are passed if the signature has them and the spec does not set them."""
    from customized_grpo.randomness import seed_global  # which needs torch

    target = check_spec(spec, slot)
    if not inspect.isclass(target):
        return bind(spec, slot)
    accepted = set().union(*map(_parameters, _makers(target)))
    arguments = {k: v for k, v in extra.items() if k in accepted} | spec.arguments
    seed_global("construct", spec.use, extra.get("seed", 0))
    try:
        return _makers(target)[-1](**arguments)
    except UserError:
        raise
    except Exception as error:  # third-party code
        given = ", ".join(f"{name}={value!r}" for name, value in spec.arguments.items()) or "no settings"
        raise UserError(
            f"{slot}: {spec.use} could not be constructed with {given} ({type(error).__name__}: {error}); "
            f"check its settings, or use --debug."
        ) from error


def check_spec(spec: Spec, slot: str) -> Any:
    """Resolve a spec and check its arguments against the signature.

    Raises:
        UserError: if the name or an argument does not exist, suggesting the closest one.
    """
    target = resolve(spec.use, slot)
    makers = _makers(target)
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(makers[0]).parameters.values()):
        return target
    known = set().union(*map(_parameters, makers)) - {"self", "pipeline"}
    for name in spec.arguments:
        if name not in known:
            raise UserError(f"{slot}: {spec.use} takes no setting '{name}'.{nearest(name, known)}")
    return target


def _makers(target: Any) -> list[Callable[..., Any]]:
    """The class (or function) and, last, the callable that constructs the object."""
    return [target, target.from_pretrained] if hasattr(target, "from_pretrained") else [target]


def _parameters(function: Callable[..., Any]) -> set[str]:
    return {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
