"""Rewards in real processes of their own, on 127.0.0.1."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from customized_grpo.errors import UserError
from customized_grpo.rewards import RemoteReward, RewardUnavailable, check_reward
from customized_grpo.rewards.client import NoAnswer, request_json
from customized_grpo.rewards.remote import SERVER, _scores, to_wire
from rewards import tiny

FAR = Path(__file__).parent / "far"


@pytest.fixture
def remote():
    """Makes a RemoteReward on far_rewards.py, quick to fail, and closes it."""
    made = []

    def make(use, images="numpy", **settings):
        name, arguments = (use, {}) if isinstance(use, str) else use
        quick = {"backoff": 0.01, "timeout": 20.0, "start_timeout": 30.0} | settings
        spec = {"use": f"far_rewards:{name}", **arguments}
        made.append(RemoteReward(spec, images=images, environment={"PYTHONPATH": str(FAR)}, **quick))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


@pytest.fixture
def examples():
    mask = Image.new("L", (40, 40), 3)
    more = {"subject": "dog", "masks": (None, mask), "kind": "recontext", "target": tiny.picture(24, 16, seed=7)}
    one = tiny.example("one", references=2, **more)
    return [one, tiny.example("three", "a hat"), one]


def gone(pid: int, seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_everything_arrives(remote, images, examples):
    sys.path.insert(0, str(FAR))
    import far_rewards

    sys.path.remove(str(FAR))
    here = far_rewards.everything((images * 255).round().numpy() / 255, examples)
    assert remote("everything")(images, examples).tolist() == pytest.approx(here, rel=1e-6)


def test_obeys_the_contract_and_costs_no_more_than_eight_bits(remote, images, examples):
    reward = remote("brightness")
    check_reward(reward, images, examples)
    noise = torch.rand(3, 3, 16, 16)
    assert torch.allclose(reward(noise, examples), noise.mean((1, 2, 3)), atol=1 / 255 / 4)


def test_whole_groups_are_not_split(remote, images, examples):
    """The far reward counts the images of each example that it gets in one request."""
    assert remote("rivals", batch_size=2)(images, examples).tolist() == [1, 1, 1]
    assert remote("rivals", batch_size=2, whole_groups=True)(images, examples).tolist() == [2, 1, 2]


def test_each_picture_and_example_travels_once(images, examples):
    body = to_wire(images, examples)
    assert len(body["examples"]) == 2
    assert body["rows"] == [0, 1, 0]
    assert len(body["pictures"]) == 3 + 2 + 1 + 1 + 1
    assert json.loads(json.dumps(body)) == body


def test_requests_hold_batches(remote, images, examples):
    reward = remote(("Batches", {"extra": 0.5}), batch_size=2)
    assert reward(images, examples).tolist() == [2.5, 2.5, 1.5]


def test_its_own_process_wants_its_token(remote):
    reward = remote("brightness")
    with pytest.raises(NoAnswer, match="HTTP 401"):
        request_json(f"{reward.server.url}/health", timeout=5)


def test_a_score_that_no_float_holds_is_nan():
    assert np.isnan(_scores({"scores": [None, 10**400, float("nan"), float("inf")]}, 4)).all()
    with pytest.raises(NoAnswer, match="expected 2 scores"):
        _scores({"scores": [1]}, 2)
    with pytest.raises(NoAnswer, match="not a number"):
        _scores({"scores": ["1"]}, 1)


def test_what_cannot_be_scored_is_nan(remote, images, examples):
    assert remote("some_nan")(images, examples).tolist() == pytest.approx([0.5, np.nan, np.nan], nan_ok=True)


@pytest.mark.parametrize("kind", ["fails_once", "crashes_once", "hangs_once"])
def test_recovers(kind, remote, images, examples, tmp_path):
    reward = remote((kind, {"mark": str(tmp_path / "mark")}), timeout=2.0 if kind == "hangs_once" else 20.0)
    before = reward.server.process.pid
    assert torch.allclose(reward(images, examples), images.mean((1, 2, 3)), atol=1e-3)
    assert reward.counters == {"retries": 1, "restarts": 0 if kind == "fails_once" else 1}
    assert (reward.server.process.pid == before) == (kind == "fails_once")
    assert kind == "fails_once" or gone(before)


def test_stays_dead(remote, images, examples):
    reward = remote("crashes", retries=1)
    with pytest.raises(RewardUnavailable, match=r"far_rewards:crashes.*after 2 attempts.*this is the end"):
        reward(images, examples)
    with pytest.raises(RewardUnavailable, match=r"HTTP 500: RuntimeError: out of memory, say"):
        remote("fails", retries=1)(images, examples)
    with pytest.raises(RewardUnavailable, match=r"returned shape \(\) for 3 images"):
        remote("wrong_shape", retries=0)(images, examples)


def test_fails_early(remote, tmp_path):
    with pytest.raises(UserError, match=r"CannotLoad could not be loaded: FileNotFoundError: no weights here"):
        remote("CannotLoad")
    with pytest.raises(UserError, match=r"its process ended.*segmentation fault, say"):
        remote("DiesLoading")
    with pytest.raises(UserError, match="no attribute 'absent'"):
        remote("absent")
    with pytest.raises(UserError, match="there is no Python at"):
        remote("brightness", python=tmp_path / "bin" / "python")
    with pytest.raises(UserError, match="either a reward to start, or the url"):
        RemoteReward()
    with pytest.raises(UserError, match="could not be started with"):
        remote("brightness", python="/bin/true")


def test_nothing_is_left_behind(remote, tmp_path, images, examples):
    reward = remote(("HasChild", {"pids": str(tmp_path / "pids")}))
    server, child = map(int, (tmp_path / "pids").read_text().split())
    assert not gone(child, 0.1)
    reward.close()
    assert gone(server)
    assert gone(child)


@pytest.mark.parametrize("end", ["close", "kill", "crash"])
def test_processes_in_other_sessions_are_ended_too(end, remote, tmp_path, images, examples):
    reward = remote(("HasChildrenElsewhere", {"pids": str(tmp_path / "pids")}), retries=0)
    server, own, orphan = map(int, (tmp_path / "pids").read_text().split())
    assert not gone(own, 0.1)
    assert not gone(orphan, 0.1)
    if end == "close":
        reward.close()
    elif end == "kill":
        os.kill(server, signal.SIGKILL)
    else:
        with pytest.raises(RewardUnavailable):
            reward(images, examples)
    assert all(map(gone, (server, own, orphan, reward.server.process.pid)))


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)"])
def test_ends_with_the_trainer_however_that_ends(end, tmp_path):
    trainer = f"""
