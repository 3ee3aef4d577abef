"""Run a command; when it ends or standard input closes, end every process that it started.

    python supervisor.py COMMAND [ARGUMENT ...]

`RemoteReward` starts rewards with it, so that no process remains, however the trainer ends. On Linux this includes
processes in other sessions and process groups: when their parent ends, they become children of this process.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def descendants(root: int) -> set[int]:
    """Living processes below `root`; none on systems without /proc."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended
            state, parent = stat.read_text(errors="replace").rsplit(")", 1)[1].split()[:2]
            if state != "Z":
                parents[int(stat.parent.name)] = int(parent)
    found, level = set(), {root}
    while level := {pid for pid, parent in parents.items() if parent in level} - found:
        found |= level
    return found


def end() -> None:
    """Kill all descendants, including those started meanwhile, then this process and its group."""
    deadline = time.monotonic() + 2
    while (found := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    os.killpg(0, signal.SIGKILL)


def end_with_input() -> None:
    while sys.stdin.buffer.read(1024):
        pass
    end()


def main() -> None:
    with contextlib.suppress(AttributeError):  # not on Linux
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: end())
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=end_with_input, daemon=True).start()
    while os.wait()[0] != command.pid:
        pass
    end()


if __name__ == "__main__":
    main()
