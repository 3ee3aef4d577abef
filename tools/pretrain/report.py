"""Measure the components on unseen subjects; write figures, sample grids and one self-contained page."""

import base64
import io
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader
from PIL import Image, ImageDraw
from torch import Tensor

from customized_grpo.toyworld import draw, world
from customized_grpo.toyworld.dataset import ToyExample, ToyWorld
from customized_grpo.toyworld.oracle import Oracle, expected_of_prompt, expected_of_subject, share_right
from tools.pretrain import autoencoder, clip, corpus, dino, generator, reader

SEED = 7_000
"""Seed of all measurements; no training corpus uses it."""
ZOOM = 2

Figures = dict[str, dict[str, float]]
Pictures = dict[str, Image.Image]


def write_report(folder: Path, device: torch.device, subjects: int = 500, size: int = draw.SIZE) -> Path:
    """Measure the components in `folder`; write figures.json, samples/ and report.html.

    Args:
        subjects: number of unseen subjects to measure on.
        size: width and height of the images.
    """
    figures, pictures = measure(folder, device, subjects, size)
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (folder / "samples").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        picture.save(folder / "samples" / f"{name}.png")
    path = folder / "report.html"
    path.write_text(_page(figures, pictures), encoding="utf-8")
    return path


def measure(folder: Path, device: torch.device, subjects: int = 500, size: int = draw.SIZE) -> tuple[Figures, Pictures]:
    """Figures by component and sample grids by name."""
    from diffusers import FluxKontextPipeline
    from transformers import CLIPModel, Dinov2Model

    def load(kind: Any, name: str) -> Any:
        return kind.from_pretrained(folder / name).eval().to(device)

    unseen = corpus.faithful(subjects, 4, SEED, "eval", size=size)
    figures: Figures = {"renderer": {"images per second": images_per_second(size)}}
    pictures: Pictures = {"world": _world_sheet(size)}
    if (folder / "pipeline" / "vae").is_dir():
        vae = load(type(autoencoder.build(size)), "pipeline/vae")
        pixels = unseen.images[:200].flatten(0, 1).to(device) / 127.5 - 1
        masks = unseen.masks[:200].flatten(0, 1).to(device) > 127
        chunks = zip(pixels.split(100), masks.split(100), strict=True)
        decibels, on_subject = torch.cat([autoencoder.psnr(vae, *chunk) for chunk in chunks]).unbind(-1)
        figures["autoencoder"] = {
            "PSNR mean, dB": decibels.mean().item(),
            "PSNR worst 5 %, dB": decibels.quantile(0.05).item(),
            "PSNR on the subject, dB": on_subject.mean().item(),
            "seconds to decode 64 images": autoencoder.decoding_seconds(vae),
        }
        pictures["reconstructions"] = _reconstructions(vae, pixels[:10])
    if (folder / "clip").is_dir():
        figures["clip"] = clip.measure(load(CLIPModel, "clip"), unseen)
    if (folder / "dino").is_dir():
        figures["dino"] = dino.measure(load(Dinov2Model, "dino"), unseen)
    if (folder / "oracle").is_dir():
        oracle = Oracle.load(folder / "oracle").to(device)
        figures["oracle"] = reader.measure(oracle, unseen)
        if (folder / "pipeline" / "model_index.json").is_file():
            pipeline = FluxKontextPipeline.from_pretrained(folder / "pipeline").to(device)
            figures["generator"], pictures["generator"] = _measure_generator(pipeline, oracle, min(subjects, 64))
    return figures, pictures


def images_per_second(size: int = draw.SIZE, count: int = 200) -> float:
    """Rendering speed of one process, with cached backgrounds."""
    rng = random.Random(SEED)
    subjects = [world.sample_subject(rng) for _ in range(count)]
    tasks = [(s, world.sample_scene(rng, s.noun), rng.getrandbits(32)) for s in subjects]
    for task in tasks[:60]:
        draw.render(*task, size)
    started = time.perf_counter()
    for task in tasks:
        draw.render(*task, size)
    return count / (time.perf_counter() - started)


