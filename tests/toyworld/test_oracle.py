from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from customized_grpo.structures import Example
from customized_grpo.toyworld import draw
from customized_grpo.toyworld.dataset import ToyWorld
from customized_grpo.toyworld.oracle import (
    FullyRight,
    Oracle,
    PromptShown,
    SubjectKept,
    expected_of_all,
    expected_of_prompt,
    expected_of_subject,
    share_right,
)
from customized_grpo.toyworld.world import ATTRIBUTES, Scene, Subject
from tools.pretrain import corpus, export, reader


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle.load()


def pictures(examples) -> torch.Tensor:
    drawn = [draw.render(e.truth_subject, e.truth_scene, n) for n, e in enumerate(examples)]
    return torch.from_numpy(np.stack(drawn)).movedim(-1, 1).float() / 255


def test_it_reads_unseen_pictures(oracle: Oracle) -> None:
    accuracy = reader.measure(oracle, corpus.faithful(80, 4, seed=99, split="eval"))
    assert accuracy.keys() == ATTRIBUTES.keys()
    assert {name: value for name, value in accuracy.items() if value < 0.95} == {}


def test_true_pictures_score_high_and_copies_show_no_prompt(oracle: Oracle) -> None:
    examples = ToyWorld("eval", 48, seed=3)[:]
    true = pictures(examples)
    copies = torch.stack([torch.from_numpy(np.array(e.references[0])).movedim(-1, 0) / 255 for e in examples])
    kept, shown = SubjectKept(oracle), PromptShown(oracle)
    assert kept(true, examples).mean() > 0.95
    assert shown(true, examples).mean() > 0.95
    assert FullyRight(oracle)(true, examples).mean() > 0.85
    assert FullyRight(oracle)(copies, examples).sum() == 0
    assert kept(copies, examples).mean() > 0.95
    assert shown(copies, examples).mean() < 0.2


def test_what_is_unclear_is_not_right(tmp_path) -> None:
    torch.manual_seed(0)
    export.save_oracle(Oracle(64, least=0.9), tmp_path)  # untrained, so sure of nothing
    unsure, example = Oracle.load(tmp_path), ToyWorld("eval", 1)[0]
    read = unsure.read(pictures([example]))
    assert {int(value) for value in read.values()} == {-1}
    assert share_right(read, 0, expected_of_all(example)) == 0


def test_what_the_prompt_changes_is_not_expected_of_the_subject() -> None:
    for example in ToyWorld("train", 60):
        scene = example.truth_scene
        kept, asked = expected_of_subject(example), expected_of_prompt(example)
        assert ("colour" in kept) == (scene.recolour is None)
        assert ("eyes" in kept) == (scene.accessory != "sunglasses")
        assert asked.get("colour") == scene.recolour
        assert ("background" in asked) == (scene.background != "plain")
        assert asked  # every prompt asks for something


def test_a_colour_counts_only_on_the_right_thing() -> None:
    expected = {"accessory": "hat", "accessory_colour": "blue"}
    hat, crown = (ATTRIBUTES["accessory"].index(word) for word in ("hat", "crown"))
    blue = ATTRIBUTES["accessory_colour"].index("blue")
    read = {"accessory": torch.tensor([hat, crown, hat]), "accessory_colour": torch.tensor([blue, blue, blue + 1])}
    assert [share_right(read, row, expected) for row in range(3)] == [1.0, 0.0, 0.5]


def test_fully_right_is_all_of_the_prompt_and_all_that_it_leaves_of_the_subject(monkeypatch) -> None:
    """A recolouring in the snow: the old colour and the pattern's colour are not asked for, everything else is."""
    subject = Subject("star", "red", "stripes", "blue", "horns", "big", "smile")
    example = replace(
        ToyWorld("eval", 1)[0], truth_subject=subject, truth_scene=Scene("property", "snow", recolour="green")
    )
    right = {"background": "snow", "colour": "green", "noun": "star", "pattern": "stripes", "ears": "horns",
             "eyes": "big", "mouth": "smile"}  # fmt: skip
    other = {
        "pattern_colour": "pink",
        "accessory": "hat",
        "accessory_colour": "red",
        "companion": "none",
        "companion_colour": "red",
    }
    seen = [right, {**right, "colour": "red"}, {**right, "ears": "none"}, {**right, "background": "sea"}]
    read = {name: torch.tensor([v.index({**other, **row}[name]) for row in seen]) for name, v in ATTRIBUTES.items()}
    oracle = SimpleNamespace(read=lambda images: read)
    images, examples = torch.zeros(4, 3, 64, 64), [example] * 4
    assert FullyRight(oracle)(images, examples).tolist() == [1, 0, 0, 0]  # pyright: ignore[reportArgumentType]
    assert expected_of_all(example) == right
    assert FullyRight(oracle).marks(images, examples) == [  # pyright: ignore[reportArgumentType]
        {"snow": True, f"green {example.subject}": True, "subject kept": True},
        {"snow": True, f"green {example.subject}": False, "subject kept": True},
        {"snow": True, f"green {example.subject}": True, "subject's ears": False},
        {"snow": False, f"green {example.subject}": True, "subject kept": True},
    ]
    assert PromptShown(oracle)(images, examples).tolist() == [1, 0.5, 1, 0.5]  # pyright: ignore[reportArgumentType]
    kept = SubjectKept(oracle)(images, examples).tolist()  # pyright: ignore[reportArgumentType]
    assert kept == pytest.approx([1, 1, 0.8, 1])


def test_an_example_without_truth_is_not_scored(oracle: Oracle) -> None:
    example = ToyWorld("eval", 1)[0]
    photo = Example("photo", "a dog", example.references)
    scores = SubjectKept(oracle)(pictures([example, example]), [photo, example])
    assert scores.isnan().tolist() == [True, False]
    assert FullyRight(oracle)(pictures([example, example]), [photo, example]).isnan().tolist() == [True, False]
    assert scores.dtype == torch.float32


def test_other_sizes_are_resampled(oracle: Oracle) -> None:
    examples = ToyWorld("eval", 8, seed=1)[:]
    large = torch.nn.functional.interpolate(pictures(examples), scale_factor=2)
    assert PromptShown(oracle)(large, examples).mean() > 0.8
