"""A process that is killed at one of its system calls, played in the test's own process."""

import os
from collections.abc import Callable, Iterator

import pytest

CALLS = ("fsync", "link", "mkdir", "rename", "replace", "rmdir", "unlink")
"""What changes names on the disk, or waits for it."""


class Killed(BaseException):
    pass


def kills(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> Iterator[int]:
    """Do `work` again and again, killed before its 1st, 2nd, ... call; yields after each kill, until one got through.

    After the kill all further calls fail too, so that no clean-up runs that a dead process would not have done.
    """
    for last in range(1, 10_000):
        count = 0

        def fatal(real: Callable[..., object], last: int = last) -> Callable[..., object]:
            def call(*arguments: object, **named: object) -> object:
                nonlocal count
                count += 1
                if count >= last:
                    raise Killed
                return real(*arguments, **named)

            return call

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, fatal(getattr(os, name) if name != "fsync" else lambda handle: None))
            try:
                work()
            except Killed:
                pass
            else:
                return
        yield last
