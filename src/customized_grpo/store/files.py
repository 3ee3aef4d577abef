"""Atomic replacement of files, text in any Unicode encoding, and JSON lines that may be damaged."""

import codecs
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError

from customized_grpo.errors import UserError

DRAFT = ".partial"
"""Ending of a file that is being written. A kill may leave one behind; `Folder.lock` removes it."""
MAX_NAME = 230
"""Most bytes in the name of a file or folder that we create. File systems take 255, and drafts have longer names."""
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
"""Byte order marks, and the encodings of the files that begin with them."""


@contextmanager
def replacing(path: Path, *, new: bool = False) -> Iterator[Path]:
    """Yield the path of a draft, and replace `path` with it when the block ends without an error.

    After a kill or a power cut, `path` is the old file or the new one, never a part of either.

    Args:
        path: the file; missing parent folders are created.
        new: do not overwrite. Of several processes, the first one wins.

    Raises:
        FileExistsError: with `new`, if the file exists.
        UserError: if it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{uuid4().hex[:8]}{DRAFT}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        if new:
            _link(draft, path)
        else:
            draft.replace(path)
    except (OSError, SafetensorError) as error:
        if new and isinstance(error, FileExistsError) and path.exists():
            raise
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # there may be no draft, and no folder for one
            draft.unlink()


def _link(draft: Path, path: Path) -> None:
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:  # this file system has no hard links
        if path.exists():
            raise FileExistsError(f"'{path}' exists already") from None
        draft.rename(path)


def cannot_write(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:150]
    return UserError(
        f"'{str(path)[:100]}' could not be written ({reason}); free some space, permit writing, or name another place."
    )


def is_file(path: str | Path) -> bool:
    """Like `Path.is_file`, which however raises for a name that is too long."""
    return os.path.isfile(path)  # noqa: PTH113


def check_place(path: Path) -> None:
    """Check that a file or folder could be created at a path, before hours are spent on its contents.

    Raises:
        UserError: if its name is too long, a parent is a file, or writing is not permitted.
    """
    if len(os.fsencode(path.name)) > MAX_NAME:
        raise UserError(f"The name '{path.name[:40]}...' is too long; name an output of at most {MAX_NAME} bytes.")
    for folder in path.parents:
        try:
            mode = folder.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise cannot_write(path, error) from error
        if not stat.S_ISDIR(mode):
            raise UserError(f"'{path}' cannot be made, because '{folder}' is a file; name another output.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"'{path}' cannot be made, because '{folder}' may not be written to; name another output.")
        return


def write(path: Path, content: str | bytes, *, new: bool = False) -> Path:
    """Write a file through `replacing`, text as UTF-8, and return its path."""
    with replacing(path, new=new) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_text(path: Path) -> str:
    """A text file of a user, its line ends as "\\n": UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    Other encodings are not guessed, because a wrong guess changes words without an error.

    Raises:
        UserError: if the file cannot be read, or holds a byte that is not text, with its line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}); give a text file.") from error
    mark, encoding = next((pair for pair in MARKS.items() if content.startswith(pair[0])), (b"", "utf-8"))
    content = content[len(mark) :]
    try:
        text = content.decode(encoding)
        before, zero, _ = text.partition("\0")
        wrong = "zero byte" if zero else ""
    except UnicodeDecodeError as error:
        text, before, wrong = "", content[: error.start].decode(encoding, "ignore"), error.reason
    if wrong:
        line = before.count("\n") + 1
        raise UserError(
            f"'{path}', line {line}: this is not {encoding.upper()} text ({wrong}); save the file as UTF-8."
        )
    return text.replace("\r\n", "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file that a user gives.

    Raises:
        UserError: if it is not text or not JSON, with the line.
    """
    return parse_json(read_text(path), f"'{path}'")


def parse_json(text: str, where: str) -> Any:
    """JSON to plain data; `where` begins the sentence of the error.

    Raises:
        UserError: if it is not JSON, is nested too deeply, or holds a number or half a character that cannot be read.
    """
    try:
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode()
        return content
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if "\n" in text else f"column {error.colno}"
        raise UserError(f"{where}: not JSON ({error.msg} at {place}).") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {error.object[error.start]!a} is half of a surrogate pair, not text.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON that can be read ({str(error)[:80]}).") from error


def checksum(content: Any) -> str:
    """SHA-256 of content as JSON, whatever the order of its names."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def append(path: Path, *records: Mapping[str, Any]) -> None:
    """Append records to a file of JSON lines, and flush them to the disk.

    Numbers that are not finite become null. If a kill has cut the last line off, the records start on a new line.

    Raises:
        UserError: if the file cannot be written.
    """
    text = b"".join(json.dumps(plain(row)).encode() + b"\n" for row in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else b"\n" + text
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from error


def plain(value: Any) -> Any:
    """Data for JSON: arrays and tensors become lists, and numbers that are not finite null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Lines:
    """The content of a file of JSON lines, as far as it could be read."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    damaged: dict[int, bytes] = field(default_factory=dict)
    """Lines that could not be read, by line number, from 1."""
    count: int = 0
    """Number of the last line that is not blank."""


def read_lines(path: Path, **fields: type) -> Lines:
    """Read a file of JSON lines. A missing file has none, and damaged lines do not hide those after them.

    Args:
        path: the file.
        fields: names and types that a line must have. Lines without them count as damaged.

    Raises:
        OSError: if the file exists and cannot be read.
    """
    found, count = Lines(), 0
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        count = number
        try:
            row = json.loads(line.decode())
            if not isinstance(row, dict) or any(type(row.get(name)) is not kind for name, kind in fields.items()):
                raise ValueError("not a record")
            found.rows.append(row)
        except (ValueError, RecursionError):
            found.damaged[number] = line
    return Lines(found.rows, found.damaged, count)
