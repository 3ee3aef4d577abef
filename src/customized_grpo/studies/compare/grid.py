"""A grid of methods x seeds from one YAML file: its runs, and checks that they can be compared."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field

from customized_grpo import trust
from customized_grpo.check import Data, check_config
from customized_grpo.config import Config, load_config
from customized_grpo.errors import UserError
from customized_grpo.settings import Settings, identity
from customized_grpo.settings.build import bind
from customized_grpo.settings.parse import load_settings, parse_config, read_tree
from customized_grpo.store import Folder
from customized_grpo.store.run import RunFolder
from customized_grpo.studies.compare.methods import BASE, Method, find_method, merged
from customized_grpo.train.settings import ForwardSettings


class Grid(Settings):
    """What to compare."""

    config: dict[str, Any] = Field(default={})
    """The configuration that all runs share, as for `cgrpo train`, with the parts of `method` that no method sets."""
    methods: tuple[str, ...] = ("naive_1to1", "naive_1to1.5", "customized")
    """Names from methods.yaml or `own_methods`. The base policy is always measured."""
    own_methods: dict[str, Method] = Field(default={})
    """More methods: name to {title, about, config}. A known name changes that method."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of training: prompts, noise and order. Methods pair seed by seed."""
    baseline: str = "naive_1to1"
    """The method that the others have to beat."""
    candidate: str = "customized"
    """The method under test."""
    line: tuple[str, str] | None = None
    """Two methods that differ in constant weights alone. The straight line through them is the trade-off that constant
    weights reach; a method beyond it is better, and does not only weight the rewards differently."""
    checks: dict[str, str] = Field(default={"prompt": "oracle_prompt", "identity": "oracle_subject"})
    """Reward to its held-out proxy, a metric that measures the same and is not trained on: the gap between their gains
    is reward hacking. Pairs whose names are not measured do not count."""
    lower_is_better: tuple[str, ...] = ("background_copied", "pose_copied")
    """Metrics of which less is better."""
    pictures: int = Field(default=6, ge=0)
    """Tasks whose images are shown in the report."""
    probe: Path | None = None
    """Folder of a `cgrpo probe` of the base policy, to show in the report when each reward is decided."""


class GridFolder(Folder):
    """GRID/: compare.yaml, compare.json, base/, cells/METHOD/seed-N/, logs/, report.html, plots/."""

    KIND, MARKER, INFO, COMMAND = "comparison", "compare.yaml", "compare.json", "compare"


@dataclass(frozen=True)
class Cell:
    """One run of the grid, or the evaluation of the base policy that all runs start from."""

    method: str
    seed: int
    config: Config
    root: Path
    """The folder of the comparison."""

    @property
    def name(self) -> str:
        return BASE if self.method == BASE else f"{self.method}/seed-{self.seed}"

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.root / BASE if self.method == BASE else self.root / "cells" / self.name)

    @property
    def evaluation(self) -> Path:
        """The evaluation at its end."""
        if self.method == BASE:
            return self.run.path / "iteration-000000.json"
        return self.run.evaluation(self.config.training.iterations)

    @property
    def log(self) -> Path:
        return self.root / "logs" / f"{self.name.replace('/', '-')}.log"


def load_grid(path: str | Path, overrides: Sequence[str] = ()) -> Grid:
    """Read a grid's YAML, with `seeds=[0]` or `config.training.iterations=5` on top.

    Raises:
        UserError: for an unknown key or method (with the nearest), a repeated seed, or a wrong type.
    """
    grid = load_settings(Grid, path, overrides, inner={"config": Config})
    for name, values in (("seeds", grid.seeds), ("methods", grid.methods), ("line", grid.line or (None,))):
        if not values:
            raise UserError(f"{name} is empty; list at least one.")
        if twice := [value for n, value in enumerate(values) if value in values[:n]]:
            raise UserError(f"{name} lists {twice[0]} twice; list each of them once.")
    for name in (*grid.methods, grid.baseline, grid.candidate, *(grid.line or ())):
        find_method(name, grid.own_methods)
        if not re.fullmatch(r"\w[\w.+-]{0,99}", name):
            raise UserError(
                f"The method '{name[:40]}' gives its name to a folder; use up to 100 letters, digits, _, ., + and -."
            )
    for key in ("seed", "output"):
        if key in grid.config:
            raise UserError(f"config.{key} is set by the grid for each run; take it out.")
    return grid


def open_grid(folder: Path, overrides: Sequence[str] = ()) -> Grid:
    """The grid of a comparison's folder, which someone else may have made. Nothing that it names is imported.

    Raises:
        UserError: as `load_grid`, or if the folder is no comparison.
    """
    file = GridFolder.existing(folder).path / GridFolder.MARKER
    read_tree(file, stored=True)
    return load_grid(file, overrides)


