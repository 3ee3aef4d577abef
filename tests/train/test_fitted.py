"""Time weights from a file: read as `tabulated` weights, refused with a reason."""

import json
import math
from pathlib import Path

import pytest
import torch

from customized_grpo.errors import UserError
from customized_grpo.train.fitted import from_file, save_time_weights


def test_weights_are_straight_lines_through_the_file(tmp_path: Path) -> None:
    rows = [[0.8, 0.2], [0.2, 0.8]]
    path = save_time_weights(tmp_path / "w.json", [0.0, 0.5], rows, ["prompt", "identity"], {"seed": 1})
    found = from_file(torch.tensor([0.0, 0.25, 0.5, 0.9]), path=str(path))
    torch.testing.assert_close(found, torch.tensor([[0.8, 0.2], [0.5, 0.5], [0.2, 0.8], [0.2, 0.8]]))
    content = json.loads(path.read_text())
    assert content == {
        "grid": [0.0, 0.5],
        "weights": rows,
        "rewards": ["prompt", "identity"],
        "provenance": {"seed": 1},
    }


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([1, 2], "it has no list 'grid'"),
        ({"weights": [[1]]}, "it has no list 'grid'"),
        ({"grid": [0, 1], "weights": [[1, 0]]}, "'weights' is not a list of 2 rows"),
        ({"grid": [0, 1], "weights": [[1, 0], [1]]}, "empty or differ in length"),
        ({"grid": [], "weights": []}, "empty or differ in length"),
        ({"grid": [0, 1], "weights": [[1, 0], [1, "x"]]}, "not a finite number"),
        ({"grid": [0, 1], "weights": [[1, 0], [1, math.nan]]}, "not a finite number"),
        ({"grid": [0, True], "weights": [[1, 0], [1, 0]]}, "not a finite number"),
        ({"grid": [1, 0], "weights": [[1, 0], [1, 0]]}, "'grid' does not ascend"),
        ({"grid": [0, 1], "weights": [[1, 0], [1, -0.1]]}, "a weight is negative"),
    ],
)
def test_other_content_is_refused_with_the_reason(tmp_path: Path, content: object, why: str) -> None:
    (tmp_path / "w.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=why):
        from_file(torch.zeros(1), path=tmp_path / "w.json")


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no file of time weights"):
        from_file(torch.zeros(1), path=tmp_path / "none.json")
    (tmp_path / "picture.json").write_bytes(b"\x89PNG\xff")
    with pytest.raises(UserError, match="this is not UTF-8 text"):
        from_file(torch.zeros(1), path=tmp_path / "picture.json")
