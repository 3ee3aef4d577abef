"""Hub ids at a revision, from a hub cache on disk: no network."""

import inspect
from pathlib import Path
from typing import Any

import pytest

from customized_grpo import policies, rewards
from customized_grpo.errors import UserError
from customized_grpo.sources import PINNED, pin
from policies import tiny
from rewards import tiny as encoders

OLD, NEW = "a" * 40, "b" * 40


def test_a_revision_is_the_users_then_ours_then_the_newest() -> None:
    assert pin("owner/name", "v2") == {"revision": "v2"}
    assert pin("facebook/dinov2-base") == {"revision": PINNED["facebook/dinov2-base"]}
    assert pin("owner/name") == {}


def test_every_default_on_the_hub_is_pinned_to_a_commit() -> None:
    defaults = {
        parameter.default
        for name in rewards.__all__
        if inspect.isclass(made := getattr(rewards, name)) and not issubclass(made, Exception)
        for parameter in inspect.signature(made).parameters.values()
        if parameter.name in ("path", "processor") and isinstance(parameter.default, str)
    }
    assert defaults == PINNED.keys()
    assert all(len(commit) == 40 and set(commit) <= set("0123456789abcdef") for commit in PINNED.values())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, the only place that is looked at."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def snapshot(hub: Path, name: str, commit: str, *, newest: bool = False) -> Path:
    """Where the cache keeps a commit of a repository."""
    repository = hub / f"models--{name.replace('/', '--')}"
    if newest:
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


def test_rewards_read_the_revision(hub: Path) -> None:
    for commit in (OLD, NEW):
        encoders.save_dino(snapshot(hub, "owner/dino", commit, newest=commit == NEW), 2 if commit == OLD else 3)

    def kind(**settings: Any) -> str:
        return rewards.DinoReward("owner/dino", device="cpu", **settings).model.config.model_type

    assert [kind(), kind(revision=NEW), kind(revision=OLD)] == ["dinov3_vit", "dinov3_vit", "dinov2"]
    with pytest.raises(UserError, match="Could not load a DINO model from 'owner/dino'"):
        kind(revision="c" * 40)
    encoders.save_clip(snapshot(hub, "owner/clip", OLD))  # with processor and tokenizer, and no newest state
    rewards.ClipReward("owner/clip", revision=OLD, device="cpu")
    rewards.ClipImageReward("owner/clip", revision=OLD, device="cpu")
    with pytest.raises(UserError, match="Could not load a CLIPModel from 'owner/clip'"):
        rewards.ClipReward("owner/clip", device="cpu")


def test_policies_read_the_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a family's diffusers pipeline is asked for."""
    from diffusers import DiffusionPipeline, FluxKontextPipeline

    asked = []

    def load_config(source: str, **kwargs: Any) -> dict[str, str]:
        asked.append(kwargs["revision"])
        return {"_class_name": "FluxKontextPipeline"}

    def from_pretrained(source: str, **kwargs: Any) -> Any:
        asked.append(kwargs["revision"])
        return tiny.kontext_pipeline()

    monkeypatch.setattr(DiffusionPipeline, "load_config", load_config)
    monkeypatch.setattr(FluxKontextPipeline, "from_pretrained", from_pretrained)
    policies.FluxKontextPolicy.from_pretrained("owner/kontext", revision=OLD, device="cpu")
    assert asked == [OLD, OLD]
    with pytest.raises(UserError, match="is a local folder and has no revisions; remove revision"):
        policies.FluxKontextPolicy.from_pretrained(revision=OLD)


def test_unos_adapter_has_a_revision_of_its_own(hub: Path) -> None:
    from customized_grpo.policies.uno import FILE, _locate

    for commit in (OLD, NEW):
        folder = snapshot(hub, "owner/uno", commit, newest=commit == NEW)
        folder.mkdir(parents=True)
        (folder / FILE).write_text(commit)
    assert [_locate("owner/uno", revision).read_text() for revision in (None, OLD)] == [NEW, OLD]
