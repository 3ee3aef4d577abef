"""Environments for rewards whose packages conflict with those of this package: what is installed, and how to use it."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from customized_grpo.errors import UserError, nearest
from customized_grpo.store.yaml_text import read_yaml


@dataclass(frozen=True)
class Environment:
    """What a reward needs, and what to know before it is installed."""

    requirements: Sequence[str]
    licence: str
    weights: str
    """What is downloaded when it first runs, and its size."""
    memory: str
    """Of a GPU, computed from the number of parameters."""
    use: str
    """How it is started or named in a configuration; {folder} is where it was installed."""
    python: str = "3.11"
    repository: Sequence[str] | None = None
    """Address and commit of code without a package. Its folder is put on the environment's import path."""


ENVIRONMENTS = {name: Environment(**fields) for name, fields in read_yaml(Path(__file__).with_suffix(".yaml")).items()}
"""By the name that `cgrpo rewards install` takes."""


def commands(environment: Environment, folder: Path) -> list[list[str]]:
    """What makes the environment in `folder`, in order: by uv where it is installed, else by venv and pip.

    Raises:
        UserError: if there is no Python of its version, or no pip.
    """
    python, uv = folder / "bin" / "python", shutil.which("uv")
    if uv is not None:
        made = [uv, "venv", "--python", environment.python, str(folder)]
        install = [uv, "pip", "install", "--python", str(python)]
    else:
        made = [_interpreter(environment.python), "-m", "venv", "--without-pip", str(folder)]
        install = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    steps = [made, [*install, *environment.requirements]]
    if environment.repository is not None:
        address, commit = environment.repository
        source = str(folder / "source")
        steps += [["git", "clone", "--quiet", "--no-checkout", address, source]]
        steps += [["git", "-C", source, "checkout", "--quiet", commit]]
    return steps


def _interpreter(version: str) -> str:
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    if found := shutil.which(f"python{version}"):
        return found
    raise UserError(
        f"This environment needs Python {version}, and neither uv nor python{version} was found; install one."
    )


def environment_named(name: str) -> Environment:
    """The environment of that name.

    Raises:
        UserError: if there is none.
    """
    if name not in ENVIRONMENTS:
        known = ", ".join(ENVIRONMENTS)
        raise UserError(f"There is no environment for '{name}', only for {known}.{nearest(name, ENVIRONMENTS)}")
    return ENVIRONMENTS[name]


def install(environment: Environment, folder: Path) -> None:
    """Make an environment. A folder that could not be finished is removed.

    Raises:
        UserError: if the folder exists, or with the command that failed.
    """
    if folder.exists():
        raise UserError(f"The folder {folder} exists already; remove it or choose another with --folder.")
    steps = commands(environment, folder)
    try:
        for step in steps:
            _run(step)
        if environment.repository is not None:
            packages = next(folder.glob("lib/python*/site-packages"))
            (packages / "source.pth").write_text(f"{folder / 'source'}\n")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, check=False)
    except OSError as error:
        raise UserError(f"`{command[0]}` could not be started ({error}); install it, then try again.") from error
    if done.returncode:
        raise UserError(f"`{' '.join(command)}` failed with status {done.returncode}; its messages are above.")