def cells(grid: Grid, root: Path) -> list[Cell]:
    """The base policy, then all runs: one seed of every method after the other, so that an unfinished grid has whole
    seeds.

    Raises:
        UserError: if a configuration is wrong.
    """
    found = [Cell(BASE, 0, parse_config({**grid.config, "output": str(root / BASE)}, Config), root)]
    if found[0].config.evaluation.examples == 0:
        raise UserError("config.evaluation.examples is 0, so nothing would be measured; set it above 0.")
    base = {"base": str(found[0].evaluation.resolve())}
    for seed, name in product(grid.seeds, (name for name in grid.methods if name != BASE)):
        own = {"seed": seed, "output": str(root / "cells" / name / f"seed-{seed}"), "evaluation": base}
        tree = merged(merged(grid.config, find_method(name, grid.own_methods).config), own)
        try:
            found.append(Cell(name, seed, parse_config(tree, Config), root))
        except UserError as error:
            raise UserError(f"The method '{name}': {error}") from error
    return found


def of_each_method(made: Sequence[Cell]) -> Sequence[Cell]:
    """The first cell of every method, beginning with the base policy."""
    return made[: len({cell.method for cell in made})]


def trust_needed(made: Sequence[Cell]) -> list[frozenset[trust.Item]]:
    """What needs trust to run each of the methods."""
    return [trust.items(cell.config.specs()) for cell in of_each_method(made)]


def check_runnable(made: Sequence[Cell]) -> None:
    """Raise UserError for a method that cannot be run or compared, before hours are spent on the others.

    Data that several methods share is read once.
    """
    base, *methods = of_each_method(made)
    read: dict[str, Data] = {}
    for cell in methods:
        try:
            key = cell.config.data.model_dump_json()
            checked = check_config(cell.config, new=False, data=read.get(key))
            if checked.train is not None:
                read[key] = checked.train, checked.held_out
        except UserError as error:
            raise UserError(f"The method '{cell.method}': {error}") from error
        check_comparable(base, cell)


def budget(config: Config) -> str:
    """Images and optimizer steps of a whole run, in words."""
    import torch

    training, rollout = config.training, config.rollout
    trained, draw = config.objective.arguments.get("levels", ForwardSettings().levels), torch.Generator().manual_seed(0)
    if rollout.steps is not None:
        trained = len(bind(rollout.steps, "steps")(0, rollout.num_inference_steps, generator=draw).trained)
    images = training.iterations * training.prompts_per_iteration * rollout.num_generations
    steps = training.iterations * training.inner_epochs * min(training.updates_per_epoch, trained)
    return f"{images:,} images, {steps:,} gradient steps"


PAIRED = ("policy.", "rewards.", "metrics.", "data.", "evaluation.")
"""Settings that must be equal in all cells for their scores to pair: base policy, data, what is measured and how."""


def check_comparable(one: Cell, other: Cell) -> None:
    """Raise UserError unless two runs start from one policy, are measured alike and spend the same."""
    for difference in differences(other.config, one.config):
        if difference.startswith(PAIRED):
            raise UserError(
                f"'{one.name}' and '{other.name}' differ in {difference}, so their scores do not pair; compare runs "
                f"that share it."
            )
    if (spent := budget(one.config)) != (found := budget(other.config)):
        raise UserError(f"'{one.name}' spends {spent}, '{other.name}' {found}; give every method the same budget.")


def check_same(cell: Cell) -> None:
    """Raise UserError if the run on disk is not the one that the grid asks for."""
    folder = cell.run.path
    try:
        differ = differences(cell.config, load_config(cell.run.config))
    except UserError as error:
        raise UserError(f"The run in '{folder}' cannot be read ({error}); move that folder away.") from error
    if differ:
        more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
        raise UserError(
            f"The run in '{folder}' is not of this grid: {differ[0]}{more}; name another --output, or move that folder "
            f"away."
        )


def differences(expected: Config, found: Config) -> list[str]:
    """The settings in which the result of a run differs from what the grid asks for, as `section.setting a -> b`.

    Code that the user does not trust is not imported to ask which arguments change the result.
    """
    named = trust.items(expected.specs())
    changed = identity.result_differences(found, expected, foreign=not named or trust.is_trusted(named))
    changed.pop("evaluation.base", None)  # only a place
    shown = {key: [json.dumps(value)[:100] for value in pair] for key, pair in changed.items()}
    return [f"{key} {before} -> {after}" for key, (before, after) in shown.items()]
