import json
import sys
import warnings

import pytest
import torch

from customized_grpo.cli.main import main
from customized_grpo.errors import TrainingError, UserError
from customized_grpo.policies.flux import FluxKontextPolicy
from customized_grpo.settings.parse import describe_settings, load_settings
from customized_grpo.toyworld.dataset import ToyWorld
from customized_grpo.toyworld.world import ATTRIBUTES
from tools.pretrain import Budget, PretrainSettings, Progress, autoencoder, corpus, generator, pretrain, reader
from tools.pretrain.__main__ import app
from tools.pretrain.loop import fit
from tools.pretrain.report import generate
from tools.pretrain.run import COMPONENTS

TRAINED = ("autoencoder", "decoder", "clip", "dino", "oracle", "generator")
TINY = {name: Budget(steps=2, batch_size=8) for name in TRAINED}


@pytest.mark.parametrize("size", [64, 128])
def test_every_component_is_rebuilt_and_loads(tmp_path, size) -> None:
    settings = PretrainSettings(
        output=tmp_path / "toy", size=size, subjects=16, pair_subjects=16, measured_subjects=8, **TINY
    )
    seen: list[Progress] = []
    report = pretrain(settings, seen.append)
    assert [p.component for p in seen] == list(TRAINED)
    assert all(p.share == 1 and p.eta_seconds == 0 for p in seen)
    figures = json.loads((tmp_path / "toy" / "figures.json").read_text())
    assert figures.keys() == {"renderer", *COMPONENTS}
    assert figures["autoencoder"].keys() >= {"PSNR on the subject, dB", "seconds to decode 64 images"}
    policy = FluxKontextPolicy.from_pretrained(tmp_path / "toy" / "pipeline")
    assert (policy.resolution, policy.grid((size, size))) == (size, (8, 8))
    assert generate(policy.pipeline, ToyWorld("eval", 1, size=size)[:], steps=1).shape[-1] == size
    html = report.read_text()
    assert html.count("data:image/png;base64,") == 3
    assert "://" not in html

    before = report.stat().st_mtime_ns
    assert pretrain(settings.model_copy(update={"components": ()})) == report  # measures, trains nothing
    assert report.stat().st_mtime_ns > before

    with pytest.raises(UserError, match="other subjects"):
        pretrain(settings.model_copy(update={"subjects": 17}))


def test_pairs_mark_what_their_prompts_change_whether_it_is_painted_or_not() -> None:
    pairs = corpus.imperfect(24, 3, seed=0)
    marks = pairs.masks[:, 1:].flatten(2).amax(2)
    kinds = [[scene.kind for scene in row[1:]] for row in pairs.scenes]
    asked = torch.tensor([[kind != "recontext" for kind in row] for row in kinds])
    assert marks[~asked].unique().tolist() == [85]
    assert 0.8 < (marks[asked] == 255).float().mean() < 1  # copies show nothing of their prompt, and mark nothing
    assert pairs.masks[:, 0].amax() == 255


def test_errors_count_by_the_weight_of_their_token() -> None:
    latents = torch.zeros(1, 2, generator.TOKENS, 4)
    weights = torch.ones(1, 2, generator.TOKENS)
    weights[..., 0] = 9.0
    ids = torch.zeros(1, 2, 16, dtype=torch.int64)
    pairs = generator.Pairs(latents, ids, ids, weights, torch.eye(4))

    class Wrong(torch.nn.Module):
        """Predicts the noise, but for one token."""

        image_ids = torch.zeros(1)

        def __init__(self, token: int) -> None:
            super().__init__()
            self.token = token

        def forward(self, latents, reference, clip_ids, text_ids, sigma):
            velocity = latents / sigma[:, None, None]
            velocity[:, self.token] += 1
            return velocity

    losses = [
        generator.loss(Wrong(token), pairs, 2, torch.Generator().manual_seed(0))  # pyright: ignore[reportArgumentType]
        for token in (0, 1)
    ]
    torch.testing.assert_close(losses[0], 9 * losses[1])


def test_the_decoder_alone_learns_from_latents_with_noise(monkeypatch) -> None:
    torch.manual_seed(0)
    model = autoencoder.build(128)
    model.encoder.requires_grad_(False)
    images, masks = torch.rand(2, 3, 128, 128) * 2 - 1, torch.zeros(2, 128, 128)

    def loss() -> torch.Tensor:
        return autoencoder.decoder_loss(model, images, masks, torch.Generator().manual_seed(0))

    noisy = loss()
    noisy.backward()
    assert all(p.grad is not None for p in model.decoder.parameters())
    monkeypatch.setattr(autoencoder, "DECODER_NOISE", 0.0)
    error = model.decode(model.encode(images).latent_dist.mode()).sample - images
    torch.testing.assert_close(loss(), autoencoder._error(error, masks))
    assert loss() != noisy


def test_faults_are_labelled_unclear_and_what_is_gone_as_gone() -> None:
    images, labels = reader.faulty(60, seed=0, size=64)
    again, _ = reader.faulty(5, seed=0, size=64)
    assert torch.equal(images[:5], again)
    unclear = torch.stack([labels[name] == reader.UNCLEAR for name in ATTRIBUTES]).sum(0)
    assert set(unclear.tolist()) == {0, 1, 2}  # nothing where a part is erased, two where a part has its own colour
    gone = [n for n in range(60) if unclear[n] == 0]
    absent = {"background": 0, "accessory": 0, "companion": 0, "pattern": 0, "ears": 0}
    assert all(any(labels[name][n] == value for name, value in absent.items()) for n in gone)


