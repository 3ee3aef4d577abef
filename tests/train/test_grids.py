import json
from dataclasses import replace
from pathlib import Path

import torch

import fakes
from customized_grpo.train.evaluation import Evaluation, evaluate
from customized_grpo.train.grids import copy_grid, save_grid
from customized_grpo.train.settings import EvaluationSettings


def evaluation() -> Evaluation:
    settings = EvaluationSettings(replicates=1, grid_rows=2)
    return evaluate(fakes.LinearPolicy(), fakes.examples(3), {"red": fakes.red}, {}, settings, 2, 4)


def test_what_is_right_in_an_image_lies_beside_it(tmp_path: Path) -> None:
    save_grid(replace(evaluation(), marks=({"hat": True, "red hat": False}, {})), tmp_path / "a")
    copy_grid(tmp_path / "a", "iteration-000004", tmp_path / "b")
    for folder in ("a", "b"):
        found = {path.name: path for path in (tmp_path / folder / "cells").iterdir()}
        assert len([name for name in found if name.endswith("iteration-000004.png")]) == 2
        assert [name for name in found if name.endswith(".json")] == ["000-iteration-000004.json"]
        assert json.loads(found["000-iteration-000004.json"].read_text()) == {"hat": True, "red hat": False}


def test_small_images_are_kept_of_the_first_and_the_newest_evaluation(tmp_path: Path) -> None:
    for iteration in (0, 2, 4):
        made = evaluation()
        scores = replace(made.scores, iteration=iteration)
        save_grid(replace(made, scores=scores, marks=({}, {}, {"hat": True})), tmp_path)
    small = sorted(path.name for path in (tmp_path / "cells").glob("002-*"))
    of_first, of_newest = ([f"002-iteration-00000{n}.{ending}" for ending in ("jpg", "json")] for n in (0, 4))
    assert small == [*of_first, *of_newest, "002-reference.jpg"]
    assert len(list((tmp_path / "cells").glob("000-iteration-*.png"))) == 3


def test_no_images_no_grid(tmp_path: Path) -> None:
    save_grid(replace(evaluation(), images=torch.empty(0)), tmp_path)
    assert list(tmp_path.iterdir()) == []
