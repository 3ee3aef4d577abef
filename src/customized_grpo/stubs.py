"""Names of a package that are listed once, in its stub, and imported when they are first used."""

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, as in SPEC 1 of Scientific Python.

    Args:
        package: its `__name__`.
        file: its `__file__`. `__init__.pyi` beside it has lines such as `from .clip import ClipReward as ClipReward`.
    """
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    lines = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: f".{node.module}" for node in lines for alias in node.names}

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(import_module(homes[name], package), name)
        except Exception as error:  # Python takes an AttributeError for a missing name, and drops its reason
            from customized_grpo.libraries import library_problem

            if (problem := library_problem(error)) is None:
                raise
            raise problem from error

    return load, lambda: list(homes), list(homes)
