"""A part of the bad command lines; `make fuzz` runs all of them."""

from collections.abc import Iterator
from pathlib import Path

import bad_input
import pytest
from bad_input import Bad


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("place")
    bad_input.make_place(folder)
    with pytest.MonkeyPatch.context() as patch, bad_input.nothing_is_loaded():
        patch.chdir(folder)
        yield folder


def test_check_and_train_refuse_a_configuration_in_the_same_sentence(place: Path) -> None:
    before, wrong, given = bad_input.snapshot(place), [], bad_input.configurations()[::6]
    for bad in given:
        checked, trained = (bad_input.run((*command, *bad.words)) for command in (("config", "--check"), ("train",)))
        if problem := checked.wrong or trained.wrong:
            wrong.append(f"{bad}: {problem}: {checked.said}")
        elif checked.said != trained.said and "Usage" not in checked.said:
            wrong.append(f"{bad}: check says {checked.said}; train says {trained.said}")
    assert wrong == []
    assert len(given) > 100
    assert bad_input.snapshot(place) == before, "a file was written"


def test_other_commands_refuse_bad_input_in_one_sentence(place: Path) -> None:
    before, given = bad_input.snapshot(place), others()
    wrong = [f"{bad}: {end.wrong}: {end.said}" for bad in given if (end := bad_input.run(bad.words)).wrong]
    assert wrong == []
    assert len(given) > 300
    assert bad_input.snapshot(place) == before, "a file was written"


def others() -> list[Bad]:
    """All of the commands' own, and some with bad folders and configurations."""
    lines = bad_input.command_lines()
    own = [bad for bad in lines if bad.kind == "a command"]
    folders = [bad for bad in lines if bad.kind == "a folder"]
    files = [
        bad for bad in lines if bad.kind not in ("a command", "a folder") and bad.words[0] not in ("config", "train")
    ]
    return own + folders[::3] + files[::3]


@pytest.mark.parametrize(
    ("words", "wrong"),
    [(("config",), "exit status 0"), (("train",), "it went on to load weights"), (("config", "seed=x"), "")],
)
def test_what_is_not_refused_is_found(words: tuple[str, ...], wrong: str) -> None:
    assert bad_input.run(words).wrong == wrong


def test_an_error_that_no_command_expects_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise RuntimeError("no sentence")

    monkeypatch.setattr("customized_grpo.config.load_config", fail)
    assert bad_input.run(("config",)).wrong == "traceback: RuntimeError('no sentence')"
