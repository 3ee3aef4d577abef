"""What the Python API shows and leaves behind."""

import io
from pathlib import Path

import pytest

import fakes
from customized_grpo import DinoReward, Display, FluxKontextPolicy, Trainer, TrainerConfig, UserError
from customized_grpo.cli.terminal import PlainConsole


def trainer(folder: Path, reward=fakes.red) -> Trainer:
    config = TrainerConfig.model_validate({
        "output": str(folder), "tracking": {"log_with": []}, "training": {"iterations": 1, "prompts_per_iteration": 2},
        "rollout": {"num_generations": 2, "num_inference_steps": 3}, "evaluation": {"examples": 2, "replicates": 1},
    })  # fmt: skip
    return Trainer(
        fakes.LinearPolicy(), {"red": reward, "dark": fakes.dark}, fakes.examples(), fakes.examples(2), config
    )


@pytest.mark.usefixtures("plotted")
def test_a_display_shows_progress_and_writes_the_report(tmp_path: Path) -> None:
    shown = io.StringIO()
    display = Display(PlainConsole(file=shown, force_terminal=True, width=200))
    result = trainer(tmp_path / "run").train(display)
    assert display.report == result.run / "report.html"
    assert display.report.is_file()
    assert (result.run / "plots" / "reward-red.svg").is_file()
    assert "held-out, iteration   1: red" in shown.getvalue()
    assert "1/1" in shown.getvalue()
    assert display.progress is None, "the terminal is free again"


def test_a_display_lets_go_of_the_terminal_after_an_error(tmp_path: Path) -> None:
    display = Display(PlainConsole(file=io.StringIO(), force_terminal=True))
    with pytest.raises(UserError, match="failed"):
        trainer(tmp_path / "run", fakes.raising(ValueError("no"))).train(display)
    assert display.progress is None


@pytest.mark.parametrize("load", [
    lambda: DinoReward("toyworld:dino"), lambda: FluxKontextPolicy.from_pretrained("toyworld:pipeline"),
], ids=["reward", "pipeline"])  # fmt: skip
def test_loading_shows_no_bars_of_other_libraries(load, capfd: pytest.CaptureFixture[str]) -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [library.is_progress_bar_enabled() for library in libraries]
    try:
        for library in libraries:
            library.enable_progress_bar()
        load()
        assert capfd.readouterr().err == ""
        assert all(library.is_progress_bar_enabled() for library in libraries), "theirs again"
    finally:
        for library, enabled in zip(libraries, before, strict=True):
            if not enabled:
                library.disable_progress_bar()
