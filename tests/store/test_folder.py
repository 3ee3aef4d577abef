import errno
import fcntl
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from customized_grpo.errors import UserError
from customized_grpo.store import Folder
from store.kills import kills


class Study(Folder):
    KIND, MARKER, INFO, COMMAND = "study", "study.json", "study.json", "cgrpo study"


HOLD = """
import sys
from store.test_folder import Study
with Study(sys.argv[1]).lock():
    Study(sys.argv[1]).describe(status="running")
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen]:
    tests = str(Path(__file__).parents[1])
    words = [sys.executable, "-c", f"import sys; sys.path.insert(0, {tests!r}){HOLD}", str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_one_process_writes_and_its_lock_dies_with_it(tmp_path: Path) -> None:
    study = Study(tmp_path / "study")
    assert not study.is_locked()
    with another_process(study.path) as process:
        assert (study.is_locked(), study.status) == (True, "running")
        with pytest.raises(UserError, match=r"Another process is writing to the study folder '.*study'; wait until"):
            study.check_idle()
        with pytest.raises(UserError, match="Another process is writing"), study.lock():
            raise AssertionError("two have it")
        process.kill()
        process.wait()
        assert (study.is_locked(), study.status) == (False, "killed")
    with study.lock():
        assert study.status == "running"
        study.finish("finished", seconds=2)
    assert (study.status, study.facts()["seconds"]) == ("finished", 2)
    assert study.facts()["finished"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_of_the_file_system_a_file_stands_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    study = Study(tmp_path / "study")
    with study.lock():
        assert study.is_locked()
        with pytest.raises(UserError, match=r"or remove '.lock.pid' in it if that process is gone"), study.lock():
            raise AssertionError("two have it")
    assert not study.is_locked()


def test_of_many_that_begin_at_the_same_moment_one_gets_the_folder(tmp_path: Path) -> None:
    together, outcomes = threading.Barrier(6), []

    def begin(name: str) -> None:
        together.wait()
        try:
            study = Study.create(tmp_path / "study")
            with study.lock():
                study.check_free()
                study.write(study.MARKER, json.dumps({"name": name}))
                outcomes.append(name)
        except UserError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=begin, args=(str(n),)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [x for x in outcomes if len(x) == 1] == [Study(tmp_path / "study").facts()["name"]]
    assert all("holds something already" in x or "Another process" in x for x in outcomes if len(x) > 1)


def test_a_new_folder_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds something already; .*cgrpo study --resume .*used"):
        Study.create(tmp_path / "used")
    with pytest.raises(UserError, match="is a file"):
        Study.create(tmp_path / "used" / "notes.txt")
    with pytest.raises(UserError, match="could not be written"):
        Study.create(tmp_path / "used" / "notes.txt" / "below")
    with pytest.raises(UserError, match=r"is not a study folder: it has no study.json"):
        Study.existing(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert len({Study.create(None).path for _ in range(3)}) == 3, "named by the time, and never the same"
    assert Path("studys").is_dir()


def test_what_a_kill_leaves_in_the_first_moment_is_still_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, calls = Study(tmp_path / "study"), 0

    def begin() -> None:
        with study.lock():
            study.claim({"seed": 1})

    for _ in kills(monkeypatch, begin):
        calls += 1
        assert study.is_empty() or study.facts() == {"seed": 1}
    assert calls >= 3
    assert {p.name for p in study.path.iterdir()} == {".lock", "study.json"}, "drafts are swept away"


def test_a_claim_is_for_the_same_identity_only(tmp_path: Path) -> None:
    study = Study(tmp_path / "study")
    study.claim({"seed": 1, "sizes": (1, 2)})
    study.claim({"seed": 1, "sizes": (1, 2), "more": True})
    with pytest.raises(UserError, match="holds a study with other sizes than this one"):
        study.claim({"sizes": [1, 3]})
    assert study.facts() == {"seed": 1, "sizes": [1, 2], "more": True}
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("mine")
    with pytest.raises(UserError, match="holds something already"):
        Study(tmp_path / "thesis").claim({})


@pytest.mark.parametrize("damage", [b'{"status": "runn', b"\xff", b"[]", b"[" * 9999])
def test_damaged_facts_are_kept_and_stop_nothing(tmp_path: Path, damage: bytes) -> None:
    study = Study(tmp_path)
    study.info.write_bytes(damage)
    assert (study.facts(), study.status) == ({}, "unknown")
    study.describe(status="interrupted")
    assert study.facts() == {"status": "interrupted"}
    assert (tmp_path / "study-damaged.json").read_bytes() == damage
