"""Explain errors of libraries that do not work together, which are raised while they are imported."""

import os
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from types import FrameType, ModuleType

from customized_grpo.errors import UserError, chain
from customized_grpo.shell import program

KEPT = ("torch", "customized-grpo")
"""Distributions that the advice never upgrades: the build of torch depends on the machine."""


@contextmanager
def quiet_loading(*names: str) -> Iterator[None]:
    """Hide the progress bars and advice of diffusers or transformers inside the block, unless CGRPO_DEBUG is set."""
    logs = [] if os.environ.get("CGRPO_DEBUG") else [import_module(f"{name}.utils.logging") for name in names]
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    try:
        for log in logs:
            log.set_verbosity_error()
            log.disable_progress_bar()
        yield
    finally:
        for log, (verbosity, bars) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


def library_problem(error: BaseException) -> UserError | None:
    """The error to raise instead, if an installed library cannot be imported or cannot import another one."""
    for cause in reversed(list(chain(error))):  # libraries wrap such errors in errors of their own
        if isinstance(cause, ImportError | AttributeError | RuntimeError) and (importer := _importer(cause)):
            return UserError(_sentence(cause, importer))
    return None


def _importer(error: BaseException) -> str | None:
    """The distribution in whose code an import failed, or whose module was being imported when something else did."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [frame for frame in frames if frame.f_code.co_name == "<module>"]
    if isinstance(error, ImportError) and error.name:
        asking = [frame for frame in frames if not _module(frame).startswith("importlib")]
        if isinstance(error, ModuleNotFoundError):  # our functions import what the user names, and optional packages
            asking = [frame for frame in asking[-1:] if frame in modules or not _ours(frame)]
    else:
        asking = modules
    return _owner(asking[-1]) if asking else None


def _owner(frame: FrameType) -> str | None:
    """The distribution that a frame's code is installed by; None for the user's own code."""
    installed = {"site-packages", "dist-packages"} & set(Path(frame.f_code.co_filename).parts)
    return _distribution(_module(frame)) if installed or _ours(frame) else None


def _ours(frame: FrameType) -> bool:
    return _module(frame).startswith("customized_grpo.")


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "")


def _sentence(error: BaseException, importer: str) -> str:
    needed = _needed(error)
    other = _distribution(needed)
    said = re.sub(r" \(\S+\)$", "", " ".join(str(error).split()))[:200]  # without the path of a file
    if isinstance(error, ModuleNotFoundError) and other is None:
        return f"{_version(importer)} needs the module {needed}, which is missing; install the package that has it."
    both = [importer] if other in (None, importer) else [importer, str(other)]
    fault = f"does not work with {_version(both[1])}" if len(both) == 2 else "cannot be imported"
    upgraded = " ".join(name for name in both if name not in KEPT)
    advice = f"{program('pip')} install --upgrade {upgraded}" if upgraded else "install another version"
    return f"{_version(importer)} {fault} ({type(error).__name__}: {said}); {advice}."


def _needed(error: BaseException) -> str:
    """The module without which, or without a part of which, an import failed."""
    if isinstance(error, ImportError) and error.name:
        return error.name
    owner = getattr(error, "obj", None)  # of a missing attribute
    if owner is not None:
        return owner.__name__ if isinstance(owner, ModuleType) else getattr(owner, "__module__", "") or ""
    return _module([frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1])


def _distribution(module: str) -> str | None:
    """The name under which the package of a module is installed."""
    return next(iter(_installed().get(module.partition(".")[0], ())), None)


@cache
def _installed() -> Mapping[str, list[str]]:
    """The distributions that each top-level module belongs to."""
    return metadata.packages_distributions()


def _version(distribution: str) -> str:
    return f"{distribution} {metadata.version(distribution)}"
