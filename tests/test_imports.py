"""Imports point downward only, and no policy or reward family imports its sibling. Read from the sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "customized_grpo"
ROOT = Path(__file__).parents[1] / "src" / PACKAGE

FLOORS = (
    *(
        "_version",
        "errors",
        "shell",
        "libraries",
        "moved",
        "stubs",
        "randomness",
        "structures",
        "functional",
        "distributed",
        "store",
    ),
    *("settings", "page", "toyworld", "sources", "data", "policies", "rewards", "trust", "train", "config"),
    *("check", "plan", "assemble", "studies", "cli", "__main__"),
)
"""The packages and modules of the library, lowest first. Each may import only those before it."""
TRAIN = (
    *(
        "settings",
        "prompts",
        "trajectory",
        "meters",
        "memory",
        "method",
        "rollout",
        "objectives",
        "sharding",
        "checkpoint",
    ),
    *("trackers", "evaluation", "grids", "update", "preflight", "trainer", "fitted"),
)
"""The modules of `train`, in the same order."""
STUDIES = {"report", "probe"}
"""What a study may import from `studies` besides its own package."""
HOMES = {"customized_grpo.settings.build", "customized_grpo.moved"}
"""Modules whose strings are no imports: the only resolver lists where bare names are looked up, and looks them up only
when a configuration asks for one."""
SHARED = {
    "rewards": {"contract", "client", "open_clip", "protocols"},
    "policies": {
        "contract",
        "settings",
        "lora",
        "lora_layer",
        "pipeline",
        "encodings",
        "tokens",
        "quantization",
        "mixed_precision",
    }
    | {"flux_model", "flux_names"},
}
"""What every file of a family may import from its folder."""

FILES = sorted(ROOT.rglob("*.py"))
GROUND = {"functional": {"functional"}, "store": {"store", "errors", "shell", "functional"}}
"""What the lowest packages may import; the others may import all floors below them."""


def module_name(file: Path, root: Path = ROOT) -> str:
    parts = (PACKAGE, *file.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file) for file in FILES}


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Modules of this package that anything in `source` names: imports, those for type checkers too, and strings that
    are an import path such as "package.module:name". The packages that a module lies in are not counted."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            found |= {name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and module not in HOMES:
            found |= {node.value.split(":")[0]} & MODULES
    around = {module.rsplit(".", n)[0] for n in range(module.count(".") + 1)}
    return {name for name in found if name.split(".")[0] == PACKAGE} - around


def room(module: str) -> str:
    """`customized_grpo.policies.flux` is in `policies`."""
    return [*module.split("."), ""][1]


def violations(module: str, imported: set[str]) -> list[str]:
    """What a module imports and must not."""
    own, part = room(module), room(module.partition(".")[2])
    if not own:  # the package itself names what it offers
        return []
    allowed = GROUND.get(own, {*FLOORS[: FLOORS.index(own) + 1]} - ({*SHARED} - {own} if own in SHARED else set()))
    bad = [name for name in imported if room(name) not in allowed]
    for name in imported:
        other = room(name.partition(".")[2])
        if room(name) != own or not part or not other or other == part:
            continue
        if (
            (own in SHARED and other not in SHARED[own] and (part, other) != ("copying", "dino"))
            or (own == "train" and TRAIN.index(other) >= TRAIN.index(part))
            or (own == "studies" and other not in STUDIES)
        ):
            bad.append(name)
    return bad


def circles(graph: dict[str, set[str]]) -> set[str]:
    """What remains after removing, again and again, all that imports nothing that remains or that nothing imports."""
    left = set(graph)
    while left:
        imported = set().union(*(graph[name] for name in left))
        kept = {name for name in left if graph[name] & left and name in imported}
        if kept == left:
            break
        left = kept
    return left


GRAPH = {
    module_name(file): imports(file.read_text(), module_name(file), is_package=file.name == "__init__.py")
    for file in FILES
}


@pytest.mark.parametrize("module", GRAPH)
def test_imports_point_downward(module):
    assert violations(module, GRAPH[module]) == []


def test_no_module_imports_itself_by_way_of_others():
    assert circles({module: names & MODULES for module, names in GRAPH.items()}) == set()


def test_a_circle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles(graph) == {"b", "c"}
    assert circles(graph | {"c": {"d"}}) == set()


@pytest.mark.parametrize(
    ("module", "source", "caught"),
    [
        ("customized_grpo.functional.sde", "from customized_grpo.structures import Rollout", True),
        ("customized_grpo.functional.sde", "from customized_grpo.functional import schedule", False),
        ("customized_grpo.functional.sde", "from .. import structures", True),
        ("customized_grpo.functional.sde", "from . import schedule\nimport torch", False),
        ("customized_grpo.store.folder", "from customized_grpo.errors import UserError", False),
        ("customized_grpo.store.folder", "from customized_grpo.settings import Settings", True),
        ("customized_grpo.store.scores", "from customized_grpo.functional import statistics", False),
        ("customized_grpo.train.rollout", "def f():\n    from customized_grpo.train import trainer", True),
        ("customized_grpo.train.rollout", "if TYPE_CHECKING:\n    import customized_grpo.train.trainer", True),
        ("customized_grpo.train.rollout", "use = 'customized_grpo.train.trainer:Trainer'", True),
        ("customized_grpo.train.rollout", "homes = {'x': ('customized_grpo.studies.compare.cells',)}", True),
        ("customized_grpo.train.rollout", "use = 'customized_grpo.functional.sde:cps'", False),
        ("customized_grpo.settings.build", "homes = {'x': ('customized_grpo.train.trainer',)}", False),
        ("customized_grpo.settings.build", "import customized_grpo.train.trainer", True),
        (
            "customized_grpo.train.preflight",
            "if TYPE_CHECKING:\n    from customized_grpo.train.trainer import Trainer",
            True,
        ),
        ("customized_grpo.train.trainer", "from customized_grpo.train.preflight import Summary", False),
        ("customized_grpo.studies.compare.page", "from customized_grpo.studies import bench", True),
        ("customized_grpo.studies.compare.page", "files('customized_grpo.studies.compare')", False),
        ("customized_grpo.rewards.dino", "from customized_grpo.rewards.contract import Reward", False),
        ("customized_grpo.rewards.dino", "from customized_grpo.rewards.clip import ClipReward", True),
        ("customized_grpo.rewards.dino", "from customized_grpo.policies.contract import Policy", True),
        ("customized_grpo.rewards.contract", "import customized_grpo.rewards.clip", True),
        ("customized_grpo.policies.flux", "from customized_grpo.policies import lora", False),
        ("customized_grpo.cli.main", "from customized_grpo.train.trainer import Trainer", False),
    ],
)
def test_the_rules_catch_what_they_should(module, source, caught):
    assert bool(violations(module, imports(source, module))) == caught


def test_every_room_named_here_exists():
    rooms = {room(module) for module in MODULES}
    assert rooms - {""} == {*FLOORS}
    assert {room(name.partition(".")[2]) for name in MODULES if room(name) == "train"} - {""} == {*TRAIN}
    assert HOMES <= MODULES


def test_the_package_does_not_import_the_tools_of_the_repository():
    assert [file for file in FILES if re.search(r"^\s*(from|import) tools\b", file.read_text(), re.M)] == []


@pytest.mark.parametrize(
    ("module", "more"),
    [("customized_grpo", ("numpy",)), ("customized_grpo.store", ("numpy",)), ("customized_grpo.store.run", ())],
)
def test_it_imports_no_heavy_library(module, more):
    """`import customized_grpo` is instant: torch and its friends load when first used."""
    heavy = ("torch", "diffusers", "transformers", "accelerate", "peft", "matplotlib", *more)
    code = f"import {module}, sys; print(*[name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
