import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity, normalize
from transformers import AutoModel

from customized_grpo.data.images import to_pil, to_tensor
from customized_grpo.errors import UserError
from customized_grpo.rewards import DinoReward, check_reward
from rewards import tiny

PROCESSORS = {1: tiny.vit_processor(), 2: tiny.bit_processor(), 3: tiny.vit_processor()}


@pytest.mark.parametrize("version", [1, 2, 3])
def test_equals_model_and_processor_of_transformers(version, models, images):
    """One picture at a time through the family's own processor; 8-bit rounding leaves a few thousandths."""
    folder = models[f"dino{version}"]
    model, example = AutoModel.from_pretrained(folder).eval(), tiny.example()

    def embed(picture):
        pixels = PROCESSORS[version](picture, return_tensors="pt")["pixel_values"]
        return model(pixel_values=pixels).last_hidden_state[:, 0]

    with torch.no_grad():
        expected = [cosine_similarity(embed(to_pil(row)), embed(example.references[0])) for row in images]
    scores = DinoReward(folder)(images, [example] * 3)
    assert scores.std() > 1e-3
    assert torch.allclose(scores, torch.cat(expected), atol=5e-3)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_obeys_the_contract(version, models, images):
    check_reward(DinoReward(models[f"dino{version}"]), images, [tiny.example(references=n) for n in (1, 2, 3)])


def test_a_copy_of_the_reference_scores_one(models):
    example = tiny.example()
    copy = to_tensor(example.references[0])[None]
    assert DinoReward(models["dino2"])(copy, [example]).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_several_references(reduce, models, images):
    """The score against three references is the mean, or the best, of the scores against each."""
    example = tiny.example(references=3)
    each = [
        DinoReward(models["dino1"])(images, [tiny.Example("e", "p", (reference,))] * 3)
        for reference in example.references
    ]
    expected = torch.stack(each).mean(0) if reduce == "mean" else torch.stack(each).amax(0)
    scores = DinoReward(models["dino1"], reduce=reduce)(images, [example] * 3)
    assert torch.allclose(scores, expected, atol=1e-5)


def test_rows_with_different_numbers_of_references(models, images):
    examples = [tiny.example(references=n) for n in (1, 3, 2)]
    reward = DinoReward(models["dino1"])
    together = reward(images, examples)
    alone = torch.cat([reward(images[n : n + 1], examples[n : n + 1]) for n in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_mask_hides_the_background_of_the_reference(models, images):
    """Two references that differ outside the mask only are one and the same when segmented, and are not otherwise."""
    mask = Image.new("L", (40, 40), 0)
    mask.paste(255, (10, 10, 30, 30))
    scenes = [tiny.picture(seed=7), tiny.picture(seed=8)]
    scenes[1].paste(scenes[0].crop((10, 10, 30, 30)), (10, 10))
    examples = [tiny.Example("e", "p", (scene,), masks=(mask,)) for scene in scenes]
    segmented, whole = (
        [DinoReward(models["dino2"], segment=segment)(images, [example] * 3) for example in examples]
        for segment in (True, False)
    )
    assert torch.allclose(*segmented)
    assert not torch.allclose(*whole, atol=1e-3)


def test_several_subjects_should_be_there_once_each(models, images):
    """Embeddings are mean colours: red and green have a cosine of 0, and yellow 0.707 with both."""
    crops = [["red", "lime"], ["red", "red"], ["red", "lime", "lime"], ["yellow", "yellow"], ["lime"], []]
    found = iter([[Image.new("RGB", (4, 4), colour) for colour in some] for some in crops])
    reward = DinoReward(models["dino2"], detector=lambda image: next(found))
    reward.embed_pictures = lambda some: normalize(torch.stack([to_tensor(x).mean((1, 2)) for x in some]), dim=-1)
    example = tiny.Example("e", "p", tuple(Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")))
    scores = reward(images[:1].expand(6, -1, -1, -1), [example] * 6)
    assert scores.tolist() == pytest.approx([0.5, 0, 1 / 6, 0, 0.5, 0], abs=1e-6)
    found = iter([[], []])
    assert reward(images[:2], [example] * 2).tolist() == [0, 0]
    with pytest.raises(UserError, match="detector compares with the references and target_centre with the target"):
        DinoReward(models["dino2"], detector=lambda image: [], target_centre=0.65)


def test_batches_do_not_change_scores(models, images):
    examples = [tiny.example(references=2)] * 3
    whole = DinoReward(models["dino2"])(images, examples)
    assert torch.allclose(DinoReward(models["dino2"], batch_size=2)(images, examples), whole, atol=1e-6)


def test_bad_input_is_one_sentence(models, tmp_path):
    with pytest.raises(UserError, match=r"'median'.*'mean' or 'max'"):
        DinoReward(models["dino1"], reduce="median")
    with pytest.raises(UserError, match="is a clip model; DinoReward takes one of vit, dinov2"):
        DinoReward(models["clip"])
    with pytest.raises(UserError, match="neither an existing folder nor a hub id"):
        DinoReward(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text((models["dino1"] / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="Could not load a DINO model from"):
        DinoReward(tmp_path)


def test_grey_identity_sees_no_colours(models, images):
    swapped = images.clone()
    swapped[:, 0] += 0.114 * 0.2  # brightness is 0.299 red + 0.587 green + 0.114 blue
    swapped[:, 2] -= 0.299 * 0.2
    grey, coloured = (DinoReward(models["dino2"], grey=value) for value in (True, False))
    example = tiny.example()
    assert torch.allclose(grey(images, [example] * 3), grey(swapped, [example] * 3), atol=1e-5)
    assert not torch.allclose(coloured(images, [example] * 3), coloured(swapped, [example] * 3), atol=1e-5)


def test_identity_with_a_target_is_a_sigmoid_of_its_cosine(models, images):
    reference, target = tiny.picture(seed=7), tiny.picture(seed=8)
    example = tiny.Example("e", "p", (reference,), target=target)
    scores = DinoReward(models["dino2"], target_centre=0.5)(images, [example, tiny.example(), example])
    cosines = DinoReward(models["dino2"])(images, [tiny.Example("t", "p", (target,))] * 3)
    assert torch.allclose(scores[[0, 2]], torch.sigmoid(7 * (cosines[[0, 2]] - 0.5)), atol=1e-5)
    assert scores[1].isnan()


def test_the_subject_of_the_image_is_cut_out(models, images, monkeypatch):
    """The segmenter sees the image, and what lies outside its mask is white before it is embedded."""

    def left_half(picture):
        mask = Image.new("L", picture.size, 0)
        mask.paste(255, (0, 0, picture.width // 2, picture.height))
        return mask

    monkeypatch.setattr("customized_grpo.data.segment.make_segmenter", lambda name: {"half": left_half}[name])
    cut = images.clone()
    cut[..., images.shape[-1] // 2 :] = 1
    examples = [tiny.example()] * len(images)
    whole = DinoReward(models["dino2"])
    scores = DinoReward(models["dino2"], segmenter="half")(images, examples)
    torch.testing.assert_close(scores, whole(cut, examples))
    assert (scores - whole(images, examples)).abs().max() > 1e-3
