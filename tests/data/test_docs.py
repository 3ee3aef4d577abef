"""The examples of docs/data.md, read as they are written there."""

import inspect
import re
from pathlib import Path

import yaml
from PIL import Image

from customized_grpo.data import HubDataset, JsonlDataset, importers, rows
from customized_grpo.data.check import check_data
from customized_grpo.data.importers import import_folder

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def block(language):
    return blocks(language)[0]


def test_the_manifest(tmp_path):
    (tmp_path / "data.jsonl").write_text(block("json"))
    for n, name in enumerate(("dog/0.jpg", "dog/1.jpg", "cat/0.jpg")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (300, 300), (40 * n, 0, 0)).save(tmp_path / name)
    Image.new("L", (300, 300), 255).save(tmp_path / "dog" / "0_mask.png")
    train, held_out = JsonlDataset(tmp_path / "data.jsonl").held_out()
    assert ([e.id for e in train], [e.id for e in held_out]) == (["dog-00", "dog-01"], ["cat-00"])
    assert check_data(tmp_path / "data.jsonl").usable


def test_the_folder(tmp_path):
    for name in ("dog2/0.jpg", "dog2/1.jpg", "dog2/1_mask.png", "my_mug/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "white").save(tmp_path / name)
    (tmp_path / "my_mug" / "class.txt").write_text("mug")
    prompts = re.findall(r"(a \{subject\}.*)$", TEXT, re.MULTILINE)
    manifest = import_folder(tmp_path, tmp_path / "data.jsonl", prompts, references="all").manifest
    assert [e.prompt for e in JsonlDataset(manifest)][::2] == ["a dog in the snow", "a mug in the snow"]


def test_functions_and_settings_exist():
    for name, arguments in re.findall(r"`(import_\w+)\(([\w, ]+)\)`", TEXT):
        home = rows if name == "import_rows" else importers
        assert list(inspect.signature(getattr(home, name)).parameters)[: arguments.count(",") + 1] == (
            arguments.split(", ")
        )
    for spec in [spec for text in blocks("yaml") for spec in yaml.safe_load(text)["data"].values()]:
        assert set(spec) - {"use"} <= set(inspect.signature(HubDataset).parameters)


def test_the_layouts():
    lines = re.findall(
        r"^\| `([\w-]+)` \|(.*)\|.*\|$", TEXT.partition("### Rows")[2].partition("\n## ")[0], re.MULTILINE
    )
    told = {name: [re.findall(r"`([\w.]+)`", cell) for cell in cells.split("|")] for name, cells in lines}
    known = {
        name: [[some.prompt], list(some.references), [some.target][: bool(some.target)], [some.kind][: bool(some.kind)]]
        for name, some in rows.LAYOUTS.items()
    }
    assert told == known
