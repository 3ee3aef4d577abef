"""Import paths of version 0.1.0, which resolve with a warning for one version."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "customized_grpo"
TRAIN = ("checkpoint", "evaluation", "fitted", "grids", "memory", "meters", "method", "preflight", "rollout", "trainer")
MOVED = {
    **{name: f"train.{name}" for name in (*TRAIN, "update")},
    **{name: f"studies.{name}" for name in ("bench", "compare", "probe", "report")},
    **{name: f"data.{name}" for name in ("images", "masks")},
    "build": "settings.build",
    "cli_data": "cli.data",
    "cli_rewards": "cli.rewards",
    "compare.measures": "rewards.copying",
    "display": "cli.display",
    "generation": "cli.generation",
    "http": "rewards.client",
    "mixed_precision": "policies.mixed_precision",
    "open_clip": "rewards.open_clip",
    "report.intervals": "store.scores",
    "report.page": "page",
    "report.plots": "page.plots",
    "report.record": "store.run",
    "scoring": "rewards.scoring",
    "terminal": "cli.terminal",
    "tracking": "train.trackers",
    "types": "structures",
}
"""Old to new name, without the package. Modules below a moved package move with it."""


def current(module: str) -> str | None:
    """The name that a module of this package has now, if it had another one before."""
    parts = module.split(".")
    for n in range(len(parts), 1, -1):
        if parts[0] == PACKAGE and ".".join(parts[1:n]) in MOVED:
            return ".".join([PACKAGE, MOVED[".".join(parts[1:n])], *parts[n:]])
    return None


class OldPaths(MetaPathFinder, Loader):
    """Finds a module of this package under the name that it had before."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if current(fullname) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = current(spec.name)
        assert new is not None
        warnings.warn(f"{spec.name} has moved to {new}; the old path will be removed.", FutureWarning, stacklevel=2)
        module = import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The module has run already. The import system has replaced its spec, which is restored here."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Resolve old paths from now on. First in line, because a moved package would find its modules a second time."""
    if not any(isinstance(finder, OldPaths) for finder in sys.meta_path):
        sys.meta_path.insert(0, OldPaths())
