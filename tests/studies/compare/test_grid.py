import sys
from pathlib import Path

import pytest
import yaml

from customized_grpo import check, trust
from customized_grpo.config import Config, check_names
from customized_grpo.data import load_datasets
from customized_grpo.errors import UserError
from customized_grpo.settings.parse import parse_config, to_yaml
from customized_grpo.studies.compare.grid import (
    Cell,
    Grid,
    budget,
    cells,
    check_comparable,
    check_runnable,
    differences,
    load_grid,
)
from customized_grpo.studies.compare.methods import Method, find_method, known_methods, merged
from studies.compare.tiny import CONFIG


def runnable(grid: Grid, root: Path) -> list[Cell]:
    base, *made = cells(grid, root)
    check_runnable([base, *made])
    return made


def write(tmp_path: Path, **tree) -> Path:
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({"config": CONFIG, **tree}))
    return file


def test_every_known_method_resolves_and_spends_the_same(tmp_path: Path) -> None:
    methods = [name for name in known_methods() if name != "fitted"]
    grid = load_grid(write(tmp_path, methods=methods, seeds=[0]))
    _, *made = cells(grid, tmp_path / "out")
    assert [cell.method for cell in made] == [name for name in methods if name != "base"]
    for cell in made:
        check_names(cell.config)
        assert budget(cell.config) == f"{4 * 2 * 4} images, {4 * 2} gradient steps"


def test_methods_differ_in_the_method_alone(tmp_path: Path) -> None:
    grid = load_grid(write(tmp_path, methods=["naive_1to1", "customized"], seeds=[3]))
    _, naive, customized = cells(grid, tmp_path)
    changed = {line.split()[0] for line in differences(customized.config, naive.config)}
    assert all(key.startswith("method.") for key in changed)
    assert naive.config.method.advantage.use == "raw_sum"
    assert customized.config.method.advantage.arguments == {"gamma": 0.4}
    assert {naive.config.seed, customized.config.seed} == {3}


def test_naive_favours_the_prompt_in_1to1_5() -> None:
    weights = known_methods()["naive_1to1.5"].config["method"]["time_weights"]["weights"]
    assert weights[0] / weights[1] == pytest.approx(1.5)


def test_cells_come_seed_by_seed(tmp_path: Path) -> None:
    grid = load_grid(write(tmp_path, methods=["base", "tdw", "sars"], seeds=[0, 1]))
    names = [cell.name for cell in cells(grid, tmp_path)]
    assert names == ["base", "tdw/seed-0", "sars/seed-0", "tdw/seed-1", "sars/seed-1"]


def test_own_methods_are_new_or_change_known_ones(tmp_path: Path) -> None:
    own = {
        "loud": {"about": "More bonus.", "config": {"method": {"advantage": {"use": "sars", "gamma": 0.9}}}},
        "tdw": {"config": {"method": {"clip_range": 0.01}}},
    }
    grid = load_grid(write(tmp_path, methods=["loud", "tdw"], own_methods=own, seeds=[0]))
    _, loud, tdw = cells(grid, tmp_path)
    assert loud.config.method.advantage.arguments == {"gamma": 0.9}
    assert tdw.config.method.clip_range == 0.01
    assert tdw.config.method.advantage.use == "weighted_sum"
    assert find_method("tdw", grid.own_methods).title == "TDW"


