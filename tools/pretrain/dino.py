"""DINOv2, the identity reward: trained to recognise a subject in any scene."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from customized_grpo.toyworld.draw import SIZE
from customized_grpo.toyworld.world import ATTRIBUTES, KINDS, SUBJECT_ATTRIBUTES
from tools.pretrain import augment
from tools.pretrain.clip import normalize
from tools.pretrain.corpus import Corpus
from tools.pretrain.models import Dino

TEMPERATURE = 0.1
RECOLOURED_WEIGHT = 0.3
"""Weight of a pair in which one image is recoloured, because its identity is partly lost."""


def build(size: int = SIZE) -> Dino:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(
        Dinov2Config(
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            mlp_ratio=3,
            image_size=size,
            patch_size=size // 8,
        )
    )


def embed(dino: Dino, images: Tensor) -> Tensor:
    """Unit vectors (B, 128), the class token, of images (B, 3, S, S) in [0, 1]."""
    return F.normalize(dino(pixel_values=normalize(images)).last_hidden_state[:, 0].float(), dim=-1)


class Student(nn.Module):
    """DINOv2 with attribute heads on its class token. The heads are an auxiliary loss and are not saved."""

    def __init__(self, dino: Dino) -> None:
        super().__init__()
        self.dino = dino
        self.heads = nn.ModuleDict(
            {name: nn.Linear(dino.config.hidden_size, len(ATTRIBUTES[name])) for name in SUBJECT_ATTRIBUTES}
        )


class Views:
    """A corpus with its labels, for sampling pairs of images of one subject."""

    def __init__(self, corpus: Corpus) -> None:
        self.images, self.labels, self.masks = corpus.images, corpus.labels(), corpus.masks
        self.recoloured = torch.tensor([[scene.recolour is not None for scene in row] for row in corpus.scenes])
        order = sorted(range(len(corpus.subjects)), key=lambda n: (corpus.subjects[n].noun, corpus.subjects[n].colour))
        self.alike = torch.tensor(order)
        """Rows sorted by noun and colour."""

    def sample(self, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (pairs,) and two columns each. Rows come in groups of eight similar subjects as hard negatives."""
        starts = torch.randint(len(self.alike) - 8, (pairs // 8, 1), generator=generator)
        rows = self.alike[(starts + torch.arange(8)).flatten()]
        views = self.images.shape[1]
        first = torch.randint(1, views, (pairs,), generator=generator)
        other = (first + torch.randint(1, views, (pairs,), generator=generator)) % views
        use_reference = torch.rand(pairs, generator=generator) < 0.6
        return rows, first, torch.where(use_reference, 0, other)

    def pictures(self, rows: Tensor, columns: Tensor, generator: torch.Generator) -> Tensor:
        """Augmented images (B, 3, S, S) in [0, 1]. Half of the references are cut out on white, as in the reward."""
        images = self.images[rows, columns].float() / 255
        cut = ((columns == 0) & (torch.rand(len(columns), generator=generator) < 0.5)).nonzero()[:, 0]
        mask = self.masks[rows[cut], 0, None].float() / 255
        images[cut] = torch.lerp(torch.ones(()), images[cut], mask)
        images[::3] = augment.degrade(images[::3], generator)
        return augment.jitter(images, generator)


def loss(student: Student, views: Views, pairs: int, generator: torch.Generator) -> Tensor:
    """InfoNCE between two images of each subject, plus cross-entropy of the attribute heads."""
    rows, first, second = views.sample(pairs, generator)
    n, v = torch.cat([rows, rows]), torch.cat([first, second])
    device = student.dino.device
    images = views.pictures(n, v, generator).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
        token = student.dino(pixel_values=normalize(images)).last_hidden_state[:, 0]
        read = {name: head(token).float() for name, head in student.heads.items()}
    recoloured = (views.recoloured[rows, first] | views.recoloured[rows, second]).float()
    weight = (1 - (1 - RECOLOURED_WEIGHT) * recoloured).repeat(2)
    attributes = sum(
        F.cross_entropy(read[name], views.labels[name][n, v].to(device), ignore_index=-1)
        for name in SUBJECT_ATTRIBUTES
        if name != "colour"  # recolouring keeps the identity
    )
    return _info_nce(token.float(), n.to(device), weight.to(device)) + 0.15 * attributes


def _info_nce(tokens: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Weighted cross-entropy of token b of (2P, D) picking token b + P (modulo 2P) among those of other rows (2P,)."""
    z = F.normalize(tokens, dim=-1)
    index = torch.arange(len(rows), device=rows.device)
    partner = index.roll(len(rows) // 2)
    excluded = rows[:, None] == rows[None]  # itself, and duplicates of its row
    excluded[index, partner] = False
    similarity = (z @ z.T / TEMPERATURE).masked_fill(excluded, -1e4)
    return (F.cross_entropy(similarity, partner, reduction="none") * weight).mean()


@torch.no_grad()
def measure(dino: Dino, corpus: Corpus) -> dict[str, float]:
    """Accuracy of retrieving the reference of a scene among all subjects, and cosines, on a faithful corpus."""
    views = [
        torch.cat([embed(dino, chunk.to(dino.device) / 255).cpu() for chunk in corpus.images[:, v].split(250)])
        for v in range(corpus.images.shape[1])
    ]
    reference = views[0]
    recoloured = torch.tensor([[scene.recolour is not None for scene in row] for row in corpus.scenes])
    found, own, other = [], [], []
    for view in views[1:]:
        similarity = view @ reference.T
        found.append(similarity.argmax(1) == torch.arange(len(reference)))
        own.append(similarity.diagonal())
        other.append((view * reference.roll(1, 0)).sum(-1))
    hits, cosines = torch.stack(found, 1).float(), torch.stack(own, 1)
    plain = ~recoloured[:, 1:]
    kinds = {kind: torch.tensor([[s.kind == kind for s in row[1:]] for row in corpus.scenes]) for kind in KINDS}
    return {
        "top-1 without recolouring": hits[plain].mean().item(),
        "top-1": hits.mean().item(),
        **{f"cosine to own reference, {kind}": cosines[chosen].mean().item() for kind, chosen in kinds.items()},
        "cosine to another reference": torch.stack(other).mean().item(),
    }
