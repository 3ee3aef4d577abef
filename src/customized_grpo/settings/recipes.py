"""The configurations, grids and benchmarks that are part of the package."""

from pathlib import Path

from customized_grpo.store import is_file

RECIPES = Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    """The names of the packaged recipes, such as `kontext` and `toyworld/early`."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def find_recipe(path: str | Path) -> Path:
    """The file at a path, or else the packaged recipe of that name: `toyworld/early`, `recipes/toyworld/early.yaml`."""
    name = Path(path).as_posix().removeprefix("recipes/")
    places = (Path(path), RECIPES / name, RECIPES / f"{name}.yaml")
    return next((place for place in places if is_file(place)), Path(path))
