"""The packaged configurations, grids and benchmarks."""

from pathlib import Path

from customized_grpo.store import is_file

RECIPES = Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    """The names of the packaged recipes, such as `kontext` and `toyworld/early`, without `parts/`."""
    names = (path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("parts/"))


def find_recipe(path: str | Path, folder: Path = Path()) -> Path:
    """The file at a path in a folder, or else the packaged recipe of that name: `toyworld/early`,
    `recipes/toyworld/early.yaml`."""
    name = Path(path).as_posix().removeprefix("recipes/")
    places = (folder / path, RECIPES / name, RECIPES / f"{name}.yaml")
    return next((place for place in places if is_file(place)), folder / path)
