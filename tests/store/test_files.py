import json
import math
import os
from contextlib import suppress
from pathlib import Path

import pytest

from customized_grpo.errors import UserError
from customized_grpo.store import (
    append,
    check_place,
    is_file,
    parse_json,
    read_json,
    read_lines,
    read_text,
    replacing,
    write,
)
from customized_grpo.store.files import MAX_NAME
from store.kills import kills


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "a", "one ä")
    write(tmp_path / "deep" / "a", b"two")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a"]
    assert (tmp_path / "deep" / "a").read_text() == "two"


@pytest.mark.parametrize("new", [False, True])
def test_a_kill_at_any_call_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: bool
) -> None:
    file, calls = tmp_path / "a.json", 0
    for _ in kills(monkeypatch, lambda: write(file, "new" * 1000, new=new)):
        calls += 1
        assert not file.exists() or file.read_text() == "new" * 1000
        if not new:
            file.write_text("old")
        file.unlink(missing_ok=new)
    assert calls >= 2
    assert file.read_text() == "new" * 1000


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file/below", "file/far/below"):
        with pytest.raises(UserError, match=r"below' cannot be made, because '.*file' is a file; name another output"):
            check_place(tmp_path / name)
        for new in (False, True):
            with pytest.raises(UserError, match=r"below' could not be written"):
                write(tmp_path / name, "text", new=new)
    check_place(tmp_path / "not" / "there" / "yet")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_that_may_not_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match=r"new' cannot be made, because '.*' may not be written to"):
        check_place(tmp_path / "new")


def test_a_name_that_is_too_long_for_a_draft_is_refused(tmp_path: Path) -> None:
    check_place(tmp_path / ("n" * MAX_NAME))
    write(tmp_path / ("n" * MAX_NAME), "text")
    with pytest.raises(UserError, match=r"The name 'n{40}...' is too long"):
        check_place(tmp_path / ("n" * (MAX_NAME + 1)))
    with pytest.raises(UserError, match="could not be written"):
        check_place(tmp_path / ("n" * 300) / "below")
    assert not is_file(tmp_path / ("n" * 300))


def test_what_fails_in_the_block_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    write(tmp_path / "a", "one")
    with suppress(ZeroDivisionError), replacing(tmp_path / "a") as draft:
        draft.write_text("tw")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "one"


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_overwrites_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    write(tmp_path / "a", "one", new=True)
    with pytest.raises(FileExistsError):
        write(tmp_path / "a", "two", new=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "one"


@pytest.mark.parametrize("add", [lambda path: write(path, "two"), lambda path: append(path, {"a": 2})])
def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, add) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    write(tmp_path / "a", "one\n")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"a' could not be written \(No space left on device\); free some space"):
        add(tmp_path / "a")
    assert (tmp_path / "a").read_text().startswith("one\n")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_lines_are_read_in_whatever_state_they_are(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    good = '{"iteration": 1, "note": "two\u2028lines\u0085here"}'.encode()
    bad = [
        b'{"iteration": 2, "lo',
        b"\xff\xfe{}",
        b"{}",
        b"[1]",
        b'{"iteration": "3"}',
        b'{"iteration": true}',
        b"[" * 9999,
    ]
    file.write_bytes(b"\n".join([good, *bad, b"", b'{"iteration": 9}']))
    found = read_lines(file, iteration=int)
    assert [row["iteration"] for row in found.rows] == [1, 9]
    assert found.rows[0]["note"] == "two\u2028lines\u0085here", "only a newline ends a line"
    assert list(found.damaged.values()) == bad
    assert (list(found.damaged), found.count) == ([2, 3, 4, 5, 6, 7, 8], 10)
    assert read_lines(tmp_path / "none.jsonl").rows == []


def test_a_line_that_was_cut_costs_only_itself(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "lines.jsonl"
    append(file, {"a": 1, "b": math.nan}, {"a": 2, "b": -math.inf})
    with file.open("ab") as opened:
        opened.write(b'{"a": 3, "b')
    append(file, {"a": 4})
    assert read_lines(file, a=int).rows == [{"a": 1, "b": None}, {"a": 2, "b": None}, {"a": 4}]
    assert [json.loads(line)["a"] for line in file.read_text().splitlines()[::3]] == [1, 4]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_of_any_unicode_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a").write_bytes("ä\u2028b\r\n\x85c\n".encode(encoding))
    assert read_text(tmp_path / "a") == "ä\u2028b\n\x85c\n"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            "a\ncafé".encode("cp1252"),
            r"line 2: this is not UTF-8 text \(unexpected end of data\); save the file as UTF-8",
        ),
        (b"a\r\n\x93b\x94", "line 2: this is not UTF-8 text"),
        ("a\nb".encode("utf-16-le"), r"line 1: this is not UTF-8 text \(zero byte\)"),
        ("ab\nc".encode("utf-16") + b"\0", "line 2: this is not UTF-16-LE text"),
        (b"\xff\xfe\x00\xd8\n\x00", "line 1: this is not UTF-16-LE text"),
        (b"a\nb\0", r"line 2: this is not UTF-8 text \(zero byte\)"),
    ],
)
def test_what_is_no_text_is_refused_by_line(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.txt', {sentence}"):
        read_text(tmp_path / "a.txt")


def test_a_text_file_that_is_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"cannot be read .*; give a text file"):
            read_text(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[1,\n2", r"x: not JSON \(.* at line 2, column 2\)"),
        ("[1", r"x: not JSON \(.* at column 3\)"),
        ("[" * 3000, "x: not JSON that can be read"),
        ("9" * 5000, "x: not JSON that can be read"),
        ('{"a": ["\\ud800"]}', r"x: '\\ud800' is half of a surrogate pair"),
        ("", "x: not JSON"),
    ],
)
def test_what_is_no_json_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_json(text, "x")


def test_json_of_a_file_is_named_after_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes("[1]".encode("utf-8-sig"))
    assert read_json(tmp_path / "a.json") == [1]
    (tmp_path / "a.json").write_text("[1")
    with pytest.raises(UserError, match=r"a\.json': not JSON"):
        read_json(tmp_path / "a.json")
