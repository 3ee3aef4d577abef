"""CLIP, the prompt reward: trained to distinguish prompts that differ in one word."""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from customized_grpo.toyworld.draw import SIZE
from customized_grpo.toyworld.world import (
    ACCESSORIES,
    ATTRIBUTES,
    COLOURED_ACCESSORIES,
    COLOURS,
    COMPANIONS,
    NOUNS,
    PLACES,
    Scene,
    prompt,
)
from tools.pretrain import augment
from tools.pretrain.corpus import Corpus
from tools.pretrain.models import Clip, Tokenizer
from tools.pretrain.tokenizers import MAX_TOKENS
from tools.pretrain.tokenizers import build as build_tokenizer

MEAN = STD = (0.5, 0.5, 0.5)
SWAPS = ("noun", "background", "accessory", "accessory_colour", "companion", "companion_colour", "recolour")
"""The kinds of word that `swap_word` can replace."""
NEGATIVES = 3
"""Negative texts per image in a batch: its own prompt with one word replaced."""


def build(size: int = SIZE) -> Clip:
    from transformers import CLIPConfig, CLIPModel

    tokenizer = build_tokenizer(begin=True, size=size)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": size,
        "patch_size": size // 8,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))


def tokenize(tokenizer: Tokenizer, prompts: Sequence[str]) -> Tensor:
    """(len(prompts), 16) int64."""
    return tokenizer(
        list(prompts), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def normalize(images: Tensor) -> Tensor:
    """Map [0, 1] to [-1, 1], as the saved image processors do."""
    return images * 2 - 1


def embed_images(clip: Clip, images: Tensor) -> Tensor:
    """Unit vectors (B, 96) of images (B, 3, S, S) in [0, 1]."""
    pooled = clip.vision_model(pixel_values=normalize(images)).pooler_output
    return F.normalize(clip.visual_projection(pooled).float(), dim=-1)


def embed_texts(clip: Clip, ids: Tensor) -> Tensor:
    """Unit vectors (B, 96) of token ids (B, 16)."""
    pooled = clip.text_model(
        input_ids=ids, attention_mask=(ids != clip.config.text_config.pad_token_id).long()
    ).pooler_output
    return F.normalize(clip.text_projection(pooled).float(), dim=-1)


class Student(nn.Module):
    """CLIP with attribute heads on its image tower. The heads are an auxiliary loss and are not saved."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip = clip
        width = clip.config.vision_config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in ATTRIBUTES.items()})


def loss(student: Student, pairs: "Pairs", batch_size: int, generator: torch.Generator) -> Tensor:
    """Contrastive loss over the batch and hard negatives with one word replaced, plus cross-entropy of the heads."""
    clip = student.clip
    device = clip.device
    n, v, images = pairs.sample(batch_size, generator)
    choice = torch.randint(pairs.swapped.shape[2], (batch_size, NEGATIVES), generator=generator)
    texts = torch.cat([pairs.ids[n, v], pairs.swapped[n[:, None], v[:, None], choice].flatten(0, 1)]).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
        pooled = clip.vision_model(pixel_values=normalize(images.to(device))).pooler_output
        image = F.normalize(clip.visual_projection(pooled).float(), dim=-1)
        text = embed_texts(clip, texts)
        read = {name: head(pooled).float() for name, head in student.heads.items()}
    logits = clip.logit_scale.exp().clamp(max=60) * image @ text.T
    attributes = sum(
        F.cross_entropy(read[name], labels[n, v].to(device), ignore_index=-1)
        for name, labels in pairs.labels.items()
        if (labels[n, v] >= 0).any()
    )
    return _contrast(logits, texts) + 0.3 * attributes


def _contrast(logits: Tensor, texts: Tensor) -> Tensor:
    """Sum of image to text, text to image, and image to its own negatives.

    Args:
        logits: (B, B + NEGATIVES * B); column b is image b's prompt; the negatives follow, image by image.
        texts: (B + NEGATIVES * B, 16) token ids; all texts equal to the prompt count as correct.
    """
    count = len(logits)
    same = (texts[:count, None] == texts[None]).all(-1).float()
    matches = same[:, :count]
    to_text = -(same / same.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    to_image = -(matches / matches.sum(0) * logits[:, :count].log_softmax(0)).sum(0).mean()
    swaps = logits[:, count:].view(count, count, NEGATIVES).diagonal(dim1=0, dim2=1).T
    own = torch.cat([logits[:, :count].diagonal()[:, None], swaps], dim=1)
    return (to_text + to_image) / 2 - own.log_softmax(1)[:, 0].mean()


class Pairs:
    """A corpus with its prompts and their negatives as token ids."""

    def __init__(self, corpus: Corpus, seed: int, swaps: int = 6) -> None:
        tokenizer = build_tokenizer(begin=True, size=corpus.size)
        rng = random.Random(seed)
        self.images = corpus.images
        self.labels = corpus.labels()
        shape = self.images.shape[:2]
        self.ids = tokenize(tokenizer, [p for row in corpus.prompts for p in row]).view(*shape, -1)
        changed = [
            swap_word(rng, subject.noun, scene, rng.choice(swappable(scene)), an=corpus.an)
            for subject, row in zip(corpus.subjects, corpus.scenes, strict=True)
            for scene in row
            for _ in range(swaps)
        ]
        self.swapped = tokenize(tokenizer, changed).view(*shape, swaps, -1)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (count,), columns (count,), augmented images (count, 3, S, S) in [0, 1]; 6 % are references."""
        n = torch.randint(len(self.images), (count,), generator=generator)
        v = torch.randint(1, self.images.shape[1], (count,), generator=generator)
        v = torch.where(torch.rand(count, generator=generator) < 0.06, 0, v)
        images = self.images[n, v].float() / 255
        images[::3] = augment.degrade(images[::3], generator)
        return n, v, augment.jitter(images, generator)


def swappable(scene: Scene) -> list[str]:
    """The kinds of word that the scene's prompt contains."""
    there = {"noun": True, "background": scene.background != "plain"}
    return [kind for kind in SWAPS if there.get(kind, getattr(scene, kind, None))]


def swap_word(rng: random.Random, noun: str, scene: Scene, kind: str, *, an: bool) -> str:
    """The prompt with its word of that kind replaced by another one."""
    if kind == "noun":
        return prompt(rng.choice([n for n in NOUNS if n != noun]), scene, an=an)
    values = {"background": tuple(PLACES), "accessory": ACCESSORIES, "companion": COMPANIONS}.get(kind, COLOURS)
    value = rng.choice([v for v in values if v != getattr(scene, kind)])
    changed = replace(scene, **{kind: value})
    if kind == "accessory":
        colour = scene.accessory_colour or rng.choice(COLOURS)
        changed = replace(changed, accessory_colour=colour if value in COLOURED_ACCESSORIES else None)
    return prompt(noun, changed, an=an)


@torch.no_grad()
def measure(clip: Clip, corpus: Corpus, seed: int = 0) -> dict[str, float]:
    """Accuracy against negatives per kind of word, and retrieval among 500 both ways, on a faithful corpus."""
    tokenizer = build_tokenizer(begin=True, size=corpus.size)
    rng = random.Random(seed)
    images = corpus.images[:, 1:].flatten(0, 1)
    image = torch.cat([embed_images(clip, chunk.to(clip.device) / 255).cpu() for chunk in images.split(250)])
    texts = [p for row in corpus.prompts for p in row[1:]]
    ids = tokenize(tokenizer, texts).to(clip.device)
    text = torch.cat([embed_texts(clip, chunk).cpu() for chunk in ids.split(500)])
    right = (image * text).sum(-1)
    scenes = [(s.noun, scene) for s, row in zip(corpus.subjects, corpus.scenes, strict=True) for scene in row[1:]]
    result: dict[str, float] = {}
    for kind in SWAPS:
        rows = [k for k, (_, scene) in enumerate(scenes) if kind in swappable(scene)]
        changed = tokenize(tokenizer, [swap_word(rng, *scenes[k], kind, an=corpus.an) for k in rows]).to(clip.device)
        wrong = (image[rows] * embed_texts(clip, changed).cpu()).sum(-1)
        result[f"swap {kind}"] = (right[rows] > wrong).float().mean().item()
    similarity = image[:500] @ text[:500].T
    same = torch.tensor([[a == b for b in texts[:500]] for a in texts[:500]])
    result["retrieval image to text"] = same.gather(1, similarity.argmax(1, keepdim=True)).float().mean().item()
    result["retrieval text to image"] = same.gather(0, similarity.argmax(0, keepdim=True)).float().mean().item()
    return result
