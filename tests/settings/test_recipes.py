from pathlib import Path

import pytest

from customized_grpo.settings.recipes import RECIPES, find_recipe, recipe_names


def test_a_recipe_goes_by_its_name_or_by_its_path_in_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"kontext", "toyworld/early", "bench/uno"} <= set(recipe_names())
    assert "parts/real" not in recipe_names()
    assert find_recipe("parts/real") == RECIPES / "parts" / "real.yaml"
    for name in (
        "toyworld/early",
        "toyworld/early.yaml",
        "recipes/toyworld/early.yaml",
        Path("recipes/toyworld/early"),
    ):
        assert find_recipe(name) == RECIPES / "toyworld" / "early.yaml"
    assert find_recipe("toyworld/fitted.json") == RECIPES / "toyworld" / "fitted.json"
    assert find_recipe("absent.yaml") == Path("absent.yaml")
    (tmp_path / "kontext").touch()
    assert find_recipe("kontext") == Path("kontext"), "the user's own file comes first"