def test_merging_replaces_what_is_named_anew() -> None:
    below = {"a": {"use": "x", "gamma": 1}, "b": {"c": 1, "d": 2}}
    assert merged(below, {"a": {"use": "y"}, "b": {"c": 3}}) == {"a": {"use": "y"}, "b": {"c": 3, "d": 2}}


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"methods": ["costumized"]}, "There is no method 'costumized'. Did you mean 'customized'"),
        ({"seeds": [0, 1, 1]}, "seeds lists 1 twice"),
        ({"methods": ["tdw", "tdw"]}, "methods lists tdw twice"),
        ({"candidate": "custmized"}, "customized"),
        ({"line": ["zsum_1to1", "zsum_1to1"]}, "line lists zsum_1to1 twice"),
        ({"seeds": []}, "seeds is empty"),
        ({"seed": [0]}, "There is no setting 'seed'. Did you mean 'seeds'"),
        ({"config": {**CONFIG, "seed": 3}}, "config.seed is set by the grid"),
        ({"config": {**CONFIG, "traning": {}}}, "There is no setting 'traning'. Did you mean 'training'"),
        ({"config": {**CONFIG, "evaluation": {"examples": 0}}}, "nothing would be measured"),
        ({"methods": ["x"], "own_methods": {"x": {"config": {"method": {"advantage": "sarz"}}}}}, "method 'x'.*'sarz'"),
        (
            {"methods": ["tdw", "long"], "own_methods": {"long": {"config": {"training": {"iterations": 8}}}}},
            "'long/seed-0' 64 images, 16 gradient steps; give every method the same budget",
        ),
        (
            {
                "methods": ["tdw", "b"],
                "own_methods": {"b": {"config": {"policy": {"use": "studies.compare.tiny:SlowPolicy"}}}},
            },
            "differ in policy",
        ),
    ],
)
def test_a_wrong_grid_gets_one_sentence(tmp_path: Path, tree: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        runnable(load_grid(write(tmp_path, **{"methods": ["tdw"], "seeds": [0], **tree})), tmp_path)


def test_data_that_methods_share_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(check, "load_datasets", lambda data: read.append(data) or load_datasets(data))
    runnable(load_grid(write(tmp_path, methods=["tdw", "sars", "naive_1to1"], seeds=[0])), tmp_path)
    assert len(read) == 1


def test_an_argument_without_default_is_asked_for(tmp_path: Path) -> None:
    own = {"mine": {"config": {"method": {"time_weights": {"use": "tabulated", "grid": [0.0]}}}}}
    grid = load_grid(write(tmp_path, methods=["mine"], own_methods=own, seeds=[0]))
    with pytest.raises(
        UserError, match=r"'mine': The setting 'method.time_weights.weights' is missing; tabulated needs it"
    ):
        runnable(grid, tmp_path)


def test_another_seed_of_the_evaluation_noise_does_not_pair() -> None:
    one, two = (parse_config(merged(CONFIG, {"evaluation": {"seed": seed}}), Config) for seed in (0, 1))
    with pytest.raises(UserError, match="differ in evaluation"):
        check_comparable(Cell("a", 0, one, Path()), Cell("b", 0, two, Path()))


@pytest.mark.parametrize(
    ("change", "pairs"),
    [
        ({"evaluation": {"batch": 1, "grid_rows": 1, "base": "elsewhere.json"}}, True),
        ({"tracking": {"project": "mine"}, "checkpoint": {"keep": 1}, "training": {"micro_batch": 1}}, True),
        ({"policy": {"use": "FluxKontextPolicy", "path": "p", "offload": "cpu", "gradient_checkpointing": True}}, True),
        ({"policy": {"use": "FluxKontextPolicy", "path": "p", "dtype": "float32"}}, False),
        ({"rewards": {"prompt": {"use": "ClipReward", "batch_size": 1, "device": "cpu"}}}, True),
        ({"rewards": {"prompt": {"use": "ClipReward", "revision": "abc"}}}, False),
        ({"evaluation": {"replicates": 1}}, False),
        ({"rollout": {"num_generations": 4, "num_inference_steps": 6}}, False),
    ],
)
def test_what_does_not_change_the_result_may_differ(change: dict, pairs: bool) -> None:
    model = {"policy": {"use": "FluxKontextPolicy", "path": "p"}, "rewards": {"prompt": {"use": "ClipReward"}}}
    tree = merged(CONFIG, {**model, "rewards": {**CONFIG["rewards"], **model["rewards"]}})
    one = parse_config(tree, Config)
    change = {key: merged(tree[key], value) if key == "rewards" else value for key, value in change.items()}
    two = parse_config(merged(tree, change), Config)
    assert (differences(one, two) == []) == pairs
    if pairs:
        check_comparable(Cell("a", 0, one, Path()), Cell("b", 0, two, Path()))
    else:
        with pytest.raises(UserError, match="'a/seed-0' and 'b/seed-0' differ in"):
            check_comparable(Cell("a", 0, one, Path()), Cell("b", 0, two, Path()))


def test_objectives_with_other_steps_in_training_are_comparable() -> None:
    nft = {"objective": {"use": "nft", "levels": 2}, "rollout": {"num_generations": 4, "num_inference_steps": 3}}
    one, two, three = (
        parse_config(merged(CONFIG, change), Config)
        for change in ({}, {**nft, "evaluation": {"num_inference_steps": 5}}, {**nft, "evaluation": {"seed": 0}})
    )
    check_comparable(Cell("a", 0, one, Path()), Cell("b", 0, two, Path()))
    with pytest.raises(UserError, match=r"differ in evaluation.num_inference_steps 5 -> 3"):
        check_comparable(Cell("a", 0, one, Path()), Cell("c", 0, three, Path()))
    single = parse_config(merged(CONFIG, {**nft, "objective": {"use": "nft", "levels": 1}}), Config)
    assert (budget(two), budget(single)) == ("32 images, 8 gradient steps", "32 images, 4 gradient steps")


def test_code_of_others_is_asked_only_if_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.py").write_text("class Policy:\n    RUNTIME = ('offload',)\n")
    monkeypatch.syspath_prepend(tmp_path)
    policy = {"use": "theirs:Policy", "offload": "cpu"}
    one = parse_config({**CONFIG, "policy": {"use": "theirs:Policy"}}, Config)
    two = parse_config({**CONFIG, "policy": policy}, Config)
    assert differences(two, one) == ['policy.offload null -> "cpu"']
    assert "theirs" not in sys.modules
    trust.remember(trust.items(two.specs()))
    assert differences(two, one) == []


def test_an_override_of_one_entry_keeps_the_others(tmp_path: Path) -> None:
    file = write(tmp_path, methods=["tdw"], seeds=[0], config={})
    grid = load_grid(
        file, ["checks.prompt=sharp", "config.rewards.prompt={use: 'a:b'}", "config.metrics.c={use: 'c:d'}"]
    )
    assert grid.checks == {"prompt": "sharp", "identity": "oracle_subject"}
    rewards = cells(grid, tmp_path)[0].config.rewards
    assert {name: spec.use for name, spec in rewards.items()} == {"prompt": "a:b", "identity": "DinoReward"}
    assert list(cells(grid, tmp_path)[0].config.metrics) == [*Config().metrics, "c"]


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "n" * 101])
def test_a_method_that_cannot_name_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="gives its name to a folder"):
        load_grid(write(tmp_path, methods=[name], own_methods={name: {}}, seeds=[0]))


