"""An exported adapter with its script and its card. The script is run, and must draw what cgrpo draws."""

import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from customized_grpo.assemble import build_policy
from customized_grpo.cli import generation
from customized_grpo.cli.main import app
from customized_grpo.config import load_config
from customized_grpo.errors import UserError
from customized_grpo.store.scores import write_scores
from policies import tiny
from policies.runs import write_run
from store.tables import by_kind

KONTEXT, UNO, KLEIN, QWEN, KV, DEV = tiny.FAMILIES
ODD = 'it\'s "{{ 7 * 7 }}"\n{% raw %} \\ """'
"""Text that is code in templates, in strings and in Markdown."""
REWARDS = {
    "prompt": {"use": "ClipReward", "path": "toyworld:clip"},
    f"look `\n# a heading\n{ODD}": {"use": "DinoReward", "path": "/home/me/dino"},
}


def cgrpo(*words: object) -> str:
    result = CliRunner().invoke(app, ["export", *map(str, words)])
    if result.exception is not None:
        raise result.exception
    return result.output


def make_run(family: tiny.Family, folder: Path, evaluation: dict[str, Any], **policy: Any) -> tuple[Path, Any, Any]:
    """A run of one checkpoint, its configuration, and its policy with trained weights."""
    folder.mkdir(exist_ok=True)
    file = write_run(family, folder, **policy)
    tree = yaml.safe_load(file.read_text())
    tree |= {"rewards": REWARDS, "evaluation": {"num_inference_steps": 3, **evaluation}}
    run = folder / "run"
    checkpoint = run / "checkpoints" / "iteration-000002"
    checkpoint.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    (checkpoint / "state.json").write_text('{"iteration": 2}')
    config = load_config(run / "config.yaml")
    with family.loadable():
        trained = build_policy(config)
    tiny.disturb(trained)
    trained.save(checkpoint / "adapter")
    return run, config, trained


