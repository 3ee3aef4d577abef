import sys
from pathlib import Path

import pytest

from customized_grpo import shell


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bin folder of an environment, below the current folder and not on PATH, whose command is running."""
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "cgrpo", "pip"):
        (folder / name).touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setattr(sys, "argv", [str(folder / "cgrpo"), "train"])
    return folder


@pytest.mark.parametrize("started", [".venv/bin/cgrpo", "src/customized_grpo/__main__.py", "-c"])
def test_a_command_off_path_is_given_with_its_folder(
    environment: Path, monkeypatch: pytest.MonkeyPatch, started: str
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert shell.program() == ".venv/bin/cgrpo"
    assert shell.command("train", "--resume", Path("my runs/a")) == ".venv/bin/cgrpo train --resume 'my runs/a'"


def test_a_command_on_path_is_given_by_its_name(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(environment))
    assert shell.program() == "cgrpo"


def test_another_installation_on_path_is_not_the_one_to_use(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cgrpo").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "other"))
    assert shell.program() == ".venv/bin/cgrpo"


def test_a_link_on_path_is_the_command_itself(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "cgrpo").symlink_to(environment / "cgrpo")
    monkeypatch.setenv("PATH", str(tmp_path / "local"))
    assert shell.program() == "cgrpo"


def test_outside_the_current_folder_the_path_is_absolute(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert shell.program() == str(environment / "cgrpo")


def test_a_package_that_is_not_installed_is_run_as_a_module(environment: Path) -> None:
    (environment / "cgrpo").unlink()
    assert shell.program() == f"{environment / 'python'} -m customized_grpo"
    assert shell.program("tensorboard") == "tensorboard"


def test_an_extra_is_installed_from_the_checkout(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(shell, "CHECKOUT", tmp_path)
    assert shell.install("data") == ".venv/bin/pip install -e '.[data]'"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert shell.install("data") == f"{environment / 'pip'} install -e '{tmp_path}[data]'"


def test_without_a_checkout_the_packages_of_an_extra_are_named(environment: Path, monkeypatch) -> None:
    lines = ["torch>=2.6", 'datasets>=3; extra == "data"', 'rembg[cpu]>=2 ; extra == "masks"', 'a; extra == "masks"']
    monkeypatch.setattr(shell.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(shell, "CHECKOUT", environment)
    assert shell.install("data") == ".venv/bin/pip install 'datasets>=3'"
    assert shell.install("masks") == ".venv/bin/pip install 'rembg[cpu]>=2' a"


def test_the_checkout_is_found() -> None:
    assert Path(__file__).parents[1] == shell.CHECKOUT
