import os
import signal
import subprocess
import sys

import pytest

from customized_grpo.rewards import supervisor
from rewards.test_remote import gone

CHILDREN = "sleep 300 & echo $!; setsid sleep 300 & echo $!; (setsid env -i sleep 300 & echo $!); echo done; "


@pytest.mark.parametrize("end", ["command", "input", signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_however_it_ends(end):
    command = [sys.executable, supervisor.__file__, "sh", "-c", CHILDREN + ("true" if end == "command" else "wait")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        pids = [int(line) for line in iter(process.stdout.readline, "done\n")]
        if end == "input":
            process.stdin.close()
        elif end != "command":
            process.send_signal(end)
        assert process.wait(timeout=10) == -signal.SIGKILL
    assert len(pids) == 3
    assert all(map(gone, pids))


def test_descendants():
    with subprocess.Popen(["sh", "-c", "sleep 300 & echo $!; wait"], stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        assert {process.pid, child} <= supervisor.descendants(os.getpid())
        assert supervisor.descendants(process.pid) == {child}
        os.kill(child, signal.SIGKILL)
    assert child not in supervisor.descendants(1)
