"""The examples of docs/rewards.md, executed as they are written there."""

import base64
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

import customized_grpo.rewards
from customized_grpo.data.images import png
from customized_grpo.rewards import check_reward
from customized_grpo.rewards.check import check_rewards
from customized_grpo.rewards.server import read_request
from customized_grpo.settings import Spec
from customized_grpo.settings.build import construct, resolve
from rewards import tiny

TEXT = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """The Python examples, under the names that the text gives them."""
    names = re.findall(r"Save this as `(\w+\.py)`", TEXT)
    assert len(names) == len(blocks("python")) == 3
    for name, code in zip(names, blocks("python"), strict=True):
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)


def test_the_function_from_its_configuration(saved, images):
    spec = Spec(**yaml.safe_load(blocks("yaml")[1])["rewards"]["sharp"])
    sharpness = construct(spec, "reward")
    examples = [tiny.example()] * 3
    check_reward(sharpness, images, examples)
    flat = torch.full((1, 3, 8, 8), 0.5)
    stripes = torch.tensor([0.0, 1.0]).repeat(4).expand(1, 3, 8, 8)
    assert sharpness(flat, examples[:1]).item() == 0
    assert sharpness(stripes, examples[:1]).item() == 50 / 2  # differs across, not down


def test_the_class(saved, images):
    palette = construct(Spec(use="palette:Palette", device="cpu"), "reward")
    examples = [tiny.example(), tiny.example(references=2), tiny.Example("e", "p", ())]
    check_reward(palette, images, examples)
    assert palette(images, examples).isnan().tolist() == [False, False, True]


def test_the_reward_that_compares_a_group(saved, images):
    reward = construct(Spec(use="ranking:WinRate"), "reward")
    one, other = tiny.example("one"), tiny.example("other")
    flat, stripes = torch.full((3, 8, 8), 0.5), torch.tensor([0.0, 1.0]).repeat(4).expand(3, 8, 8)
    rows, by_row = torch.stack([flat, flat, stripes, stripes / 2]), [one, other, one, one]
    assert reward(rows, by_row).nan_to_num(-1).tolist() == [0, -1, 1, 0.5]
    check_reward(reward, rows, by_row)
    (trial,) = check_rewards({"win_rate": lambda: reward}, [one, other], torch.stack([flat, stripes]))
    assert trial.scores == (0, 1)
    assert not trial.violation


def test_every_configuration_names_what_exists():
    for block in blocks("yaml"):
        for spec in yaml.safe_load(block)["rewards"].values():
            if ":" in spec["use"]:
                continue
            known = inspect.signature(resolve(spec["use"], "reward")).parameters
            assert set(spec) - {"use"} <= set(known)


def test_the_table_names_every_reward():
    public = {
        name for name in customized_grpo.rewards.__all__ if name.endswith(("Reward", "Judge")) and name != "Reward"
    }
    assert set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)) & public == public


def test_the_wire_format():
    request = json.loads(blocks("json")[0])
    picture = base64.b64encode(png(tiny.picture())).decode()
    request["pictures"] = [picture] * len(request["pictures"])
    images, examples = read_request(request)
    assert images.shape == (2, 3, 40, 40)
    assert examples[0] is examples[1]
    assert (examples[0].prompt, len(examples[0].references), len(examples[0].masks)) == ("a dog in the snow", 1, 1)
    assert (examples[0].kind, examples[0].target.size) == ("recontext", (40, 40))
