from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity
from transformers import CLIPModel

from customized_grpo.data.images import to_pil
from customized_grpo.errors import UserError
from customized_grpo.rewards import ClipImageReward, ClipReward, Hpsv2Reward, PickScoreReward, check_reward
from customized_grpo.rewards.open_clip import clean_prompt, read_clip
from rewards import tiny

PROMPTS = ("a dog in the snow", "the red cat", "a hat on the beach")


@pytest.fixture
def examples():
    return [tiny.example(str(n), prompt) for n, prompt in enumerate(PROMPTS)]


@pytest.fixture
def outputs(models, images):
    """What CLIPModel itself says of the three pictures and prompts, through the processors of transformers."""
    pixels = tiny.clip_processor()([to_pil(row) for row in images], return_tensors="pt")["pixel_values"]
    tokens = tiny.tokenizer()(list(PROMPTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        return CLIPModel.from_pretrained(models["clip"]).eval()(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels
        )


def test_clip_t_equals_the_model(models, images, examples, outputs):
    scores = ClipReward(models["clip"])(images, examples)
    assert scores.std() > 1e-3
    assert torch.allclose(scores, cosine_similarity(outputs.image_embeds, outputs.text_embeds), atol=5e-3)


def test_pickscore_is_the_models_logit(models, images, examples, outputs):
    scores = PickScoreReward(models["clip"], processor=None)(images, examples)
    assert torch.allclose(scores, outputs.logits_per_image.diag(), rtol=0.02, atol=0.08)


def test_pickscore_takes_its_processor_from_elsewhere(models, images, examples, tmp_path):
    weights = tiny.save_clip(tmp_path / "weights", processor=False)
    processor = tiny.save_processor(tmp_path / "processor")
    scores = PickScoreReward(weights, processor=processor)(images, examples)
    assert torch.equal(scores, PickScoreReward(models["clip"], processor=None)(images, examples))


def test_clip_i_equals_the_model(models, images):
    reward = ClipImageReward(models["clip"])
    example = tiny.example(references=2)
    model, processor = CLIPModel.from_pretrained(models["clip"]).eval(), tiny.clip_processor()
    with torch.no_grad():
        rows, references = (
            torch.cat([
                model.get_image_features(processor(picture, return_tensors="pt")["pixel_values"]).pooler_output
                for picture in pictures
            ])
            for pictures in ([to_pil(row) for row in images], example.references)
        )  # fmt: skip
    expected = cosine_similarity(rows[:, None], references[None], dim=-1)
    assert torch.allclose(reward(images, [example] * 3), expected.mean(1), atol=5e-3)
    best = ClipImageReward(models["clip"], reduce="max")(images, [example] * 3)
    assert torch.allclose(best, expected.amax(1), atol=5e-3)


@pytest.mark.parametrize("kind", [ClipReward, ClipImageReward])
def test_obeys_the_contract(kind, models, images, examples):
    check_reward(kind(models["clip"]), images, examples)


def test_half_precision_weights_are_read_as_float32(tmp_path, images, examples):
    half = ClipReward(tiny.save_clip(tmp_path, dtype=torch.float16))
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    assert half(images, examples).dtype == torch.float32


def test_a_prompt_longer_than_clip_reads_is_cut_and_said(models, images):
    reward = ClipReward(models["clip"])
    long = tiny.example(prompt=" ".join(["red"] * 20))
    cut = tiny.example(prompt=" ".join(["red"] * 6))
    with pytest.warns(UserWarning, match="1 prompts are longer than the 8 tokens"):
        scores = reward(images, [long] * 3)
    assert torch.allclose(scores, reward(images, [cut] * 3), atol=1e-6)


# ---- HPSv2.1: open_clip's layout


@pytest.fixture
def reference(request):
    """A tiny open_clip model with its own outputs, computed with open_clip_torch (see the file's metadata)."""
    tensors = load_file(request.path.parent / "vectors" / "open_clip_tiny.safetensors")
    state = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
    return state, tensors


def test_open_clip_weights_give_open_clips_features(reference):
    from customized_grpo.rewards.open_clip import clip_from_open_clip

    state, tensors = reference
    model = clip_from_open_clip(state, vision_head_width=8, text_head_width=4).eval()
    with torch.no_grad():
        image = model.get_image_features(tensors["pixels"]).pooler_output
        text = model.get_text_features(tensors["tokens"]).pooler_output
    for ours, theirs in ((image, "image_features"), (text, "text_features")):
        assert torch.allclose(torch.nn.functional.normalize(ours, dim=-1), tensors[theirs], atol=2e-5)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_hpsv2_reads_a_checkpoint(suffix, reference, images, tmp_path):
    state, _ = reference
    checkpoint = tmp_path / f"HPS_v2.1_compressed{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": state}, checkpoint)
    else:
        save_file(state, checkpoint)
    reward = Hpsv2Reward(checkpoint, processor=tiny.save_processor(tmp_path / "processor"))
    examples = [tiny.example(str(n), prompt) for n, prompt in enumerate(PROMPTS)]
    scores = reward(images, examples)
    assert scores.abs().max() <= 1
    check_reward(reward, images, examples)


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [  # what open_clip 3.3.0 makes of them before its byte pair encoding
        ("“It’s” ﬁne", '"it\'s" fine'),
        ("Ａ ｒｅｄ ｄｏｇ", "a red dog"),
        ("red &amp; &amp;amp; &lt;dog", "red & & <dog"),
        (" a\u2028red\t\nhat ", "a red hat"),
        ("cafe\u0301", "café"),
        ("a red hat!", "a red hat!"),
    ],
)
def test_hpsv2_cleans_prompts_as_open_clip_does(prompt, cleaned, models, images):
    assert clean_prompt(prompt) == cleaned
    example = tiny.example("0", prompt)
    reward = Hpsv2Reward(models["clip"], processor=models["clip"])
    assert torch.equal(reward(images[:1], [example]), reward(images[:1], [replace(example, prompt=cleaned)]))


def test_hpsv2_reads_the_transformers_layout(models, images, examples):
    scores = Hpsv2Reward(models["clip"], processor=models["clip"])(images, examples)
    assert torch.allclose(scores, ClipReward(models["clip"])(images, examples), atol=1e-5)  # square pictures: the same


def test_bad_checkpoints_are_one_sentence(reference, models, tmp_path):
    state, _ = reference
    lacking = {name: t for name, t in state.items() if name != "visual.ln_post.bias"}
    for tensors, sentence in (
        (lacking, "lacks 'vision_model.post_layernorm.bias'"),
        (state | {"extra": torch.ones(1)}, "has an unknown 'extra'"),
        ({"w": torch.ones(1)}, "not a CLIP ViT in open_clip's layout"),
    ):
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=sentence):
            read_clip(tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="neither an existing folder nor a hub id"):
        Hpsv2Reward(tmp_path / "nowhere.pt", processor=models["clip"])


def test_a_checkpoint_with_code_in_it_is_not_run(models, tmp_path):
    torch.save({"state_dict": _Payload(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="Could not load an HPSv2 checkpoint"):
        Hpsv2Reward(tmp_path / "evil.pt", processor=models["clip"])
    assert not (tmp_path / "ran").exists()


class _Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))