import os
from customized_grpo.rewards.remote import RemoteReward
reward = RemoteReward({{"use": "far_rewards:HasChildrenElsewhere", "pids": {str(tmp_path / "pids")!r}}}, images="numpy")
{end}
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(FAR), *sys.path])}
    done = subprocess.run([sys.executable, "-c", trainer], env=environment, timeout=60, check=False)
    assert done.returncode == (-signal.SIGKILL if end else 0)
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


@pytest.fixture
def host(monkeypatch):
    """A server run by hand for all addresses, and its address."""
    monkeypatch.setenv("CGRPO_REWARD_TOKEN", "secret")
    command = [sys.executable, str(SERVER), "far_rewards:brightness", "--images", "numpy", "--host", "0.0.0.0"]
    environment = os.environ | {"PYTHONPATH": str(FAR)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        yield process, f"http://127.0.0.1:{json.loads(process.stdout.readline())['port']}"
        process.kill()


def test_a_reward_on_another_host(host, images, examples):
    process, url = host
    reward = RemoteReward(url=url, retries=1, backoff=0.01)
    assert torch.allclose(reward(images, examples), images.mean((1, 2, 3)), atol=1e-3)
    with pytest.raises(UserError, match=r"was not ready after 0 s \(HTTP 401: the token is missing or wrong"):
        RemoteReward(url=url, token_variable="OTHER_TOKEN")
    process.kill()
    process.wait()
    with pytest.raises(RewardUnavailable, match="after 2 attempts"):
        reward(images, examples)


def test_the_server_needs_nothing_but_numpy_and_pillow():
    """Imports of the whole file; torch only inside the function that hands out tensors, where it is installed."""
    tree = ast.parse(SERVER.read_text(), feature_version=(3, 8))
    names = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert names - sys.stdlib_module_names == {"numpy", "PIL", "torch"}


def test_hpsv3_in_an_environment_of_its_own(images, examples, tmp_path):
    """Where this package is not installed; a stand-in for hpsv3 is."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    packages = next(environment.glob("lib/python*/site-packages"))
    (packages / "borrowed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n{FAR}\n")
    reward = RemoteReward(
        {"use": "Hpsv3Reward", "device": "cpu", "batch_size": 2}, python=environment / "bin" / "python", retries=0
    )
    try:
        first = (images[:, 0, 0, 0] * 255).round()
        expected = first + torch.tensor([len(example.prompt) for example in examples])
        assert torch.allclose(reward(images, examples), expected, atol=1)  # bfloat16
    finally:
        reward.close()


def test_a_file_in_the_folder_one_starts_from_hides_no_package(tmp_path, monkeypatch, images, examples):
    (tmp_path / "torch.py").write_text(f"open({str(tmp_path / 'MARK')!r}, 'w')")
    (tmp_path / "beside.py").write_text("def flat(images, examples):\n    return [0.5] * len(images)\n")
    monkeypatch.chdir(tmp_path)
    reward = RemoteReward("beside:flat", images="torch", start_timeout=60.0)
    assert reward(images, examples).tolist() == [0.5] * 3
    reward.close()
    assert not (tmp_path / "MARK").exists()
