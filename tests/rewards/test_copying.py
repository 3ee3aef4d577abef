from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from customized_grpo.data.images import to_tensor
from customized_grpo.rewards.contract import check_reward
from customized_grpo.rewards.copying import BackgroundCopied, Diversity, PoseCopied, ReferenceCopied
from customized_grpo.structures import Example
from customized_grpo.toyworld.dataset import ToyExample, ToyWorld
from customized_grpo.toyworld.draw import background, render
from customized_grpo.toyworld.world import REFERENCE


def square(colour: str, ground: str, left: int = 4) -> tuple[Image.Image, Image.Image]:
    """A square of 8 x 8 on a ground of 16 x 16, and its mask."""
    picture, mask = Image.new("RGB", (16, 16), ground), Image.new("L", (16, 16), 0)
    for image, fill in ((picture, colour), (mask, 255)):
        image.paste(fill, (left, 4, left + 8, 12))
    return picture, mask


def example(colour: str = "red", ground: str = "white") -> Example:
    picture, mask = square(colour, ground)
    return Example("e", "a square at night", (picture,), masks=(mask,))


def drawn(picture: Image.Image) -> Tensor:
    return to_tensor(picture).unsqueeze(0)


def test_background_copied_by_hand() -> None:
    measure = BackgroundCopied()
    assert float(measure(drawn(square("blue", "white")[0]), [example()])) == 1.0
    assert float(measure(drawn(square("red", "black")[0]), [example()])) == 0.0
    half = square("red", "white")[0]
    half.paste("black", (0, 0, 8, 16))
    assert float(measure(drawn(half), [example()])) == pytest.approx(0.5)


def test_pose_copied_sees_place_and_not_colour() -> None:
    measure = PoseCopied()
    same, moved = square("red", "white")[0], square("red", "white", left=7)[0]
    dark = square("black", "gray")[0]
    assert float(measure(drawn(same), [example()])) == pytest.approx(1.0)
    assert float(measure(drawn(dark), [example()])) == pytest.approx(1.0)
    assert float(measure(drawn(moved), [example()])) < 0.5


@pytest.mark.parametrize("measure", [BackgroundCopied(), PoseCopied()])
def test_without_a_mask_nothing_is_said(measure) -> None:
    bare = Example("e", "a square", example().references)
    assert measure(drawn(bare.references[0]), [bare]).isnan().all()


def test_the_most_copied_reference_counts() -> None:
    one, two = example("red", "white"), example("red", "black")
    both = Example("e", "p", (*one.references, *two.references), masks=(*one.masks, None))
    assert float(BackgroundCopied()(drawn(two.references[0]), [both])) == 0.0
    both = Example("e", "p", (*one.references, *two.references), masks=(*one.masks, *two.masks))
    assert float(BackgroundCopied()(drawn(two.references[0]), [both])) == 1.0


def test_pictures_of_another_size_are_compared_at_theirs() -> None:
    large = square("red", "white")[0].resize((32, 32), Image.Resampling.NEAREST)
    assert float(BackgroundCopied()(drawn(large), [example()])) == 1.0


def test_in_the_toy_world_copies_stand_out() -> None:
    examples = ToyWorld("eval", 24)[:]

    def pictures(scene_of) -> Tensor:
        drawings = [render(e.truth_subject, scene_of(e), 1000 + n) for n, e in enumerate(examples)]
        return torch.stack([to_tensor(Image.fromarray(drawing)) for drawing in drawings])

    def true_scene(task: ToyExample):
        return task.truth_scene

    right = pictures(true_scene)
    pasted = torch.stack([to_tensor(task.references[0]) for task in examples])
    redrawn = pictures(lambda task: REFERENCE)
    background, pose = BackgroundCopied(), PoseCopied()
    assert background(right, examples).nanmean() < 0.25
    assert background(redrawn, examples).nanmean() > 0.95
    plain = [task.truth_scene.background == "plain" for task in examples]
    assert background(pasted, examples).isnan().tolist() == plain
    assert pose(right, examples).mean() < 0.5 < pose(redrawn, examples).mean() < 0.8
    torch.testing.assert_close(pose(pasted, examples), torch.ones(24))


def test_a_pasted_subject_is_told_from_one_drawn_again() -> None:
    """At 128 pixels, where a scene moves and turns the creature: its own pixels in a new place, and a new drawing."""
    tasks = [task for task in ToyWorld("eval", 16, size=128)[:] if task.truth_scene.background != "plain"]
    drawn_again, pasted = [], []
    for n, task in enumerate(tasks):
        drawn_again.append(to_tensor(Image.fromarray(render(task.truth_subject, task.truth_scene, 1000 + n, 128))))
        place = Image.fromarray(background(task.truth_scene.background, n % 12, 128).astype("uint8"))
        assert task.masks[0]
        pasted.append(to_tensor(Image.composite(task.references[0], place, task.masks[0])))
    assert PoseCopied()(torch.stack(pasted), tasks).amin() > 0.5
    assert PoseCopied()(torch.stack(drawn_again), tasks).amax() < 0.3
    assert BackgroundCopied()(torch.stack(pasted), tasks).amax() < 0.6  # one sky may be like another
    copies = torch.stack([to_tensor(task.references[0]) for task in tasks])
    assert BackgroundCopied()(copies, tasks).amin() > 0.99


def test_diversity_by_hand() -> None:
    images = torch.tensor([0.0, 0.3, 0.9, 0.5]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    one, alone = Example("one", "", ()), Example("alone", "", ())
    found = Diversity()(images, [one, one, one, alone])
    torch.testing.assert_close(found, torch.tensor([0.6, 0.45, 0.75, torch.nan]), equal_nan=True)


def test_diversity_by_an_encoder(tmp_path: Path) -> None:
    from rewards import tiny

    path = tiny.save_dino(tmp_path, version=2)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[1] = images[0]
    found = Diversity(str(path))(images, [Example("a", "", ())] * 3)
    assert found[0] == pytest.approx(float(found[1]), abs=1e-3)
    assert found[2] > found[0] > 0


@pytest.mark.parametrize("measure", [BackgroundCopied(), PoseCopied(), Diversity()])
def test_measures_obey_the_contract(measure) -> None:
    examples = [task for task in ToyWorld("eval", 3)[:] for _ in range(2)]
    check_reward(measure, torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)), examples)


def test_reference_copied_tells_a_copy_from_a_new_image_of_the_subject() -> None:
    examples, measure = ToyWorld("eval", 3)[:], ReferenceCopied("toyworld:dino")
    copies = torch.stack([to_tensor(task.references[0]) for task in examples])
    targets = torch.stack([to_tensor(task.target) for task in examples])
    torch.testing.assert_close(measure(copies, examples), torch.ones(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(measure(targets, examples), -torch.ones(3), atol=1e-3, rtol=0)
    second = replace(examples[0], references=(examples[1].references[0], examples[0].references[0]))
    bare = replace(examples[0], target=None)
    scores = measure(copies[[0, 0, 2]], [second, bare, examples[2]])
    assert (float(scores[0]), bool(scores[1].isnan()), float(scores[2])) == pytest.approx((1.0, True, 1.0), abs=1e-3)
    check_reward(measure, copies, examples)
