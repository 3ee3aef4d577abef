"""The folder of a run, probe or study: its identity, a lock, and facts that survive a kill."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from customized_grpo.errors import UserError
from customized_grpo.shell import command
from customized_grpo.store import files
from customized_grpo.store.files import DRAFT, Lines

F = TypeVar("F", bound="Folder")
LOCK = ".lock"
NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of file systems that do not support locks of the operating system."""


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Folder:
    """A folder of one kind, which a subclass names. Every file in it is written by `write` and `append`."""

    KIND: ClassVar[str]
    """Such as "run"."""
    MARKER: ClassVar[str]
    """File that makes a folder one of this kind."""
    INFO: ClassVar[str]
    """JSON file of the facts: identity, status, times. May be the marker."""
    COMMAND: ClassVar[str]
    """The command that makes such folders, and resumes them with --resume."""
    FORMAT: ClassVar[int] = 1
    """Version of the folder's files, recorded by `claim`. Folders without a record have version 1."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.info = self.path / self.INFO

    # ---- identity

    @classmethod
    def create(cls: type[F], path: Path | None) -> F:
        """Create a folder; None names it after the time, under `runs` for a run.

        Raises:
            UserError: if the folder is not empty, or cannot be created.
        """
        folder = cls(path if path is not None else _folder_by_time(Path(f"{cls.KIND}s")))
        folder.check_free()
        folder._make()
        return folder

    @classmethod
    def existing(cls: type[F], path: str | Path) -> F:
        """Open a folder that `COMMAND` created.

        Raises:
            UserError: if it is missing or of another kind.
        """
        folder = cls(path)
        if not (folder.path / cls.MARKER).is_file():
            missing = "is a file" if folder.path.exists() else "does not exist"
            seen = f"has no {cls.MARKER}" if folder.path.is_dir() else missing
            raise UserError(
                f"'{folder.path}' is not a {cls.KIND} folder: it {seen}. `{command(cls.COMMAND)}` makes one and prints "
                f"its name."
            )
        return folder

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.cannot_write(self.path, error) from error

    def is_empty(self) -> bool:
        """Whether it has no files, or only those that a kill in the first moment leaves."""
        return not any(p.is_file() and p.name != LOCK and p.suffix != DRAFT for p in self.path.rglob("*"))

    def check_free(self) -> None:
        """Raise UserError unless a new record can be written here."""
        files.check_place(self.path)
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"The output '{self.path}' is a file; name a folder that does not exist yet.")
        if not self.is_empty():
            raise UserError(
                f"The folder '{self.path}' holds something already; name another output, or resume the {self.KIND} in "
                f"it: {command(self.COMMAND, '--resume', self.path)}"
            )

    def check_own(self) -> None:
        """Raise UserError if the folder cannot be created, or contains something of another kind."""
        files.check_place(self.path)
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"The output '{self.path}' is a file; name a folder.")
        if not (self.path / self.MARKER).is_file() and not self.is_empty():
            raise UserError(f"'{self.path}' holds something that is not a {self.KIND}; name another output.")

    def claim(self, identity: Mapping[str, Any], *, free: Callable[[str], bool] = lambda name: False) -> None:
        """Record the identity of the folder, or check that it is the same. Call it under `lock`.

        Args:
            identity: what all processes that work on one record have in common, as JSON. Names that an older record
                does not have are added to it.
            free: whether a name such as "policy.offload" may differ, because no result in the folder depends on it.

        Raises:
            UserError: if the folder contains something else, a damaged record, or a record of another identity.
        """
        self.check_own()
        wanted: dict[str, Any] = json.loads(json.dumps(identity, default=str))
        known = self.read_facts() if (self.path / self.MARKER).is_file() else {}
        for name, before, now in _changes({name: known[name] for name in wanted if name in known}, wanted):
            if name.split(".")[0] in known and not free(name):
                shown = f" ({before}, not {now})" if len(before + now) < 100 else ""
                raise UserError(
                    f"'{self.path}' holds a {self.KIND} with other {name} than this one{shown}; name another output."
                )
        self.describe(format=self.FORMAT, **wanted)

    # ---- the lock

    @contextmanager
    def lock(self, *, briefly: bool = False) -> Iterator[None]:
        """Keep other processes from writing here until the block ends. The lock is released if the process dies.

        On a file system without such locks, a file with the number and host of the process is used instead.

        Args:
            briefly: for processes that share the folder and hold the lock for a moment each: wait for the others, and
                do not remove their drafts.

        Raises:
            UserError: if another process holds it.
        """
        self._make()
        try:  # `is_locked` in another process holds it for an instant
            held = self._acquire(timeout=60 if briefly else 1)
        except Timeout:
            raise self._in_use() from None
        try:
            if not briefly:
                self._sweep()
            yield
        finally:
            held.release()

    def is_locked(self) -> bool:
        """Whether a process is writing here, as far as this machine can tell."""
        if not any((self.path / name).exists() for name in (LOCK, f"{LOCK}.pid")):
            return False
        try:
            self._acquire(timeout=0).release()
        except (Timeout, OSError):
            return True
        return False

    def check_idle(self) -> None:
        """Raise UserError if another process is writing here."""
        if self.is_locked():
            raise self._in_use()

    def _acquire(self, timeout: float) -> BaseFileLock:
        lock: BaseFileLock = FileLock(self.path / LOCK, fallback_to_soft=False)
        try:
            lock.acquire(timeout=timeout, poll_interval=0.05)
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            lock = SoftFileLock(self.path / f"{LOCK}.pid")
            lock.acquire(timeout=timeout, poll_interval=0.05)
        return lock

    def _in_use(self) -> UserError:
        more = f", or remove '{LOCK}.pid' in it if that process is gone" if (self.path / f"{LOCK}.pid").exists() else ""
        return UserError(
            f"Another process is writing to the {self.KIND} folder '{self.path}'; wait until it ends, stop it, or name "
            f"another folder{more}."
        )

    def _sweep(self) -> None:
        """Remove the drafts that a kill has left."""
        for draft in list(self.path.rglob(f".*{DRAFT}")):
            if draft.is_dir():
                shutil.rmtree(draft, ignore_errors=True)
            else:
                draft.unlink(missing_ok=True)

    @contextmanager
    def working(self, identity: Mapping[str, Any], about: Mapping[str, Any]) -> Iterator[None]:
        """Lock and claim the folder, record that it is running, and finally how the block ended.

        Args:
            identity: see `claim`.
            about: facts of the first process, such as its command. Facts that are already recorded stay.

        Raises:
            UserError: as `lock` and `claim`.
        """
        self.check_own()
        with self.lock():
            self.claim(identity)
            self.describe(**{**about, **self.facts(), "status": "running", "finished": None})
            try:
                yield
            except BaseException as error:
                with suppress(UserError):  # such as a full disk, which is the error already
                    self.finish("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
                raise
            self.finish("finished")

    # ---- facts

    def facts(self) -> dict[str, Any]:
        """The content of the info file; empty if it is missing or damaged."""
        try:
            found = json.loads(self.info.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def read_facts(self, **fields: type) -> dict[str, Any]:
        """The facts, which must be there.

        Args:
            fields: names and types of facts that are needed.

        Raises:
            UserError: if the info file is missing or damaged, lacks a field, or was written by a later version.
        """
        found = self.facts()
        if not found:
            raise UserError(f"'{self.info}' is missing or damaged; restore it, or name another {self.KIND}.")
        if (version := found.get("format", 1)) > self.FORMAT:
            raise UserError(
                f"'{self.path}' has format {version}, and this version reads up to {self.FORMAT}; update "
                f"customized-grpo."
            )
        lacking = next((name for name, kind in fields.items() if not isinstance(found.get(name), kind)), None)
        if lacking is not None:
            raise UserError(
                f"'{self.info}' has no {lacking}, so the {self.KIND} was probably stopped at its start; remove the "
                f"folder and start again."
            )
        return found

    def describe(self, **fields: Any) -> None:
        """Merge fields into the info file; a damaged one is kept beside it as INFO-damaged.json."""
        known = self.facts()
        if not known and self.info.exists():
            self.info.replace(self.info.with_name(f"{self.info.stem}-damaged.json"))
        self.write(self.INFO, json.dumps({**known, **fields}, indent=1, default=str))

    def finish(self, status: str, **fields: Any) -> None:
        """Record how it ended. Call it last, when everything else is on the disk."""
        self.describe(**fields, finished=now(), status=status)

    @property
    def status(self) -> str:
        """running, finished, interrupted, failed or unknown, as recorded; killed if it was running and nothing
        writes any more."""
        said = str(self.facts().get("status") or "unknown")
        return "killed" if said == "running" and not self.is_locked() else said

    # ---- files

    def write(self, name: str, content: str | bytes) -> Path:
        """Replace a file in one step. Raises UserError if it cannot be written."""
        return files.write(self.path / name, content)

    def append(self, name: str, *records: Mapping[str, Any]) -> None:
        """Append records to a file of JSON lines. Raises UserError if it cannot be written."""
        files.append(self.path / name, *records)

    def lines(self, name: str, **fields: type) -> Lines:
        """The records of a file of JSON lines, as `read_lines` does."""
        return files.read_lines(self.path / name, **fields)

    def rows(self, pattern: str, **fields: type) -> list[dict[str, Any]]:
        """The records of all files of JSON lines that match, without those that are damaged or lack a field."""
        return [row for path in sorted(self.path.glob(pattern)) for row in files.read_lines(path, **fields).rows]


def _changes(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted name, value before, value now) of everything that differs, values as JSON."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            inner = f"{name}.{key}" if name else str(key)
            yield from _changes(before.get(key), now.get(key), inner)
    elif before != now:
        yield name, json.dumps(before), json.dumps(now)


def _folder_by_time(home: Path) -> Path:
    """Create a folder named after the time, which no other process gets."""
    stem = datetime.now().strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        path = home / (stem + (f"-{number}" if number else ""))
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise UserError(f"The folder '{home}' holds a thousand folders of this second; name an output.")
