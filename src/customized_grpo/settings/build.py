"""Resolve a `Spec`, which names a function or class by import path with its arguments, to an object."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from customized_grpo.errors import UserError, nearest
from customized_grpo.libraries import library_problem
from customized_grpo.settings import Spec, mistakes, sentence
from customized_grpo.store.yaml_text import missing_space

REWARDS = ("customized_grpo.rewards", "customized_grpo.toyworld.oracle", "customized_grpo.rewards.copying")
HOMES = {
    "advantage": ("customized_grpo.functional.advantages",),
    "time_weights": ("customized_grpo.functional.time_weights", "customized_grpo.train.fitted"),
    "credit": ("customized_grpo.functional.credit",),
    "dynamics": ("customized_grpo.functional.sde",),
    "steps": ("customized_grpo.functional.schedule",),
    "objective": ("customized_grpo.train.objectives.grpo", "customized_grpo.train.objectives.forward"),
    "reward": REWARDS,
    "metric": REWARDS,
    "policy": ("customized_grpo.policies",),
    "dataset": ("customized_grpo.data", "customized_grpo.toyworld.dataset"),
    "optimizer": ("torch.optim",),
}
"""Modules in which a name without a module is looked up, by slot and in this order; only names in `__all__` count."""

GIVEN = {"self", "params", "pipeline", "generator", "scored", "copies"}
"""Parameters that the caller passes and no configuration can set."""
MAY_BE_GIVEN = {"num_inference_steps", "seed", "sigma_max"}
"""Parameters that the caller passes if the configuration does not set them."""


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
    if slot == "objective":
        return inspect.isclass(found) and hasattr(found, "SETTINGS")
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


def resolve(use: str, slot: str, where: str = "") -> Any:
    """Import the object named by `package.module:name`, or by a bare name in a default module of the slot.

    Args:
        use: the name.
        slot: what the object is for.
        where: the setting that names it, for the error.

    Raises:
        UserError: if the module or the name does not exist, suggesting the closest name.
    """
    where = where or slot
    if (found := exported(use, slot)) is not None:
        return found
    path, name = split_name(use, slot, where)
    module = _import(path, use, where)
    if not hasattr(module, name):
        known = [n for n in dir(module) if not n.startswith("_") and callable(getattr(module, n))]
        raise UserError(f"{where}: there is no '{name}' in {path}.{nearest(name, known)}")
    return getattr(module, name)


def split_name(use: str, slot: str, where: str) -> tuple[str, str]:
    """Module and name of `package.module:name`, which is not imported.

    Raises:
        UserError: for a bare name, which the default modules of the slot do not have, or if it cannot be such a path.
    """
    path, separator, name = use.partition(":")
    if not separator:
        homes = [import_module(home) for home in HOMES[slot]]
        known = [known for home in homes for known in home.__all__ if _fits(getattr(home, known), slot)]
        hint = nearest(use, known) or f" Expected {', '.join(known)}, or package.module:name."
        raise UserError(f"{where}: there is no '{use[:80]}' in {' or '.join(HOMES[slot])}.{hint}")
    if path == "use" or not re.fullmatch(r"\w+(\.\w+)*:\w+", use):
        hint = missing_space(use) if path == "use" else ""
        raise UserError(f"{where}: '{use[:80]}' is no name; expected package.module:name{hint}.")
    return path, name


def check_unimported(use: str, slot: str, where: str) -> None:
    """Check a name outside this package as far as possible without running its code.

    Raises:
        UserError: as `resolve`, if there is no such package, or the module is imported already and has no such name.
    """
    path, _ = split_name(use, slot, where)
    if path in sys.modules or find_spec(path.partition(".")[0]) is None:
        resolve(use, slot, where)


def _import(module: str, use: str, where: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise library_problem(error) or UserError(
            f"{where}: cannot import '{module}' for '{use}' ({error}); write package.module:name and make sure "
            f"that the package is installed, on PYTHONPATH, or a file in the current folder."
        ) from error
    except Exception as error:  # third-party code
        raise library_problem(error) or UserError(
            f"{where}: importing '{module}' for '{use}' failed ({type(error).__name__}: {error}); "
            f"make sure that `python -c 'import {module}'` works."
        ) from error


def bind(spec: Spec, slot: str, where: str = "") -> Callable[..., Any]:
    """Bind the arguments of a spec to its function, after `check_spec`."""
    function = check_spec(spec, slot, where)
    return partial(function, **spec.arguments) if spec.arguments else function


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """Begin the message of a UserError with the setting, unless it already does."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(setting.split()[0]):
            raise
        raise UserError(f"{setting}: {error}") from error


