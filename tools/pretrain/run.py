"""`pretrain`: its settings, the order of the components and the folders of their weights."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from customized_grpo.errors import UserError
from customized_grpo.settings import Settings
from tools.pretrain import autoencoder, clip, corpus, dino, export, generator, reader
from tools.pretrain.loop import Budget, OnProgress, fit
from tools.pretrain.models import Autoencoder

ComponentName = Literal["autoencoder", "clip", "dino", "oracle", "generator"]
COMPONENTS: tuple[ComponentName, ...] = get_args(ComponentName)
"""In order of training: the generator needs the autoencoder."""
PARTS = {"decoder": "autoencoder"}
"""Further budgets to the component that they belong to."""


class PretrainSettings(Settings):
    """Settings of `make pretrain`. The default budgets are for two CPU cores."""

    output: Path = Path("runs/toyworld")
    """Folder for weights, checkpoints and report. Set CGRPO_TOYWORLD_WEIGHTS to it to use the weights."""
    components: tuple[ComponentName, ...] = COMPONENTS
    """Components to train. Components that are finished in `output` are kept."""
    size: Literal[64, 128] = 64
    """Width and height of the images in pixels. At 128 each place moves, turns and scales the creature."""
    seed: int = 0
    """Seed of initial weights, training data and batches."""
    device: str | None = None
    """Device to train on; None selects CUDA if available, otherwise the CPU."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; None for PyTorch's default."""
    compile: bool = False
    """Compile the generator's transformer, which saves a seventh of the time on a CPU; needs a C++ compiler."""
    subjects: int = Field(default=7000, ge=16)
    """Number of training subjects for the autoencoder, CLIP, DINO and the oracle, with four scenes each."""
    pair_subjects: int = Field(default=18000, ge=16)
    """Number of training subjects for the generator, with three scenes each."""
    measured_subjects: int = Field(default=500, ge=8)
    """Number of unseen subjects for the measurements."""
    autoencoder: Budget = Budget(minutes=20, batch_size=8, learning_rate=2e-3, decay_from=0.2)
    decoder: Budget = Budget(minutes=10, batch_size=8, learning_rate=1.5e-3, warmup_steps=100, decay_from=0.5)
    """Of the second part of the autoencoder's training, in which the encoder stays as it is."""
    clip: Budget = Budget(minutes=20, batch_size=96, learning_rate=1e-3, decay_from=0.3)
    dino: Budget = Budget(minutes=10, batch_size=64, learning_rate=1e-3, decay_from=0.3)
    oracle: Budget = Budget(minutes=10, batch_size=64, learning_rate=2e-3, decay_from=0.2)
    generator: Budget = Budget(minutes=60, batch_size=32, learning_rate=1.2e-3, warmup_steps=200, decay_from=0.3)


SETTINGS_FILE = "pretrain.json"


def pretrain(settings: PretrainSettings, on_progress: OnProgress | None = None) -> Path:
    """Train the selected components, each from its checkpoint if there is one; measure all and write the report.

    Returns:
        The report, `output`/report.html. `output` also holds pipeline/, clip/, dino/, oracle/ and figures.json.

    Raises:
        UserError: if `output` holds a pretraining with other settings, or the generator lacks the autoencoder.
    """
    from tools.pretrain.report import write_report

    _claim(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    run = Run(settings, on_progress)
    for name in COMPONENTS:
        if name in settings.components and not run.finished(name):
            torch.manual_seed(settings.seed)  # the initial weights
            run.train(name)
    return write_report(settings.output, run.device, settings.measured_subjects, settings.size)


def _claim(settings: PretrainSettings) -> None:
    """Write the settings to the output folder, or check that they equal the ones already there."""
    free = {"components", "device", "threads", "compile", "output"}
    wanted = settings.model_dump(mode="json", exclude=free)
    file = settings.output / SETTINGS_FILE
    if file.exists():
        held = json.loads(file.read_text(encoding="utf-8"))
        begun = {name for name in COMPONENTS if _begun(settings.output, name)}
        different = sorted(
            key
            for key in wanted
            if held.get(key) != wanted[key] and (key not in (*COMPONENTS, *PARTS) or PARTS.get(key, key) in begun)
        )
        if different:
            raise UserError(
                f"{settings.output} holds a pretraining with other {', '.join(different)}; "
                f"give the same settings to resume it, or another output folder."
            )
    try:
        settings.output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"Cannot write to {settings.output} ({error.strerror}); choose another output folder."
        ) from error


FINISHED: dict[ComponentName, str] = {
    "autoencoder": "pipeline/vae/config.json",
    "clip": "clip/config.json",
    "dino": "dino/config.json",
    "oracle": "oracle/model.safetensors",
    "generator": "pipeline/model_index.json",
}
"""The last file written for each component; the component is finished if it exists."""


