import errno
import fcntl
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from customized_grpo.errors import UserError
from customized_grpo.store import Folder
from store.kills import kills


class Study(Folder):
    KIND, MARKER, INFO, COMMAND = "study", "study.json", "study.json", "study"


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
    with pytest.raises(UserError, match=r"cannot be made, because '.*notes.txt' is a file"):
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
        assert study.is_empty() or study.facts() == {"format": 1, "seed": 1}
    assert calls >= 3
    assert {p.name for p in study.path.iterdir()} == {".lock", "study.json"}, "drafts are swept away"


def test_a_claim_is_for_the_same_identity_only(tmp_path: Path) -> None:
    study = Study(tmp_path / "study")
    study.claim({"seed": 1, "sizes": (1, 2)})
    study.claim({"seed": 1, "sizes": (1, 2), "more": True})
    with pytest.raises(UserError, match=r"holds a study with other sizes than this one \(\[1, 2\], not \[1, 3\]\)"):
        study.claim({"sizes": [1, 3]})
    assert study.facts() == {"format": 1, "seed": 1, "sizes": [1, 2], "more": True}
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("mine")
    with pytest.raises(UserError, match="holds something that is not a study; name another output"):
        Study(tmp_path / "thesis").claim({})
    with pytest.raises(UserError, match="could not be written"), Study(tmp_path / "thesis" / "chapter").lock():
        pass


def test_what_nothing_depends_on_may_differ(tmp_path: Path) -> None:
    study = Study(tmp_path / "study")
    study.claim({"policy": {"use": "P", "offload": False}, "text": "x" * 200})
    study.claim({"policy": {"use": "P", "offload": True}}, free=lambda name: name == "policy.offload")
    assert study.facts()["policy"] == {"use": "P", "offload": True}
    for policy in ({"use": "Q", "offload": True}, {"offload": True}, {"use": "P", "offload": True, "size": 2}):
        with pytest.raises(UserError, match=r'other policy\.(use|size) than this one \("P"|null'):
            study.claim({"policy": policy}, free=lambda name: name == "policy.offload")
    with pytest.raises(UserError, match="with other text than this one; name another output"):
        study.claim({"text": "y" * 200})


def test_a_later_format_and_damaged_facts_are_refused(tmp_path: Path) -> None:
    study = Study(tmp_path / "study")
    study.claim({"seed": 1})
    study.describe(format=2)
    for use in (study.read_facts, lambda: study.claim({"seed": 1})):
        with pytest.raises(UserError, match="has format 2, and this version reads up to 1; update"):
            use()
    study.info.write_text("{")
    for use in (study.read_facts, lambda: study.claim({"seed": 1})):
        with pytest.raises(UserError, match=r"study\.json' is missing or damaged"):
            use()


@pytest.mark.parametrize(
    ("error", "status"), [(None, "finished"), (KeyboardInterrupt, "interrupted"), (ValueError, "failed")]
)
def test_work_says_how_it_ended(tmp_path: Path, error: type[BaseException] | None, status: str) -> None:
    study = Study(tmp_path / "study")
    with study.working({"seed": 1}, {"command": ["first"]}):
        assert (study.is_locked(), study.status) == (True, "running")
    with pytest.raises(error) if error else nullcontext(), study.working({"seed": 1}, {"command": ["second"]}):
        assert study.facts()["finished"] is None
        if error:
            raise error
    assert (study.is_locked(), study.status, study.facts()["command"]) == (False, status, ["first"])


def test_processes_that_share_a_folder_wait_and_keep_each_others_drafts(tmp_path: Path) -> None:
    study, order = Study(tmp_path / "study"), []
    draft = study.path / ".image.png.0.partial"
    with study.lock(briefly=True):
        draft.write_text("another process is at it")
        other = threading.Thread(target=lambda: order.append(_held_briefly(study.path)))
        other.start()
        other.join(timeout=1.2)  # longer than a process that is alone would wait
        order.append("first")
    other.join()
    assert order == ["first", "second"]
    assert draft.exists()
    with study.lock():
        assert not draft.exists()


def _held_briefly(path: Path) -> str:
    with Study(path).lock(briefly=True):
        return "second"


def test_the_rows_of_all_parts_are_read(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.append("scores/0.jsonl", {"task": "a", "score": float("nan")}, {"score": 1})
    study.append("scores/1.jsonl", {"task": "b", "score": [1, float("inf")]})
    assert study.rows("scores/*.jsonl", task=str) == [{"task": "a", "score": None}, {"task": "b", "score": [1, None]}]
    assert study.rows("none/*.jsonl") == []


@pytest.mark.parametrize("damage", [b'{"status": "runn', b"\xff", b"[]", b"[" * 9999])
def test_damaged_facts_are_kept_and_stop_nothing(tmp_path: Path, damage: bytes) -> None:
    study = Study(tmp_path)
    study.info.write_bytes(damage)
    assert (study.facts(), study.status) == ({}, "unknown")
    study.describe(status="interrupted")
    assert study.facts() == {"status": "interrupted"}
    assert (tmp_path / "study-damaged.json").read_bytes() == damage