def test_a_grid_survives_being_written(tmp_path: Path) -> None:
    grid = load_grid(write(tmp_path, methods=["tdw"], own_methods={"x": {"title": "X"}}, seeds=[4]))
    file = tmp_path / "again.yaml"
    file.write_text(to_yaml(grid))
    assert load_grid(file) == grid
    assert isinstance(grid.own_methods["x"], Method)
    assert isinstance(grid, Grid)


@pytest.mark.parametrize("name", ["compare-quick", "compare", "objectives"])
def test_the_recipes_are_grids_whose_cells_compare(name: str, tmp_path: Path) -> None:
    grid = load_grid(Path("toyworld", name))
    made = runnable(grid, tmp_path)
    assert len(made) == len(grid.methods) * len(grid.seeds)
    assert set(grid.checks.values()) | set(grid.lower_is_better) <= set(made[0].config.metrics)
    assert {grid.baseline, grid.candidate} <= set(grid.methods)


def test_fitted_needs_the_file_of_a_probe(tmp_path: Path) -> None:
    from customized_grpo.train.fitted import save_time_weights

    with pytest.raises(UserError, match=r"'fitted': The setting 'method.time_weights.path' is missing; from_file"):
        runnable(load_grid(write(tmp_path, methods=["fitted"], seeds=[0])), tmp_path)
    file = tmp_path / "time_weights.json"
    save_time_weights(
        file, grid=[0.0, 0.5], weights=[[0.6, 0.4], [0.3, 0.7]], rewards=["prompt", "identity"], provenance={}
    )
    own = {"fitted": {"config": {"method": {"time_weights": {"use": "from_file", "path": str(file)}}}}}
    (cell,) = runnable(load_grid(write(tmp_path, methods=["fitted"], own_methods=own, seeds=[0])), tmp_path)
    assert cell.config.method.time_weights.arguments == {"path": str(file)}
    assert cell.config.method.advantage.use == "sars"
    file.unlink()
    with pytest.raises(UserError, match=r"'fitted': .*There is no file of time weights .*time_weights.json"):
        runnable(load_grid(write(tmp_path, methods=["fitted"], own_methods=own, seeds=[0])), tmp_path)


def test_one_weight_per_reward(tmp_path: Path) -> None:
    own = {"odd": {"config": {"method": {"time_weights": {"use": "constant", "weights": [1.0]}}}}}
    with pytest.raises(UserError, match=r"'odd': method.time_weights gives weights of shape .2, 1. .* 2 rewards"):
        runnable(load_grid(write(tmp_path, methods=["odd"], own_methods=own, seeds=[0])), tmp_path)
