"""A grid of methods x seeds from one YAML: which runs it has, and that they can be compared."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from customized_grpo import trust
from customized_grpo.config import Config, check_names
from customized_grpo.errors import UserError
from customized_grpo.settings import Settings, Spec
from customized_grpo.settings.build import bind, resolve
from customized_grpo.settings.identity import result_differences
from customized_grpo.settings.parse import load_settings, parse_config
from customized_grpo.studies.compare.methods import BASE, Method, find_method, merged

GIVEN_BY_THE_TRAINER = {"progress", "generator", "num_inference_steps"}
"""Parameters of time weights that no configuration has to set."""


class Grid(Settings):
    """What to compare."""

    config: dict[str, Any] = Field(default={})
    """The configuration that all cells share, as for `cgrpo train`; `method` too, as far as methods leave it alone."""
    methods: tuple[str, ...] = ("naive_1to1", "naive_1to1.5", "customized")
    """By name, from methods.yaml or `own_methods`. The base policy is always measured."""
    own_methods: dict[str, Method] = Field(default={})
    """More methods: name to {title, about, config}. A known name changes that method."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of training: prompts, noise and order. Methods pair seed by seed."""
    baseline: str = "naive_1to1"
    """The method that the others have to beat."""
    candidate: str = "customized"
    """The method in question."""
    line: tuple[str, str] | None = None
    """Two methods that differ in constant weights alone. Another one is better, and does not only weigh otherwise, by
    how far it lies beyond the straight line through the two."""
    checks: dict[str, str] = Field(default={"prompt": "oracle_prompt", "identity": "oracle_subject"})
    """Reward to the metric that measures the same and is not trained on: the gap between their gains is reward
    hacking. Pairs whose names are not measured do not count."""
    lower_is_better: tuple[str, ...] = ("background_copied", "pose_copied")
    """Metrics of which less is better."""
    pictures: int = Field(default=6, ge=0)
    """Tasks shown in the report."""
    probe: Path | None = None
    """Folder of a `cgrpo probe` of the base policy, to show in the report when each reward is decided."""


