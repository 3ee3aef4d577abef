"""Two installed libraries that do not work together, as files in a folder on the path."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from customized_grpo import libraries
from customized_grpo.cli import main as cli
from customized_grpo.data.hub import open_dataset
from customized_grpo.data.segment import rembg_segmenter
from customized_grpo.errors import UserError
from customized_grpo.libraries import library_problem
from customized_grpo.rewards.hps import Hpsv3Reward
from customized_grpo.settings import Spec
from customized_grpo.settings.build import construct, resolve
from customized_grpo.sources import explain

BOTH = "alpha-lib 1.2 does not work with beta 3.0"
ADVICE = "pip install --upgrade alpha-lib beta."
FAILS = {
    "from beta import gone": f"{BOTH} (ImportError: cannot import name 'gone' from 'beta'); {ADVICE}",
    "import beta.gone": f"{BOTH} (ModuleNotFoundError: No module named 'beta.gone'; 'beta' is not a package); {ADVICE}",
    "import beta\nbeta.gone": f"{BOTH} (AttributeError: module 'beta' has no attribute 'gone'); {ADVICE}",
    "import beta\nbeta.Model.gone": f"{BOTH} (AttributeError: type object 'Model' has no attribute 'gone'); {ADVICE}",
    "import beta\nbeta.fail()": f"{BOTH} (RuntimeError: no such operator); {ADVICE}",
    "import absent": "alpha-lib 1.2 needs the module absent, which is missing; install the package that has it.",
    "raise RuntimeError('x')": "alpha-lib 1.2 cannot be imported (RuntimeError: x); pip install --upgrade alpha-lib.",
    "import torch\ntorch.gone": "alpha-lib 1.2 does not work with torch VERSION (AttributeError: module 'torch' has no "
    "attribute 'gone'); pip install --upgrade alpha-lib.",
}
"""What `alpha` does when it is imported, and the sentence for it."""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes `alpha`, the library that is imported, with this code; `beta` is the other."""
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    monkeypatch.syspath_prepend(tmp_path)
    libraries._installed.cache_clear()
    monkeypatch.setattr("customized_grpo.libraries.program", lambda name: name)
    for module, distribution, version in (("alpha", "alpha-lib", "1.2"), ("beta", "beta", "3.0")):
        about = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (about / "top_level.txt").write_text(module)
    (site / "beta.py").write_text(
        "class Model: ...\n\n\ndef fail():\n    raise RuntimeError('no such operator')\n",
    )

    def write(code: str) -> None:
        (site / "alpha.py").write_text(code)

    yield write
    for module in ("alpha", "beta", "mine", "box"):
        sys.modules.pop(module, None)
    libraries._installed.cache_clear()


def failure(code: str) -> Exception:
    try:
        exec(code, {"__name__": "beta"})  # code of the user, named like a library
    except Exception as error:
        return error
    raise AssertionError(code)


@pytest.mark.parametrize("code", FAILS)
def test_the_libraries_are_named_with_their_versions(install, code: str) -> None:
    install(code)
    problem = library_problem(failure("import alpha"))
    version = sys.modules["torch"].__version__
    assert str(problem) == FAILS[code].replace("VERSION", version)


def test_what_libraries_wrap_is_unwrapped(install) -> None:
    install("from beta import gone")
    wrapped = "try:\n    import alpha\nexcept Exception as e:\n    raise RuntimeError('Failed to import it') from e"
    assert BOTH in str(library_problem(failure(wrapped)))


@pytest.mark.parametrize("code", ["import absent", "from beta import gone", "raise RuntimeError", "1 / 0"])
def test_the_users_own_module_is_the_users(install, tmp_path: Path, code: str) -> None:
    install("")
    (tmp_path / "mine.py").write_text(code)
    assert library_problem(failure("import mine")) is None
    assert library_problem(failure(code)) is None
    with pytest.raises(UserError, match=r"reward: .*'mine' for 'mine:score'.*make sure that"):
        resolve("mine:score", "reward")


def test_an_import_in_a_function_counts_too(install) -> None:
    install("def load():\n    from beta import gone")
    assert str(library_problem(failure("import alpha; alpha.load()"))) == FAILS["from beta import gone"]


def test_a_name_that_this_package_needs_and_a_library_lacks(install) -> None:
    install("")
    asks = {"__name__": "customized_grpo.policies.flux"}
    with pytest.raises(ImportError) as caught:
        exec("def load():\n    from beta import gone\nload()", asks)
    said = str(library_problem(caught.value))
    assert said.startswith("customized-grpo ")
    assert "does not work with beta 3.0 (ImportError: cannot import name 'gone' from 'beta'); pip install" in said
    with pytest.raises(ImportError) as caught:
        exec("def load():\n    import beta.typed_by_the_user\nload()", asks)
    assert library_problem(caught.value) is None
    with pytest.raises(ImportError) as caught:
        exec("import absent", asks)
    assert "needs the module absent, which is missing" in str(library_problem(caught.value))


def test_a_call_that_fails_is_no_import_that_fails(install) -> None:
    install("")
    assert library_problem(failure("import beta; beta.fail()")) is None


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("datasets", lambda: open_dataset("x")),
        ("rembg", rembg_segmenter),
        ("hpsv3", Hpsv3Reward),
    ],
)
def test_an_optional_library_that_is_broken_is_not_called_missing(
    install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, call: Callable[[], object]
) -> None:
    install("")
    (tmp_path / "site-packages" / f"{module}.py").write_text("from beta import gone")
    monkeypatch.setitem(libraries._installed(), module, ["alpha-lib"])
    with pytest.raises(UserError, match=BOTH):
        call()


class Uses:
    def __init__(self) -> None:
        import alpha  # noqa: F401  # pyright: ignore[reportMissingImports]


@pytest.mark.parametrize("where", ["resolve", "construct", "explain", "stub", "command"])
def test_it_is_told_wherever_libraries_are_imported(
    install, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install("import beta\nbeta.gone")
    (tmp_path / "mine.py").write_text("import alpha")
    (tmp_path / "box").mkdir()
    attach = "from customized_grpo.stubs import attach\n__getattr__, __dir__, __all__ = attach(__name__, __file__)\n"
    (tmp_path / "box" / "__init__.py").write_text(attach)
    (tmp_path / "box" / "__init__.pyi").write_text("from .part import name as name\n")
    (tmp_path / "box" / "part.py").write_text("import alpha\n")
    app = typer.Typer()
    app.command()(Uses)
    monkeypatch.setattr(sys, "argv", ["cgrpo"])
    calls = {
        "resolve": lambda: resolve("mine:score", "reward"),
        "construct": lambda: construct(Spec(use="test_libraries:Uses"), "reward"),
        "explain": lambda: explain("owner/name", "a model", failure("import alpha")),
        "stub": lambda: exec("from box import name"),
        "command": lambda: cli.main(app),
    }
    try:
        said = str(calls[where]())
    except UserError as error:
        said = str(error)
    except SystemExit:
        said = capsys.readouterr().err.strip()
    assert said.removeprefix("error: ").startswith(f"{BOTH} (AttributeError: ")
