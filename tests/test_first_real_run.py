"""docs/first-real-run.md is followed literally, with small random weights in the folders that it names."""

import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image, ImageOps

from customized_grpo.config import load_config
from customized_grpo.settings.recipes import recipe_names
from customized_grpo.studies.bench import read_bench
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
    assert (tmp_path / "adapter" / "mine.safetensors").is_file()
    assert (tmp_path / "adapter" / "use.py").is_file()
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


DREAMBENCH = ROOT.parent / "shared" / "dreambench"


@pytest.mark.skipif(not DREAMBENCH.is_dir(), reason="the photos of DreamBench are not beside the repository")
def test_the_tutorial_on_the_photos_of_dreambench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two photos each of five subjects, one of them live, and fewer steps."""
    monkeypatch.chdir(tmp_path)
    finds_dark(monkeypatch)
    monkeypatch.setattr("customized_grpo.studies.report.write_report", lambda run, status: None)
    theirs, mine = DREAMBENCH / "dataset", tmp_path / "dreambooth" / "dataset"
    subjects = ("backpack", "can", "clock", "dog", "vase")
    for name in subjects:
        (mine / name).mkdir(parents=True)
        for photo in sorted((theirs / name).glob("*.jpg"))[:2]:
            shutil.copy(photo, mine / name)
    listing = (theirs / "prompts_and_classes.txt").read_text()
    others = {path.name for path in theirs.iterdir() if path.is_dir()} - set(subjects)
    kept = [line for line in listing.splitlines() if line.partition(",")[0] not in others]
    (mine / "prompts_and_classes.txt").write_text("\n".join(kept))
    less = {
        "train": ["rollout.num_generations=2", "rollout.num_inference_steps=3", "evaluation.examples=2"],
        "bench": ["subjects=1", "num_inference_steps=2"],
    }
    said = {
        " ".join(words[:2]): from_the_command_line(*words, *less.get(words[0], ()))
        for words in commands("docs/data.md")
    }
    assert "10 masks" in said["data masks"]
    assert "125 examples of 5 subjects" in said["data import"]
    assert "4 subjects for training, 1 held out" in said["data split"]
    assert "usable" in said["data check"]
    assert "background copied" in said["bench dreambooth"]
    measured = read_bench(tmp_path / "benches" / "tutorial")
    assert measured.scores.values.shape == (1, 25, 4)
    assert bool(np.isfinite(measured.scores.values).all())