def generate(pipeline: Any, examples: list[ToyExample], *, steps: int = 10, seed: int = 0) -> Tensor:
    """Images of the examples from the pipeline, (B, 3, S, S) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    size = pipeline.vae.config.sample_size
    pictures = pipeline(
        image=[example.references[0] for example in examples],
        prompt=[example.prompt for example in examples],
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=generator.GUIDANCE,
        max_sequence_length=generator.tokenizers.MAX_TOKENS,
        max_area=size**2,
        _auto_resize=False,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return torch.from_numpy(np.asarray(pictures)).movedim(-1, 1).float()


def _measure_generator(pipeline: Any, oracle: Oracle, count: int) -> tuple[dict[str, float], Image.Image]:
    """The oracle's two scores of generated images, true images and copies of the reference."""
    size = pipeline.vae.config.sample_size
    examples = list(ToyWorld("eval", count, SEED, size=size))
    true = np.stack([draw.render(e.truth_subject, e.truth_scene, n, size) for n, e in enumerate(examples)])
    copies = np.stack([np.asarray(e.references[0]) for e in examples])
    shown = {
        "generated": generate(pipeline, examples),
        "true pictures": torch.from_numpy(true).movedim(-1, 1) / 255,
        "copies of the reference": torch.from_numpy(copies).movedim(-1, 1) / 255,
    }
    figures: dict[str, float] = {}
    for name, images in shown.items():
        read = {key: value.cpu() for key, value in oracle.read(images).items()}
        for score, expected in (("subject kept", expected_of_subject), ("prompt shown", expected_of_prompt)):
            shares = [share_right(read, row, expected(e)) for row, e in enumerate(examples)]
            figures[f"{score}, {name}"] = float(np.nanmean(shares))
    again = generate(pipeline, examples[:24], seed=1)
    references = torch.from_numpy(copies[:24]).movedim(-1, 1) / 255
    cells = torch.stack([references, shown["generated"][:24], again], dim=1)
    return figures, _sheet(
        cells.flatten(0, 1), columns=9, captions=[c for e in examples[:24] for c in ("reference", e.prompt, "")]
    )


def _reconstructions(vae: Any, pixels: Tensor) -> Image.Image:
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    return _sheet(torch.cat([pixels, decoded]).cpu() / 2 + 0.5, columns=len(pixels))


def _world_sheet(size: int, rows: int = 8) -> Image.Image:
    """For each noun a reference and two scenes of each kind."""
    rng = random.Random(SEED)
    cells = []
    for noun in world.NOUNS[:rows]:
        subject = world.sample_subject(rng)
        while subject.noun != noun:
            subject = world.sample_subject(rng)
        cells.append(draw.render(subject, world.REFERENCE, 0, size))
        cells += [
            draw.render(subject, world.sample_scene(rng, noun, kind=kind), rng.getrandbits(32), size)
            for kind in world.KINDS * 2
        ]
    return _sheet(torch.from_numpy(np.stack(cells)).movedim(-1, 1) / 255, columns=1 + 2 * len(world.KINDS))


def _sheet(images: Tensor, columns: int, captions: list[str] | None = None) -> Image.Image:
    """A grid of enlarged images (B, 3, S, S) in [0, 1] with their captions below."""
    side, line = ZOOM * draw.SIZE, 14 if captions else 0
    count = len(images)
    sheet = Image.new("RGB", (columns * side, -(-count // columns) * (side + line)), "white")
    pen = ImageDraw.Draw(sheet)
    for n, pixels in enumerate((images.clamp(0, 1) * 255).round().byte().movedim(1, -1).numpy()):
        left, top = n % columns * side, n // columns * (side + line)
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (left, top))
        if captions:
            pen.text((left + 2, top + side + 1), captions[n], fill=(60, 60, 70))
    return sheet


def _page(figures: Figures, pictures: Pictures) -> str:
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("report.html").render(
        figures=figures, pictures={name: _data_uri(picture) for name, picture in pictures.items()}, aims=AIMS
    )


AIMS = {
    ("renderer", "images per second"): 500.0,
    ("autoencoder", "PSNR mean, dB"): 30.0,
    ("autoencoder", "PSNR on the subject, dB"): 27.0,
    **{("clip", f"swap {kind}"): 0.9 for kind in clip.SWAPS},
    ("dino", "top-1 without recolouring"): 0.85,
    **{("oracle", name): 0.95 for name in world.ATTRIBUTES},
}
"""Expected minimum of each figure, shown beside the measured value."""


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