def _begun(folder: Path, name: ComponentName) -> bool:
    return (folder / FINISHED[name]).exists() or _checkpoint(folder, name).exists()


def _checkpoint(folder: Path, name: str) -> Path:
    return folder / "checkpoints" / f"{name}.pt"


class Run:
    """Trains components into one folder."""

    def __init__(self, settings: PretrainSettings, on_progress: OnProgress | None) -> None:
        self.settings, self.folder, self.on_progress = settings, settings.output, on_progress
        self.device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._pictures: corpus.Corpus | None = None

    def finished(self, name: ComponentName) -> bool:
        return (self.folder / FINISHED[name]).exists()

    def train(self, name: ComponentName) -> None:
        getattr(self, f"_train_{name}")()

    @property
    def pictures(self) -> corpus.Corpus:
        """The training corpus of all components but the generator."""
        if self._pictures is None:
            self._pictures = corpus.faithful(self.settings.subjects, 4, self.settings.seed, size=self.settings.size)
        return self._pictures

    def _train_autoencoder(self) -> None:
        model = autoencoder.build(self.settings.size)
        images, masks = self.pictures.images.flatten(0, 1), self.pictures.masks.flatten(0, 1)

        def loss(part: Callable[..., Tensor], batch_size: int, random: torch.Generator) -> Tensor:
            rows = torch.randint(len(images), (batch_size,), generator=random)
            pixels, mask = images[rows].to(self.device) / 127.5 - 1, masks[rows].to(self.device) / 255
            return part(model, pixels, mask, random)

        self._fit(
            "autoencoder", model, partial(loss, autoencoder.loss, self.settings.autoencoder.batch_size), ema=0.998
        )
        autoencoder.calibrate(model, images[:100].to(self.device) / 127.5 - 1)
        model.encoder.requires_grad_(False)
        self._fit(
            "decoder", model, partial(loss, autoencoder.decoder_loss, self.settings.decoder.batch_size), ema=0.998
        )
        export.save_half(model, self.folder / "pipeline" / "vae")

    def _train_clip(self) -> None:
        student = clip.Student(clip.build(self.settings.size))
        pairs = clip.Pairs(self.pictures, self.settings.seed)
        self._fit("clip", student, partial(clip.loss, student, pairs, self.settings.clip.batch_size), ema=0.998)
        export.save_clip(student.clip, self.folder / "clip")

    def _train_dino(self) -> None:
        student = dino.Student(dino.build(self.settings.size))
        views = dino.Views(self.pictures)
        self._fit("dino", student, partial(dino.loss, student, views, self.settings.dino.batch_size), ema=0.998)
        export.save_dino(student.dino, self.folder / "dino")

    def _train_oracle(self) -> None:
        model = reader.Oracle(self.settings.size, reader.LEAST)
        labels = {name: values.flatten() for name, values in self.pictures.labels().items()}
        faithful = (self.pictures.images.flatten(0, 1), labels)
        faults = reader.faulty(2 * self.settings.subjects, self.settings.seed, self.settings.size)
        self._fit("oracle", model, partial(reader.loss, model, faithful, faults, self.settings.oracle.batch_size))
        export.save_oracle(model, self.folder / "oracle")

    def _train_generator(self) -> None:
        vae = self._load_autoencoder()
        model = generator.Generator(vae.config.latent_channels, self.settings.size)
        if self.settings.compile:
            model.transformer.compile()
        encoded = self.folder / "checkpoints" / "pairs.pt"  # a resumed training encodes no pictures again
        if not encoded.exists():
            pictures = corpus.imperfect(self.settings.pair_subjects, 3, self.settings.seed, self.settings.size)
            generator.encode_pairs(pictures, vae).save(encoded)
            del pictures
        pairs = generator.Pairs.load(encoded)
        batch_size = self.settings.generator.batch_size
        self._fit("generator", model, partial(generator.loss, model, pairs, batch_size), ema=0.999)
        export.save_pipeline(self.folder / "pipeline", model, vae)
        encoded.unlink()

    def _fit(self, name: str, module: nn.Module, loss: Callable[[torch.Generator], Tensor], ema: float = 0.0) -> None:
        fit(
            name,
            module.to(self.device),
            loss,
            getattr(self.settings, name),
            _checkpoint(self.folder, name),
            seed=self.settings.seed + 1,
            ema=ema,
            on_progress=self.on_progress,
        )

    def _load_autoencoder(self) -> Autoencoder:
        if not self.finished("autoencoder"):
            raise UserError(
                f"The generator needs 'autoencoder', which is not in {self.folder}; add 'autoencoder' to components."
            )
        kind = type(autoencoder.build(self.settings.size))
        return kind.from_pretrained(self.folder / "pipeline" / "vae").eval().to(self.device)
