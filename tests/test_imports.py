"""The direction of dependencies, read from the sources: downward only, and no family knows its sibling."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "customized_grpo"
ROOT = Path(__file__).parents[1] / "src" / PACKAGE

TOP = {
    *(
        "build",
        "config",
        "method",
        "update",
        "preflight",
        "trainer",
        "assemble",
        "generation",
        "display",
        "terminal",
        "benchmark",
    ),
    *("bench", "compare", "probe", "cli", "cli_data", "cli_rewards", "__main__"),
}
"""The rooms that put the others together: only they import each other. A room that is not named here is below."""
NESTED_SPECS = {("data", "build")}
"""Rooms whose settings hold names to resolve, and so ask the only resolver."""
SHARED = {
    "rewards": {"contract"},
    "policies": {"contract", "lora", "pipeline", "encodings", "tokens", "flux_model", "flux_names", "quantization"},
}
"""What every file of a family may import from its folder."""

FILES = sorted(ROOT.rglob("*.py"))


def module_name(file: Path, root: Path = ROOT) -> str:
    parts = (PACKAGE, *file.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file) for file in FILES}


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Modules of this package that run-time imports anywhere in `source` name; type-checking blocks are skipped."""
    found = set()
    for node in _runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            found |= {name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return {name for name in found if name.split(".")[0] == PACKAGE}


def _runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from _runtime_nodes(child)


def room(module: str) -> str:
    """`customized_grpo.policies.flux` is in `policies`."""
    return [*module.split("."), ""][1]


def violations(module: str, imported: set[str]) -> list[str]:
    """What a module imports and must not."""
    own = room(module)
    bad = [name for name in imported if own == "functional" and room(name) != "functional"]
    if own not in TOP:
        bad += [name for name in imported if room(name) in TOP and (own, room(name)) not in NESTED_SPECS]
    if own in SHARED:
        bad += [name for name in imported if room(name) in SHARED.keys() - {own}]
        family = module.split(".")[2:3]
        allowed = SHARED[own] | set(family)
        bad += [name for name in imported if room(name) == own and not set(name.split(".")[2:3]) <= allowed]
    return bad


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_point_downward(file):
    module = module_name(file)
    imported = imports(file.read_text(), module, is_package=file.name == "__init__.py")
    assert violations(module, imported) == []


@pytest.mark.parametrize(
    ("module", "source", "caught"),
    [
        ("customized_grpo.functional.sde", "from customized_grpo.types import Rollout", True),
        ("customized_grpo.functional.sde", "from customized_grpo.functional import schedule", False),
        ("customized_grpo.functional.sde", "from .. import types", True),
        ("customized_grpo.functional.sde", "from . import schedule\nimport torch", False),
        ("customized_grpo.rollout", "def f():\n    from customized_grpo import trainer", True),
        ("customized_grpo.rollout", "if TYPE_CHECKING:\n    import customized_grpo.trainer", False),
        ("customized_grpo.rewards.dino", "from customized_grpo.rewards.contract import Reward", False),
        ("customized_grpo.rewards.dino", "from customized_grpo.rewards.clip import ClipReward", True),
        ("customized_grpo.rewards.dino", "from customized_grpo.policies.contract import Policy", True),
        ("customized_grpo.rewards.contract", "import customized_grpo.rewards.clip", True),
        ("customized_grpo.policies.flux", "from customized_grpo.policies import lora", False),
        ("customized_grpo.cli", "from customized_grpo.trainer import Trainer", False),
    ],
)
def test_the_rules_catch_what_they_should(module, source, caught):
    assert bool(violations(module, imports(source, module))) == caught


def test_every_room_named_here_exists():
    rooms = {room(module) for module in MODULES}
    assert SHARED.keys() | {"functional", "build", "config", "trainer"} <= rooms


def test_the_package_imports_no_heavy_library():
    """`import customized_grpo` is instant: torch and its friends load when first used."""
    heavy = ("torch", "diffusers", "transformers", "accelerate", "peft", "matplotlib", "numpy")
    code = f"import customized_grpo, sys; print(*[name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
