"""Rows as their authors publish them; the sources are in docs/data.md."""

import json
from pathlib import Path

import pytest
from PIL import Image

from customized_grpo.data import JsonlDataset
from customized_grpo.data.check import check_data
from customized_grpo.data.images import png
from customized_grpo.data.rows import LAYOUTS, import_rows
from customized_grpo.errors import UserError

UNO_1M = {
    "img_path1": "split1/stew_1.png",
    "img_path2": "split1/stew_2.png",
    "caption": {"img_path1": "stew", "img_path2": "stew on wood", "judgment": "same", "subject": ["beef stew"]},
    "vlm_filter_cot": {"score_part": {"Carrots": 3.0}, "score_final": 3.5},
}
PUBLISHED = {
    "edit-r1": ("test_metadata.jsonl", [{"prompt": "make it red", "image": "images/a.png", "requirement": "all"}]),
    "omnigen2": ("0.jsonl", [
        {"task_type": "ic", "instruction": "a dog", "input_images": ["a.png", "b.png"], "output_image": "c.png"},
        {"task_type": "t2i", "instruction": "a tree", "output_image": "c.png"},
    ]),
    "omniref": ("train.json", [
        {"image": "2/style/target.png", "prompt": "a van (image 2) by a desk (image 1)", "index": 0, "is_style": True,
         "edit_image": ["2/subjects/a desk.png", "2/subjects/a van.png"], "is_test": False},
        {"image": "p/0.jpeg", "prompt": "as image 1", "edit_image": ["p/0/a woman.png"], "index": 1,
         "category": "subject_pose", "is_test": True},
        {"prompt": "as image 1 stands", "edit_image": ["p/0/a woman.png"], "index": 2, "category": "subject_pose"},
    ]),
    "uno": ("train.json", [
        {"prompt": "a bag in the snow", "image_path": "a.png", "image_tgt_path": "b.png"},
        {"prompt": "a bag and a bear", "image_paths": ["a.png", "c.png"], "image_tgt_path": "d.png"},
    ]),
    "uno-1m": ("uno_1m_total_labels.json", [
        UNO_1M,
        UNO_1M | {"img_path1": "split1/x.png", "vlm_filter_cot": {"score_part": {}, "score_final": 3.0}},
        UNO_1M | {"img_path1": "split1/y.png", "vlm_filter_cot": None},
    ]),
}  # fmt: skip
EXPECTED = {
    "edit-r1": [("make it red", ["images/a.png"], "", "", "", "eval")],
    "omnigen2": [("a dog", ["a.png", "b.png"], "c.png", "ic", "", "")],
    "omniref": [
        ("a van (image 2) by a desk (image 1)", ["2/subjects/a desk.png", "2/subjects/a van.png"],
         "2/style/target.png", "", "", "train"),
        ("as image 1", ["p/0/a woman.png"], "p/0.jpeg", "subject_pose", "", "eval"),
        ("as image 1 stands", ["p/0/a woman.png"], "", "subject_pose", "", ""),
    ],
    "uno": [
        ("a bag in the snow", ["a.png"], "b.png", "", "", ""),
        ("a bag and a bear", ["a.png", "c.png"], "d.png", "", "", ""),
    ],
    "uno-1m": [("stew on wood", ["images/split1/stew_1.png"], "images/split1/stew_2.png", "", "beef stew", "")],
}  # fmt: skip


def put(folder: Path, name: str, rows: list) -> Path:
    lines = "\n".join(map(json.dumps, rows)) + "\n"
    (folder / name).write_text(lines if name.endswith("l") else json.dumps(rows))
    return folder / name


def draw(folder: Path, *names: str) -> None:
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 300), (shade, 20 * len(name) % 256, 9)).save(folder / name)


@pytest.mark.parametrize("layout", PUBLISHED)
def test_published_layouts(layout: str, tmp_path: Path) -> None:
    file, expected = put(tmp_path, *PUBLISHED[layout]), EXPECTED[layout]
    draw(tmp_path, *dict.fromkeys(name for row in expected for name in [*row[1], row[2]] if name))
    done = import_rows(file, tmp_path / "data.jsonl", layout)
    records = JsonlDataset(done.manifest).records
    found = [(r.prompt, list(r.references), r.target, r.kind, r.subject, r.split) for r in records]
    assert found == expected
    assert [record.id for record in records] == [f"{layout}-{n:06d}" for n in range(len(expected))]
    assert done.subjects == len({row[1][0] for row in expected})
    assert done.left_out == {
        "omnigen2": {"no reference": ["0.jsonl, line 2"]},
        "uno-1m": {
            "vlm_filter_cot.score_final below 3.5": [f"uno_1m_total_labels.json, entry {n}" for n in (1, 2)],
        },
    }.get(layout, {})  # fmt: skip