@contextmanager
def named_after(setting: str) -> Iterator[None]:
    """`naming` for third-party functions, whose exceptions become UserErrors too."""
    with naming(setting):
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
            raise UserError(f"{setting} cannot be computed with these settings: {kind}{error}") from error


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
        raise library_problem(error) or UserError(
            f"{slot}: {spec.use} could not be constructed with {given} ({type(error).__name__}: {error}); "
            f"check its settings, or use --debug."
        ) from error


def check_spec(spec: Spec, slot: str, where: str = "") -> Any:
    """Resolve a spec and check its arguments against the signature, without constructing the object.

    For objects of this package and of torch, the types of the arguments are checked too.

    Args:
        spec: the name and its arguments.
        slot: what it is for.
        where: the setting that holds it, for the error.

    Raises:
        UserError: if the name or an argument does not exist, suggesting the closest one, or an argument is missing or
            wrong.
    """
    where = where or slot
    target = resolve(spec.use, slot, where)
    makers = _makers(target)
    try:
        inspect.signature(target)
    except (TypeError, ValueError):  # no function, or one that is not written in Python
        raise UserError(f"{where}: {spec.use} takes no settings; expected a function or class of Python.") from None
    open_ended = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(makers[0]).parameters.values())
    known = {name: p for maker in makers for name, p in _parameters(maker).items() if _is_setting(p, target)}
    settings = getattr(target, "SETTINGS", None)  # of an objective
    names = settings.model_fields if settings else known
    for name in spec.arguments:
        if name not in names and not open_ended:
            hint = nearest(name, names) or f" It takes {', '.join(names) or 'none'}."
            raise UserError(f"{where}: {spec.use} takes no setting '{name}'.{hint}")
    if settings:
        return target  # which checks their values
    for name, parameter in _parameters(makers[-1]).items():
        required = _is_setting(parameter, target) and parameter.default is parameter.empty and name not in MAY_BE_GIVEN
        if required and name not in spec.arguments:
            raise UserError(f"The setting '{where}.{name}' is missing; {spec.use} needs it.")
    if exported(spec.use, slot) is not None:
        _check_types(spec.arguments, known, where)
    return target


def _check_types(given: Mapping[str, Any], known: Mapping[str, inspect.Parameter], where: str) -> None:
    for name, value in given.items():
        parameter = known.get(name)
        if parameter is None or isinstance(parameter.annotation, str) or value is parameter.default is None:
            continue
        if found := mistakes(value, parameter.annotation):
            raise UserError(sentence(found, value, parameter.annotation, f"{where}.{name}"))


def _is_setting(parameter: inspect.Parameter, target: Any) -> bool:
    """Whether a configuration may set a parameter. The caller passes those in `GIVEN`, and the parameters of a function
    that have no default."""
    for_caller = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    return parameter.name not in GIVEN and (inspect.isclass(target) or not for_caller)


def arguments(target: Any, spec: Spec) -> dict[str, Any]:
    """The arguments of a spec, and the defaults of those that it does not set."""
    defaults = {name: p.default for maker in _makers(target) for name, p in _parameters(maker).items()}
    given = {**defaults, **spec.arguments}
    return {name: value for name, value in given.items() if value is not inspect.Parameter.empty}


def _makers(target: Any) -> list[Callable[..., Any]]:
    """The class (or function) and, last, the callable that constructs the object."""
    return [target, target.from_pretrained] if hasattr(target, "from_pretrained") else [target]


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