class Budget(NamedTuple):
    """What a cell may spend."""

    samples: int
    """Pictures generated in training."""
    gradient_steps: int
    """Optimizer steps."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    method: str
    seed: int
    config: Config
    root: Path
    """The folder of the comparison."""

    @property
    def name(self) -> str:
        return f"{self.method}/seed-{self.seed}"

    @property
    def folder(self) -> Path:
        """An ordinary run folder."""
        return self.root / "cells" / self.method / f"seed-{self.seed}"

    @property
    def log(self) -> Path:
        return self.root / "logs" / f"{self.method}-seed-{self.seed}.log"


def load_grid(path: str | Path, overrides: Sequence[str] = ()) -> Grid:
    """Read a grid's YAML, with `seeds=[0]` or `config.training.iterations=5` on top.

    Raises:
        UserError: for an unknown key or method (with the nearest), a repeated seed, or a wrong type.
    """
    grid = load_settings(Grid, path, overrides)
    for name, values in (("seeds", grid.seeds), ("methods", grid.methods)):
        twice = [value for n, value in enumerate(values) if value in values[:n]]
        if twice:
            raise UserError(f"{name} lists {twice[0]} twice, which would count one run as two; list it once.")
        if not values:
            raise UserError(f"{name} is empty; list at least one.")
    for name in (*grid.methods, grid.baseline, grid.candidate, *(grid.line or ())):
        find_method(name, grid.own_methods)
    if grid.line and grid.line[0] == grid.line[1]:
        raise UserError(f"line names {grid.line[0]} twice, and one point makes no line; name two methods.")
    for key in ("seed", "output"):
        if key in grid.config:
            raise UserError(f"config.{key} is set by the grid for each cell; take it out.")
    return grid


def open_grid(folder: Path, overrides: Sequence[str] = (), *, run: bool = False, trust_code: bool = False) -> Grid:
    """The grid of a comparison's folder, which someone else may have made.

    Args:
        overrides: as for `load_grid`.
        run: whether its cells will run; else nothing but their step plans is asked, to count gradient steps.
        trust_code: run whatever the folder names.

    Raises:
        UserError: if it is no comparison, or names what this user does not trust.
    """
    file = folder / "compare.yaml"
    if not file.is_file():
        raise UserError(f"'{folder}' is not a comparison: it has no compare.yaml; `cgrpo compare GRID.yaml` makes one.")
    grid = load_grid(file, overrides)
    for found in trust_needed(grid, folder, run=run):
        trust.require(file, found, trust_code=trust_code)
    return grid


def trust_needed(grid: Grid, root: Path, *, run: bool = True) -> list[frozenset[trust.Item]]:
    """What needs trust to read a grid and, with `run`, to run each of its methods."""
    methods = [_config(grid, name, grid.seeds[0], root) for name in grid.methods if name != BASE]
    named = [config.specs() for config in (base_config(grid, root), *methods)]
    plans = [[triple for triple in some if triple[1] == "steps"] for some in named]
    return [trust.items(some) for some in (*plans, *(named if run else ()))]


def cells(grid: Grid, root: Path) -> list[Cell]:
    """All runs of the grid, one seed of every method after the other, so that an unfinished grid has whole seeds.

    Raises:
        UserError: if a configuration is wrong, or two cells could not be compared.
    """
    methods = [name for name in grid.methods if name != BASE]
    found = [Cell(name, seed, _config(grid, name, seed, root), root) for seed in grid.seeds for name in methods]
    check_comparable({BASE: base_config(grid, root), **{cell.name: cell.config for cell in found}})
    return found


def check_runnable(made: Sequence[Cell]) -> None:
    """Raise UserError for a method that names what does not exist, before hours are spent on the others."""
    for cell in {cell.method: cell for cell in made}.values():
        try:
            check_names(cell.config)
            _check_complete(cell.config)
            _check_weights(cell.config)
        except UserError as error:
            raise UserError(f"The method '{cell.method}': {error}") from error


def base_config(grid: Grid, root: Path) -> Config:
    """The configuration with which the base policy is evaluated."""
    config: Config = parse_config({**grid.config, "output": str(root / BASE)}, Config)
    if config.evaluation.examples == 0:
        raise UserError("config.evaluation.examples is 0, so nothing would be measured; set it above 0.")
    return config


def base_evaluation(root: Path) -> Path:
    """The one evaluation of the base policy, which all cells start from."""
    return root / BASE / "iteration-000000.json"


def _config(grid: Grid, method: str, seed: int, root: Path) -> Config:
    cell = root / "cells" / method / f"seed-{seed}"
    own = {"seed": seed, "output": str(cell), "evaluation": {"base": str(base_evaluation(root).resolve())}}
    tree = merged(merged(grid.config, find_method(method, grid.own_methods).config), own)
    try:
        return parse_config(tree, Config)
    except UserError as error:
        raise UserError(f"The method '{method}': {error}") from error


def budget(config: Config) -> Budget:
    """Pictures and optimizer steps of a whole run."""
    import torch

    training, rollout = config.training, config.rollout
    plan = bind(rollout.steps, "steps")(0, rollout.num_inference_steps, generator=torch.Generator().manual_seed(0))
    updates = min(training.updates_per_epoch, len(plan.trained))
    return Budget(
        samples=training.iterations * training.prompts_per_iteration * rollout.num_generations,
        gradient_steps=training.iterations * training.inner_epochs * updates,
    )


PAIRED = ("policy.", "rewards.", "metrics.", "data.", "evaluation.", "rollout.num_inference_steps")
"""Settings that must be equal in all cells for their scores to pair: base policy, data, what is measured and how."""


def check_comparable(configs: Mapping[str, Config]) -> None:
    """Raise UserError unless all runs start from one policy, are measured alike and spend the same.

    Args:
        configs: the name of a run to its configuration.
    """
    (first, reference), *others = configs.items()
    spent = budget(reference)
    for name, config in others:
        for key, (one, other) in _different(reference, config).items():
            if key.startswith(PAIRED):
                raise UserError(
                    f"'{first}' and '{name}' differ in {key} ({_short(one)} against {_short(other)}), so their scores "
                    f"do not pair; compare runs that share it."
                )
        if budget(config) != spent:
            one, two = (
                f"{b.samples:,} pictures and {b.gradient_steps:,} gradient steps" for b in (spent, budget(config))
            )
            raise UserError(f"'{first}' spends {one}, '{name}' {two}; give every method the same budget.")


def differences(expected: Config, found: Config) -> list[str]:
    """The settings in which the result of a run differs from what the grid asks for, as `section.setting a -> b`."""
    return [f"{key} {_short(a)} -> {_short(b)}" for key, (a, b) in _different(found, expected).items()]


def _different(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """The differences that change the result. Code that the user does not trust is not imported to ask for them."""
    named = trust.items(after.specs())
    found = result_differences(before, after, foreign=not named or trust.is_trusted(named))
    return {key: pair for key, pair in found.items() if key != "evaluation.base"}  # only a place


def _check_complete(config: Config) -> None:
    """Every argument that has no default must be set: time weights from a file need the file."""
    slots: list[tuple[str, Spec]] = [
        ("advantage", config.method.advantage),
        ("time_weights", config.method.time_weights),
    ]
    for slot, spec in slots:
        parameters = list(inspect.signature(resolve(spec.use, slot)).parameters.values())
        skip = 2 if slot == "advantage" else 1
        for parameter in parameters[skip:]:
            required = parameter.default is parameter.empty and parameter.kind is parameter.KEYWORD_ONLY
            if required and parameter.name not in {*spec.arguments, *GIVEN_BY_THE_TRAINER}:
                raise UserError(
                    f"{spec.use} needs '{parameter.name}'; set method.{slot}.{parameter.name} in its config under "
                    f"own_methods."
                )


def _check_weights(config: Config) -> None:
    """Look the time weights up once: a file may be missing, or hold weights for another number of rewards."""
    import torch

    spec, count = config.method.time_weights, len(config.rewards)
    given = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": config.rollout.num_inference_steps}
    taken = inspect.signature(resolve(spec.use, "time_weights")).parameters
    steps = torch.tensor([0.0, 0.5])
    try:
        weights = bind(spec, "time_weights")(steps, **{k: v for k, v in given.items() if k in taken})
    except ValueError as error:
        raise UserError(f"method.time_weights '{spec.use}': {error}") from error
    if tuple(weights.shape) != (2, count):
        raise UserError(
            f"method.time_weights '{spec.use}' gives {tuple(weights.shape)} for 2 steps, but there are {count} "
            f"rewards; give one weight per reward."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
