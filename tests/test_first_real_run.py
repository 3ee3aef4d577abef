"""docs/first-real-run.md is followed literally, with small random weights in the folders that it names."""

import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image, ImageOps

from customized_grpo.config import load_config
from customized_grpo.settings.recipes import recipe_names
from customized_grpo.toyworld import weights_path
from policies import tiny
from policies.runs import from_the_command_line
from test_docs import ROOT, blocks

PAGE = "docs/first-real-run.md"
SMALL = {
    "policy": {"resolution": 16, "reference_resolution": 16, "quantize": "none", "device": "cpu"},
    "rollout": {"num_generations": 2, "num_inference_steps": 5},
    "training": {"iterations": 1, "prompts_per_iteration": 2},
    "evaluation": {"examples": 2, "every": 1, "grid_rows": 1},
    "tracking": {"log_with": []},
}
"""Sizes, and what the machine of the tests lacks."""


def commands(page: str) -> list[list[str]]:
    """Of the blocks in bash, in the order of the page."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    found = [shlex.split(line, comments=True) for line in lines]
    assert all(words[0] == "cgrpo" for words in found)
    return [words[1:] for words in found]


def finds_dark(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in of rembg, for which what is dark is the subject."""

    def remove(picture: Image.Image, **_: object) -> Image.Image:
        return ImageOps.invert(picture.convert("L")).point(lambda value: 255 if value > 128 else 0)

    monkeypatch.setitem(sys.modules, "rembg", SimpleNamespace(new_session=str, remove=remove))


def test_the_page_leads_from_weights_to_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finds_dark(monkeypatch)
    monkeypatch.setattr("customized_grpo.studies.report.write_report", lambda run, status: None)
    for number, name in enumerate(("dog2", "cat", "mug", "vase")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        photo = Image.new("RGB", (64, 64), "white")
        photo.paste((40 * number, 20, 60), (16, 16, 48, 48))
        photo.save(tmp_path / "photos" / name / "0.jpg")
    (tmp_path / "prompts.txt").write_text("a {subject} in the snow\na red {subject}\n")
    tiny.kontext_pipeline().save_pretrained(tmp_path / "models" / "FLUX.1-Kontext-dev")
    for name, packaged in {
        "PickScore": "clip", "CLIP-H": "clip", "clip-base": "clip_2", "dinov2-base": "dino", "dino-vits16": "dino_2",
    }.items():  # fmt: skip
        shutil.copytree(weights_path(packaged), tmp_path / "models" / name)
    (written,) = blocks(PAGE, "yaml")
    (tmp_path / "page.yaml").write_text(written)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"extends": "page.yaml", "verified": "tiny", **SMALL}))
    said = {" ".join(words[:2]): from_the_command_line(*words) for words in commands(PAGE)}
    assert "4 masks" in said["data masks"]
    assert "1 held-out subject is too few" in said["data split"]
    assert "usable" in said["data check"]
    assert "mine.yaml is valid" in said["config mine.yaml"]
    assert said["rewards check"].count("passed") == 5
    assert "verified" in said["train mine.yaml"]
    assert (tmp_path / "mine.safetensors").is_file()
    assert list((tmp_path / "runs" / "first" / "generated").iterdir())
    assert (tmp_path / "photos.png").is_file()
    assert (tmp_path / "split.png").is_file()


def test_what_the_page_names_exists() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    named = re.findall(r"`((?:kontext|flux2-klein|qwen-image-edit)[\w-]*)`", text)
    assert len(named) > 9
    assert set(named) <= set(recipe_names())
    changes = [word for text in re.findall(r"`((?:\w+\.)+\w+=[^`]*)`", text) for word in shlex.split(text)]
    assert len(changes) > 5
    for change in changes:
        load_config("kontext-nft" if change.startswith("objective.") else "kontext", [change])
