"""Commands for the user to type. This environment may not be on PATH."""

import os
import shlex
import shutil
import sys
from importlib import metadata
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
"""The folder of pyproject.toml, if the package is used from a checkout."""


def program(name: str = "cgrpo") -> str:
    """How to call a program of this environment: by its name if the shell finds it, else by its path."""
    folders = (Path(sys.argv[0]).parent, Path(sys.executable).parent)
    own = shutil.which(name, path=os.pathsep.join(map(str, folders)))
    if own is None:
        return f"{shlex.quote(sys.executable)} -m customized_grpo" if name == "cgrpo" else name
    found = shutil.which(name)
    if found is not None and Path(found).samefile(own):
        return name
    path, here = Path(own).absolute(), Path.cwd()
    return shlex.quote(str(path.relative_to(here) if here in path.parents[1:] else path))


def command(*words: object) -> str:
    """A `cgrpo` command to type, with its words quoted."""
    return f"{program()} {shlex.join(map(str, words))}"


def install(extra: str) -> str:
    """The command that installs an extra of this package, which is on no index."""
    if (CHECKOUT / "pyproject.toml").is_file():
        place = "." if Path.cwd() == CHECKOUT else CHECKOUT
        return f"{program('pip')} install -e '{place}[{extra}]'"
    lines = [line.partition(";") for line in metadata.requires("customized-grpo") or ()]
    needed = [name.strip() for name, _, when in lines if f'extra == "{extra}"' in when]
    return f"{program('pip')} install {shlex.join(needed)}"
