"""WebDataset shards, written by tarfile and read in place."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import fakes
from customized_grpo.data import HubDataset
from customized_grpo.data.images import png
from customized_grpo.errors import UserError
from customized_grpo.settings.parse import parse_config
from customized_grpo.store.run import RunFolder
from customized_grpo.train.settings import TrainerConfig
from customized_grpo.train.trainer import Trainer

COLUMNS = {"prompt": "json.prompt", "references": ["ref.jpg", "ref.1.png"], "target": "target.png"}
ONE = {"prompt": "json.prompt", "references": "ref.jpg"}


def write_shard(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def picture(shade):
    return png(Image.new("RGB", (6, 4), (shade, 30, 90)))


def told(**fields):
    return json.dumps(fields).encode()


@pytest.fixture
def shards(tmp_path):
    """Six samples in three shards, among files that belong to no sample."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "train-0.tar", {
        "README": b"no ending", "x.json": told(prompt="both"), "x.ref.jpg": picture(1), "x.ref.1.png": picture(2),
        "x.target.png": picture(3), "y.ref.jpg": picture(5), "y.txt": "größer".encode(), "y.cls": b"7",
        "y.json": told(prompt="later", kind="pose"), "y.raw": b"\xff",
    })  # fmt: skip
    for first in (2, 4):
        members = {"a/._000.jpg": b"of a Mac"}
        for n in (first, first + 1):
            members |= {f"a/{n:03d}.json": told(prompt=f"prompt {n}"), f"a/{n:03d}.ref.jpg": picture(30 * n)}
        write_shard(folder / f"train-{first}.tar", members)
    return folder


def test_samples_become_examples(shards):
    dataset = HubDataset(shards, **COLUMNS, id="__key__", kind="json.kind")
    assert [example.id for example in dataset] == ["x", "y", "a/002", "a/003", "a/004", "a/005"]
    both, later, *_, last = dataset
    assert (both.prompt, both.kind, len(both.references), both.target.getpixel((0, 0))[0]) == ("both", "", 2, 3)
    assert (later.kind, later.target, len(later.references)) == ("pose", None, 1)
    assert dataset.all_kinds() == ["", "pose", "", "", "", ""]
    assert (last.prompt, last.references[0].getpixel((0, 0))) == ("prompt 5", (150, 30, 90))
    plain = HubDataset(shards / "train-0.tar", prompt="txt", references="ref.jpg", subject="cls")
    assert (plain[1].prompt, plain[1].subject) == ("größer", "7")
    assert len(HubDataset(str(shards / "train-[24].tar"), **ONE)) == 4


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"prompt": "json.promt"}, r"has no column 'json.promt', only __key__.*Did you mean 'json.prompt'"),
        ({"prompt": "raw"}, r"train-0.tar', member 'y.raw' is neither an image nor text in UTF-8"),
        ({"references": "target.png"}, r"Row 1 of '.*shards' has no image in target.png"),
    ],
)
def test_a_sample_that_is_no_example_is_named(columns, sentence, shards):
    with pytest.raises(UserError, match=sentence):
        HubDataset(shards, **(ONE | columns))[1]


def test_a_shard_that_cannot_be_read_is_named(shards, tmp_path):
    whole = shards / "train-2.tar"
    dataset = HubDataset(whole, **ONE)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:1100])
    wrong = {
        write_shard(tmp_path / "z.tar", {"a.json": b"{}"}, "w:gz"): r"cannot be read as a shard .*without compression",
        cut: r"cannot be read as a shard \(damaged or cut off at byte 1024\)",
        tmp_path / "absent-*.tar": "cannot be read as a shard .*No such file",
        write_shard(tmp_path / "empty.tar", {"README": b""}): r"holds no sample; a shard has members such as",
        write_shard(tmp_path / "bad.tar", {"a.json": b"{"}): r"bad.tar', member 'a.json': not JSON",
    }
    for path, sentence in wrong.items():
        with pytest.raises(UserError, match=sentence):
            HubDataset(path, **ONE)
    whole.write_bytes(b"short")
    with pytest.raises(UserError, match=r"member 'a/002.json' ends early: 0 of 22 bytes; copy the shard again"):
        dataset[0]
    whole.unlink()
    with pytest.raises(UserError, match=r"member 'a/002.json' cannot be read \(No such file"):
        dataset[0]


class Seeing(fakes.LinearPolicy):
    """Remembers what each iteration trains on; `dies` in the middle of the third, as a kill ends it."""

    def __init__(self, folder, dies=False):
        super().__init__()
        tree = {
            "output": str(folder / "run"), "tracking": {"log_with": []}, "checkpoint": {"every": 1},
            "rollout": {"num_generations": 4, "num_inference_steps": 5},
            "training": {"iterations": 5, "prompts_per_iteration": 2},
        }  # fmt: skip
        data, rewards = HubDataset(folder / "shards", **ONE), {"prompt": fakes.red, "identity": fakes.dark}
        self.trainer = Trainer(self, rewards, data, None, parse_config(tree, TrainerConfig))
        self.seen, self.dies = {}, dies

    def encode(self, examples):
        self.seen[self.trainer.iteration] = [(e.prompt, e.references[0].getpixel((0, 0))) for e in examples]
        if self.dies and self.trainer.iteration == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(examples)


def test_a_killed_run_goes_on_with_the_same_examples(shards, tmp_path):
    script = (
        "import sys, pathlib, data.test_shards as t; t.Seeing(pathlib.Path(sys.argv[1]), dies=True).trainer.train()"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths})
    assert killed.returncode == -signal.SIGKILL
    resumed = Seeing(tmp_path)
    resumed.trainer.train(resume=RunFolder.existing(tmp_path / "run"))
    (tmp_path / "whole").mkdir()
    shards.rename(tmp_path / "whole" / "shards")
    whole = Seeing(tmp_path / "whole")
    whole.trainer.train()
    assert list(resumed.seen) == [2, 3, 4]
    assert [whole.seen[n] for n in resumed.seen] == list(resumed.seen.values())
    assert len({prompt for step in whole.seen.values() for prompt, _ in step}) == 6, "another epoch has begun"
    for name, value in whole.trainable_state().items():
        assert torch.equal(value, resumed.trainable_state()[name])