def test_the_oracle_is_to_be_unsure_of_what_is_unclear() -> None:
    unclear, hidden, known = torch.tensor([reader.UNCLEAR]), torch.tensor([-1]), torch.tensor([0])
    sure, unsure = torch.tensor([[9.0, 0.0]]), torch.zeros(1, 2)
    assert reader._cross_entropy(unsure, unclear) < 1 < reader._cross_entropy(sure, unclear)
    assert reader._cross_entropy(sure, known) < 0.1 < reader._cross_entropy(unsure, known)
    assert reader._cross_entropy(sure, hidden) == 0


def test_generator_alone_says_what_it_needs(tmp_path) -> None:
    with pytest.raises(UserError, match="needs 'autoencoder', which is not in"):
        pretrain(PretrainSettings(output=tmp_path, components=("generator",), subjects=16, pair_subjects=16))


def test_budgets_may_change_until_their_component_is_begun(tmp_path) -> None:
    settings = PretrainSettings(output=tmp_path, subjects=16, measured_subjects=8, components=("oracle",), **TINY)
    pretrain(settings)
    other = Budget(steps=3, batch_size=8)
    pretrain(settings.model_copy(update={"clip": other}))
    with pytest.raises(UserError, match="other oracle;"):
        pretrain(settings.model_copy(update={"clip": other, "oracle": other}))


def regression(target: float = 3.0):
    module = torch.nn.Linear(1, 1)

    def loss(generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(8, 1, generator=generator)
        return (module(x) - target * x).square().mean()

    return module, loss


def test_resumed_training_equals_uninterrupted(tmp_path) -> None:
    def train(steps: tuple[int, ...], file: str) -> torch.Tensor:
        for limit in steps:
            torch.manual_seed(0)
            module, loss = regression()
            # a constant rate, so that the schedule does not depend on where the first half stops
            budget = Budget(steps=limit, learning_rate=0.05, decay_from=0.999, warmup_steps=1)
            fit("line", module, loss, budget, tmp_path / file, seed=1, ema=0.5)
        return module.weight.detach().clone()

    assert torch.equal(train((20,), "whole"), train((10, 20), "halves"))


def test_training_fits_a_line_and_ends_with_averaged_weights(tmp_path) -> None:
    module, loss = regression()
    fit("line", module, loss, Budget(steps=300, learning_rate=0.1), tmp_path / "line.pt", seed=0, ema=0.9)
    assert module.weight.item() == pytest.approx(3, abs=0.05)
    assert not module.training
    last = torch.load(tmp_path / "line.pt")
    assert torch.equal(module.weight, last["average"][0])
    assert not torch.equal(module.weight, last["module"]["weight"])


def test_an_override_keeps_the_rest_of_a_components_budget() -> None:
    settings = load_settings(PretrainSettings, None, ["clip.minutes=12"])
    assert settings.clip == PretrainSettings().clip.model_copy(update={"minutes": 12.0})
    assert settings.dino == PretrainSettings().dino


def test_settings_are_described_with_the_defaults_of_their_component() -> None:
    text = describe_settings(PretrainSettings)
    assert "clip.batch_size = 96\n" in text
    assert "dino.batch_size = 64\n" in text


def call(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain", *arguments])
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("CGRPO_DEBUG", "")
    with warnings.catch_warnings():
        main(app)


def test_the_command_reports_each_component_and_resumes(tmp_path, monkeypatch, capsys) -> None:
    small = [f"output={tmp_path}", "components=[oracle]", "subjects=16", "measured_subjects=8", "oracle.batch_size=8"]
    for steps, found in (2, True), (2, False):  # the finished component is kept the second time
        with pytest.raises(SystemExit) as done:
            call(monkeypatch, *small, f"oracle.steps={steps}")
        printed = capsys.readouterr().out
        assert done.value.code == 0
        assert ("oracle       100%  step 2  loss" in printed) == found
        assert f"export CGRPO_TOYWORLD_WEIGHTS={tmp_path}" in printed
    wrong = {"oracle.steps=3": "holds a pretraining with other oracle;", "clap.steps=3": "Did you mean 'clip'?\n"}
    for override, said in wrong.items():
        with pytest.raises(SystemExit) as done:
            call(monkeypatch, *small, "oracle.steps=2", override)
        assert done.value.code == 2
        assert said in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_training(tmp_path) -> None:
    module = torch.nn.Linear(1, 1)
    with pytest.raises(TrainingError, match="'line' became nan at step 1"):
        fit("line", module, lambda _: module.weight.sum() * torch.nan, Budget(steps=5), tmp_path / "x.pt", seed=0)


def test_a_budget_needs_a_limit(tmp_path) -> None:
    module, loss = regression()
    with pytest.raises(UserError, match="no limit"):
        fit("line", module, loss, Budget(), tmp_path / "x.pt", seed=0)