def test_the_manifest_s_own_names_and_what_is_left_out(tmp_path: Path) -> None:
    """A folder of two files, one of them held out by its name; what one's own columns and limits change."""
    draw(tmp_path, "i/a.png", "i/b.png")
    rows = [
        {"prompt": "red", "references": "a.png", "target": "b.png", "subject_id": 7, "kind": "colour", "rank": 1},
        {"prompt": " ", "references": ["a.png"], "rank": float("nan")},
        {"prompt": "x", "references": [None, ""], "rank": 3},
        {"prompt": "y", "references": "absent.png", "rank": 4},
        {"prompt": "z", "references": "a.png", "target": "absent.png", "rank": 5},
    ]
    (tmp_path / "rows").mkdir()
    put(tmp_path / "rows", "a.jsonl", rows)
    put(tmp_path / "rows", "val-1.json", [{"prompt": "blue", "references": "b.png", "rank": 6, "split": ""}])
    done = import_rows(tmp_path / "rows", tmp_path / "data.jsonl", images=tmp_path / "i")
    assert done.left_out == {
        "no prompt": ["a.jsonl, line 2"],
        "no reference": ["a.jsonl, line 3"],
        "missing image": ["a.jsonl, line 4", "a.jsonl, line 5"],
    }
    red, blue = JsonlDataset(done.manifest).records
    assert (red.target, red.subject_id, red.kind, blue.split) == ("i/b.png", "7", "colour", "eval")
    own = {"columns": {"target": "", "references": "references,target"}, "images": tmp_path / "i"}
    (record,) = JsonlDataset(import_rows(rows, tmp_path / "own.jsonl", **own, limit=4)[0]).records
    assert (record.references, record.target, record.id) == (("i/a.png", "i/b.png"), "", "rows-000000")
    best = import_rows(tmp_path / "rows", tmp_path / "best.jsonl", images=tmp_path / "i", least={"rank": 6})
    assert best[1:3] == (1, 1)
    assert best.left_out == {"rank below 6": [f"a.jsonl, line {n}" for n in range(1, 6)]}


def test_images_inside_rows_are_saved(tmp_path: Path) -> None:
    """As MUSAR-Gen has them; `datasets` gives images, or mappings of bytes where it does not decode."""
    cut = Image.new("RGBA", (300, 300), (90, 90, 90, 255))
    cut.putpixel((0, 0), (0, 0, 0, 0))
    told = {"prompt": "a cup and a hat", "cond_prompt_0": "a cup", "cond_prompt_1": "a hat"}
    whole = png(Image.new("RGB", (300, 300), "blue"))
    rows = [
        {
            "cond_img_0": cut,
            "cond_img_1": {"bytes": whole, "path": None},
            "tgt_img": Image.new("L", (300, 300)),
            **told,
        },
        {"cond_img_0": b"no image", "cond_img_1": cut, "tgt_img": cut, **told},
    ]
    done = import_rows(rows, tmp_path / "out" / "data.jsonl", "musar-gen")
    assert done.left_out == {"image that cannot be read": ["row 1"]}
    (example,) = JsonlDataset(done.manifest)
    assert (len(example.references), example.references[1].getpixel((0, 0))) == (2, (0, 0, 255))
    assert example.masks[0].getextrema() == (0, 255)
    assert example.target.getpixel((5, 5)) == (0, 0, 0)
    assert JsonlDataset(done.manifest).records[0].target == "data-images/musar-gen-000000-2.png"
    assert check_data(done.manifest).usable
    done.manifest.unlink()
    with pytest.raises(UserError, match=r"musar-gen-000000-0.png' exists already; an image would go there"):
        import_rows(rows, done.manifest, "musar-gen")


@pytest.mark.parametrize(
    ("row", "options", "sentence"),
    [
        ("text", {}, r"row 0: expected an object of columns, got text"),
        ({"prompt": ["a"]}, {}, r"row 0: 'prompt' is list; expected the text of the prompt"),
        ({"references": 7}, {}, r"row 0: an image is int; expected its path, its bytes or an image"),
        ({"kind": "k" * 41}, {}, r"row 0: field 'kind': 'k.*' has 41 characters; name a kind with at most 40"),
        ({"split": "later"}, {}, r"row 0: field 'split': 'later' is not a known split"),
        ({"split": [1]}, {}, r"row 0: field 'split': expected"),
        ({"score": "high"}, {"least": {"score": 1}}, r"row 0: 'score' is str; expected a number to compare"),
        ({}, {"least": {"scor": 1}}, r"No row has 'scor', the first has .*; name the column with --least COLUMN="),
        ({}, {"columns": {"prompt": "promt"}}, r"No row has 'promt', the first has prompt, references.*--columns prompt"
                                               r"=COLUMN. Did you mean 'prompt'"),
        ({}, {"layout": "omnigen2"}, r"No row has 'instruction'"),
        ({}, {"columns": {"weights": "w"}}, r"There is no 'weights' among prompt, references, .*; name one of them"),
        ({}, {"layout": "uno1m"}, r"There is no 'uno1m' among .*Did you mean 'uno-1m'"),
    ],
)  # fmt: skip
def test_a_row_that_is_none_and_a_column_that_is_not_there(row, options, sentence: str, tmp_path: Path) -> None:
    draw(tmp_path, "a.png")
    row = row if isinstance(row, str) else {"prompt": "a", "references": "a.png"} | row
    with pytest.raises(UserError, match=sentence):
        import_rows([row], tmp_path / "data.jsonl", images=tmp_path, **options)
    assert not (tmp_path / "data.jsonl").exists()


def test_more_kinds_than_a_table_can_show(tmp_path: Path) -> None:
    draw(tmp_path, "a.png")
    rows = [{"prompt": "a", "references": "a.png", "kind": f"k{n}"} for n in range(21)]
    with pytest.raises(UserError, match="has 21 kinds of prompt"):
        import_rows(rows, tmp_path / "data.jsonl", images=tmp_path)
    assert import_rows(rows, tmp_path / "data.jsonl", images=tmp_path, columns={"kind": ""}).examples == 21


def test_every_layout_is_tested() -> None:
    assert set(LAYOUTS) == {*PUBLISHED, "musar-gen", "rows"}
