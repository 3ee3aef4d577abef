"""Names to objects: the only resolver. A `Spec` names a function or class by import path, with its arguments."""

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from customized_grpo.errors import UserError, nearest
from customized_grpo.settings import Spec

HOMES = {
    "advantage": "customized_grpo.functional.advantages",
    "time_weights": "customized_grpo.functional.time_weights",
    "dynamics": "customized_grpo.functional.sde",
    "steps": "customized_grpo.functional.schedule",
    "reward": "customized_grpo.rewards",
    "metric": "customized_grpo.rewards",
    "policy": "customized_grpo.policies",
    "dataset": "customized_grpo.data",
    "optimizer": "torch.optim",
}
"""Where a name without a module is looked up, by slot."""


def resolve(use: str, slot: str) -> Any:
    """The object that `package.module:name`, or a bare name in the slot's home module, stands for.

    Raises:
        UserError: if the module or the name does not exist, with the nearest name there is.
    """
    module_name, separator, name = use.partition(":")
    if not separator:
        module_name, name = HOMES[slot], use
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{slot}: cannot import '{module_name}' for '{use}' ({error}); "
            f"write package.module:name and see that the package is installed or on PYTHONPATH."
        ) from error
    if not hasattr(module, name):
        known = [n for n in dir(module) if not n.startswith("_") and callable(getattr(module, n))]
        raise UserError(f"{slot}: there is no '{name}' in {module_name}.{nearest(name, known)}")
    return getattr(module, name)


def bind(spec: Spec, slot: str) -> Callable[..., Any]:
    """A function with the arguments of its spec bound, checked against its signature."""
    function = resolve(spec.use, slot)
    _check_arguments(function, spec, slot)
    return partial(function, **spec.arguments) if spec.arguments else function


def construct(spec: Spec, slot: str, **extra: Any) -> Any:
    """An object: a class is called with the spec's arguments, through `from_pretrained` if it has one; a function is
    bound. `extra` arguments are passed where the signature takes them and the spec does not say otherwise."""
    target = resolve(spec.use, slot)
    if not inspect.isclass(target):
        return bind(spec, slot)
    maker = getattr(target, "from_pretrained", target)
    _check_arguments(target, spec, slot, also=maker)
    accepted = _parameters(target) | _parameters(maker)
    arguments = {k: v for k, v in extra.items() if k in accepted} | spec.arguments
    return maker(**arguments)


def _parameters(function: Callable[..., Any]) -> set[str]:
    return {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def _check_arguments(
    function: Callable[..., Any], spec: Spec, slot: str, also: Callable[..., Any] | None = None
) -> None:
    makers = [function] if also is None else [function, also]
    if any(
        p.kind is p.VAR_KEYWORD for maker in makers for p in inspect.signature(maker).parameters.values()
    ) and len(makers) == 1:  # fmt: skip
        return
    known = set().union(*(_parameters(maker) for maker in makers)) - {"self"}
    for name in spec.arguments:
        if name not in known:
            raise UserError(f"{slot}: {spec.use} takes no setting '{name}'.{nearest(name, known)}")