def drawn_by_cgrpo(policy: Any, config: Any, example: Any, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """What `cgrpo generate` draws in its first row with the trained weights, before it is rounded to bytes."""
    drawn: list[torch.Tensor] = []
    to_pil = generation.to_pil
    monkeypatch.setattr(generation, "to_pil", lambda image: drawn.append(image) or to_pil(image))
    generation.generate(policy, example, lambda: 2, 1, 5, config)
    return drawn[-1]


Drawn = Callable[..., tuple[str, torch.Tensor, torch.Tensor]]
DISTILLED = tiny.Family("Flux2KleinPolicy", lambda: tiny.klein_pipeline(is_distilled=True), KLEIN.settings)
GUIDED = {"true_cfg_scale": 2.5, "negative_prompt": ODD}
CASES = {
    "kontext": (KONTEXT, ((40, 24),), {}, {}),
    "kontext with every setting": (
        KONTEXT, ((40, 24),), {"resolution": 32, "guidance_scale": 2.0},
        {"aspect": "reference", "reference_resolution": 20, "shift": 3.0, "max_text_tokens": 5, **GUIDED},
    ),
    "kontext of a fixed size": (KONTEXT, ((24, 40),), {}, {"width": 24, "height": 12}),
    "klein": (KLEIN, ((64, 64),), {}, {}),
    "klein with every setting": (
        KLEIN, ((120, 80), (64, 80)), {},
        {"aspect": "reference", "resolution": 32, "reference_resolution": 80, "shift": 3, "offload": "swap", **GUIDED},
    ),
    "klein, distilled": (DISTILLED, ((64, 64),), {}, {}),
    "klein-kv": (KV, ((120, 80), (64, 80)), {}, {"aspect": "reference", "resolution": 32, "reference_resolution": 80}),
    "dev": (DEV, ((64, 64),), {"guidance_scale": 2.5}, {}),
    "dev with every setting": (
        DEV, ((120, 80), (64, 80)), {},
        {"aspect": "reference", "resolution": 32, "reference_resolution": 80, "shift": 3},
    ),
    "qwen": (QWEN, ((64, 40),), {}, {}),
    "qwen with every setting": (
        QWEN, ((64, 64), (40, 90)), {"true_cfg_scale": 3.0},
        {"aspect": "reference", "resolution": 64, "reference_resolution": 64, "shift": 3.0, "negative_prompt": ODD},
    ),
    "qwen without guidance": (QWEN, ((64, 40),), {}, {"true_cfg_scale": 1.0}),
    "uno": (UNO, ((16, 16), (12, 8)), {"guidance_scale": 2.0}, {"negative_prompt": ODD}),
    "heun": (KONTEXT, ((40, 24),), {"solver": "heun"}, {}),
    "embedded": (KONTEXT, ((40, 24),), {}, {"path": "toyworld:pipeline", "trainable": "lora", "dtype": "float32"}),
}  # fmt: skip


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Exports a case, and gives the script and what it and cgrpo draw."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus

    def both(case: str, **more: Any) -> tuple[str, torch.Tensor, torch.Tensor]:
        family, sizes, evaluation, settings = CASES[case]
        run, config, policy = make_run(family, tmp_path / ODD.replace("/", ""), evaluation, **settings, **more)
        example = tiny.example(prompt="a red hat on a beach", sizes=sizes)
        wanted = drawn_by_cgrpo(policy, config, example, monkeypatch)
        cgrpo("--run", run, "--output", tmp_path / "out" / f"{ODD}.safetensors")
        monkeypatch.setattr(edit_plus, "VAE_IMAGE_SIZE", edit_plus.VAE_IMAGE_SIZE)  # which the script changes
        if not family.on_disk:
            load = "diffusers.QwenImageEditPlusPipeline.from_pretrained"
            monkeypatch.setattr(load, lambda *_, dtype, **__: family.pipeline().to(dtype))
        file = tmp_path / "out" / "use.py"
        script = runpy.run_path(str(file))
        drawn = script["generate"](script["load"](), example.prompt, list(example.references), seed=5)
        return file.read_text(), drawn, wanted

    return both


@pytest.mark.filterwarnings("ignore:A prompt has")
@pytest.mark.parametrize("case", CASES)
def test_the_script_draws_what_cgrpo_draws(case: str, draw: Drawn):
    text, drawn, wanted = draw(case)
    assert ("import customized_grpo" in text.replace("from", "import")) == (case in ("uno", "heun", "embedded"))
    assert ("enable_model_cpu_offload" in text) == (case == "klein with every setting")
    torch.testing.assert_close(drawn, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["kontext", "klein", "qwen"])
def test_in_bfloat16_the_difference_is_rounding(case: str, draw: Drawn):
    _, drawn, wanted = draw(case, dtype="bfloat16")
    assert 0 < float((drawn - wanted).abs().mean()) < 0.06  # as float32 and bfloat16 on these weights


@pytest.fixture(scope="module")
def kontext(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    return make_run(KONTEXT, tmp_path_factory.mktemp("kontext"), {})


def with_policy(run: Path, folder: Path, **settings: Any) -> Path:
    """A copy of a run with other settings of the policy."""
    copy = Path(shutil.copytree(run, folder / "run"))
    tree = yaml.safe_load((copy / "config.yaml").read_text())
    tree["policy"] |= settings
    (copy / "config.yaml").write_text(yaml.safe_dump(tree))
    return copy


def test_the_script_is_a_command(
    kontext: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config, policy = kontext
    example = tiny.example(sizes=((40, 24),))
    example.references[0].save(tmp_path / "hat.png")
    cgrpo("--run", run, "--output", tmp_path / "hat.safetensors")
    words = ["use.py", "a red hat", str(tmp_path / "hat.png"), "--output", str(tmp_path / "drawn.png"), "--seed", "5"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(tmp_path / "use.py"), run_name="__main__")
    wanted = drawn_by_cgrpo(policy, config, example, monkeypatch)
    drawn = np.asarray(Image.open(tmp_path / "drawn.png"))
    assert np.abs(drawn - 255 * wanted.permute(1, 2, 0).numpy()).max() < 0.6  # rounded to bytes


def test_files_that_are_there_are_kept(kontext: tuple[Path, Any, Any], tmp_path: Path) -> None:
    run, *_ = kontext
    (tmp_path / "README.md").write_text("mine")
    said = cgrpo("--run", run, "--output", tmp_path / "hat.safetensors")
    assert f"'{tmp_path}' has a README.md or use.py already, which was kept, hence the longer names." in said
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "`hat-use.py`" in (tmp_path / "hat-README.md").read_text()
    assert not (tmp_path / "use.py").exists()
    compile((tmp_path / "hat-use.py").read_text(), "hat-use.py", "exec")
    (tmp_path / "hat.safetensors").unlink()
    with pytest.raises(UserError, match=r"hat-README.md' is already there; nothing was overwritten"):
        cgrpo("--run", run, "--output", tmp_path / "hat.safetensors")
    assert not (tmp_path / "hat.safetensors").exists()


def test_the_format_kohya_has_neither_script_nor_card(tmp_path: Path) -> None:
    run, *_ = make_run(KLEIN, tmp_path / "klein", {})
    words = ("--run", run, "--output", tmp_path / "out" / "hat.safetensors", "--format", "kohya")
    with pytest.raises(UserError, match="--push takes the adapter of a pipeline in the format diffusers"):
        cgrpo(*words, "--push", "me/hat")
    assert "There is no README.md or use.py" in cgrpo(*words)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["hat.safetensors"]


@pytest.mark.parametrize(
    "settings", [{"use": "Flux2KleinPolicy", "reference_resolution": 1040}, {"quantize": "int8", "offload": "cpu"}]
)
def test_what_no_pipeline_does_needs_this_package(
    settings: dict[str, Any], kontext: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    run = with_policy(kontext[0], tmp_path, **settings)
    said = cgrpo("--run", run, "--output", tmp_path / "hat.safetensors")
    assert "Use use.py. No pipeline of diffusers does the same with these settings" in said
    assert runpy.run_path(str(tmp_path / "use.py"))["POLICY"].items() >= settings.items()


def front_and_body(card: str) -> tuple[Any, str]:
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_says_what_it_was_trained_on_and_what_came_of_it(
    kontext: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    copy = with_policy(kontext[0], tmp_path, path="owner/name", resolution=32)
    metrics = ("prompt", f"`\n# a heading\n{ODD}", "clip_t")
    for iteration, gain in ((0, 0.0), (2, 0.25)):
        scores = by_kind(iteration, metrics, hat=[0.1 + gain, 0.2, 0.3], **{"`\n# kind": [0.2, 0.3, 0.4]})
        write_scores(copy / "evaluations" / f"iteration-{iteration:06d}.json", scores)
    cgrpo("--run", copy, "--output", tmp_path / "out" / "hat.safetensors")
    front, body = front_and_body((tmp_path / "out" / "README.md").read_text())
    assert front["base_model"] == "owner/name"
    assert front["library_name"] == "diffusers"
    assert [line for line in body.splitlines() if line.startswith("#")] == [
        "# `hat.safetensors`", "## Use", "## Training", "## Evaluation", "## Licence",
    ]  # fmt: skip
    assert "`prompt 0.100 → 0.350" in body
    assert "`clip t" in body
    assert "Images of `32 x 32` pixels, LoRA of rank `2`, `float32`." in body
    assert "/home/me" not in body
    assert str(tmp_path) not in body


def test_a_base_model_on_disk_is_no_id_of_the_hub(kontext: tuple[Path, Any, Any], tmp_path: Path) -> None:
    run, *_ = kontext
    cgrpo("--run", run, "--output", tmp_path / "hat.safetensors")
    front, body = front_and_body((tmp_path / "README.md").read_text())
    assert "base_model" not in front
    assert "## Evaluation" not in body


class Hub:
    """What `HfApi` is asked for."""

    problem: Exception | None = None
    files: tuple[str, ...] = (".gitattributes",)

    def __init__(self) -> None:
        type(self).made: dict[str, Any] = {}

    def whoami(self) -> None:
        if self.problem:
            raise self.problem

    def create_repo(self, repository: str, **how: Any) -> str:
        self.made |= how
        return f"https://hub/{repository}"

    def list_repo_files(self, repository: str) -> tuple[str, ...]:
        return self.files

    def create_commit(self, repository: str, operations: list[Any], **_: Any) -> None:
        self.made["files"] = {operation.path_in_repo: operation.path_or_fileobj for operation in operations}


def test_it_is_pushed_when_asked(
    kontext: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, *_ = kontext
    words = ("--run", run, "--output", tmp_path / "hat.safetensors", "--push", "me/hat")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)

    monkeypatch.setattr(Hub, "problem", OSError("Token is required, but no token found."))
    with pytest.raises(UserError, match=r"no token found\); log in with `.*hf auth login` or set HF_TOKEN"):
        cgrpo(*words)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Hub, "problem", None)

    (tmp_path / "README.md").write_text("mine")
    assert "https://hub/me/hat" in cgrpo(*words)
    assert Hub.made["private"] is True
    assert set(Hub.made["files"]) == {"hat.safetensors", "README.md", "use.py"}
    assert Hub.made["files"]["use.py"] == (tmp_path / "hat-use.py").read_bytes()
    assert b"`use.py`" in Hub.made["files"]["README.md"]

    monkeypatch.setattr(Hub, "files", ("README.md",))
    with pytest.raises(
        UserError, match=r"is written, but could not be pushed to 'me/hat' \(it holds README.md already"
    ):
        cgrpo(*words[:2], "--output", tmp_path / "cat.safetensors", *words[4:])
    assert "files" not in Hub.made
    assert (tmp_path / "cat-use.py").exists()

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="--push needs the package huggingface_hub"):
        cgrpo(*words[:2], "--output", tmp_path / "dog.safetensors", *words[4:])
