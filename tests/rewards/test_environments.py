"""An environment is really made, from a package and a repository in local folders."""

import shutil
import subprocess
import zipfile

import pytest
from typer.testing import CliRunner

from customized_grpo.cli import main as cli
from customized_grpo.errors import UserError
from customized_grpo.rewards import environments
from customized_grpo.rewards.environments import ENVIRONMENTS, Environment, commands, install


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """An environment named "stub", of a wheel and a repository in local folders. pip sees no index."""
    wheel = tmp_path / "wheels" / "stub_reward-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    about = "stub_reward-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("stub_reward.py", "from beside import FACTOR\n\ndef score(x):\n    return FACTOR * x\n")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: stub-reward\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    repository = tmp_path / "repository"
    repository.mkdir()

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *who, *words], cwd=repository, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    for factor in (2, 3):
        (repository / "beside.py").write_text(f"FACTOR = {factor}\n")
        git("add", ".")
        git("commit", "-qm", f"factor {factor}")
    python = ".".join(map(str, environments.sys.version_info[:2]))
    made = Environment(
        ("stub-reward==1.0",), "MIT", "none", "none", "python: {folder}/bin/python", python,
        (str(repository), git("rev-parse", "HEAD~1")),
    )  # fmt: skip
    monkeypatch.setitem(ENVIRONMENTS, "stub", made)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(wheel.parent), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return made


def cgrpo(*words):
    return CliRunner().invoke(cli.app, ["rewards", "install", *words])


def test_an_environment_is_made_and_scores(stub, tmp_path):
    folder = tmp_path / "environment"
    printed = cgrpo("stub", "--folder", str(folder), "--dry-run")
    assert printed.exit_code == 0
    assert "stub-reward==1.0" in printed.stdout
    assert "MIT" in printed.stdout
    assert not folder.exists()
    printed = cgrpo("stub", "--folder", str(folder))
    assert f"python: {folder}/bin/python" in printed.stdout
    code = "import stub_reward; print(stub_reward.score(21))"
    scored = subprocess.run([folder / "bin" / "python", "-c", code], capture_output=True, text=True, check=True)
    assert scored.stdout.strip() == "42"  # the pinned commit, not the newest
    with pytest.raises(UserError, match="exists already"):
        install(stub, folder)


def test_what_fails_leaves_no_folder(stub, tmp_path):
    wrong = Environment(("stub-reward==2.0",), "MIT", "none", "none", "", stub.python)
    with pytest.raises(UserError, match=r"pip --python .* install stub-reward==2.0` failed with status 1"):
        install(wrong, tmp_path / "environment")
    assert not (tmp_path / "environment").exists()


def test_uv_is_preferred_and_a_python_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", {"uv": "/bin/uv"}.get)
    steps = commands(ENVIRONMENTS["editreward"], tmp_path)
    assert steps[0][:4] == ["/bin/uv", "venv", "--python", "3.11"]
    assert steps[1][:5] == ["/bin/uv", "pip", "install", "--python", str(tmp_path / "bin" / "python")]
    assert steps[3][-1] == "edb027edde6080b8a9521ef8e87049b3797f8374"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"needs Python 3\.5, and neither uv nor python3\.5 was found"):
        commands(Environment((), "", "", "", "", "3.5"), tmp_path)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_environment_says_how_it_is_used(name, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", {"uv": "/bin/uv"}.get)
    printed = cgrpo(name, "--folder", str(tmp_path / "e"), "--dry-run").stdout
    assert "GB" in printed
    assert all("==" in requirement for requirement in ENVIRONMENTS[name].requirements[:1])
    assert str(tmp_path) in ENVIRONMENTS[name].use.format(folder=tmp_path)


def test_an_unknown_name():
    with pytest.raises(UserError, match=r"no environment for 'editscor', only for .* Did you mean 'editscore'"):
        environments.environment_named("editscor")
