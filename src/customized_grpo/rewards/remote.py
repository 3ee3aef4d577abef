"""A reward in its own process, in another Python environment, or on another host."""

import base64
import contextlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor

from customized_grpo.data.images import png, to_pil
from customized_grpo.errors import UserError
from customized_grpo.rewards.client import NoAnswer, attempts, request_json
from customized_grpo.rewards.contract import RewardUnavailable, groups
from customized_grpo.settings import AtLeastOne
from customized_grpo.structures import Example

SERVER, SUPERVISOR = (Path(__file__).with_name(name) for name in ("server.py", "supervisor.py"))
TOKEN = "CGRPO_REWARD_TOKEN"


class RemoteReward:
    """Sends images and examples (all but `weights`) to a reward behind HTTP; in that reward's units.

    Images are sent as PNG and thereby rounded to 8 bits per channel, like saved images. A failed request is repeated
    after `backoff` seconds, then after twice that, and so on. A process that this object started is restarted if it
    crashes or hangs. It ends with this object and with the trainer, however that ends.

    Args:
        reward: what to start: `package.module:name`, a name of `customized_grpo.rewards`, or {use: ..., argument: ...}.
        python: the interpreter of the environment to start it in; None is this one. It needs numpy and Pillow.
        url: instead of starting it: where it runs already, such as http://gpu-2:9000.
        token_variable: the environment variable that holds the token of the server at `url`, if it asks for one.
        images: what the reward takes there, "torch" or "numpy"; "auto" is torch where it is installed.
        environment: variables of the process, on top of ours. Each process of a distributed run shows its own GPU.
        log: file to which the process' messages are appended; None keeps them for error messages only.
        batch_size: images in one request.
        whole_groups: send all images of an example in one request, whatever `batch_size` says, for a reward that
            compares them.
        timeout: seconds one request may take.
        start_timeout: seconds to load the reward.
        retries: of a request, before the reward is called dead.
        backoff: seconds before the first retry.

    Raises:
        UserError: if it cannot be started, with its last message.
        RewardUnavailable: (when called) if it stays dead.
    """

    RUNTIME = (
        "python", "url", "token_variable", "environment", "log", "batch_size", "timeout", "start_timeout", "retries",
        "backoff",
    )  # fmt: skip

    def __init__(
        self,
        reward: str | Mapping[str, Any] | None = None,
        *,
        python: str | Path | None = None,
        url: str | None = None,
        token_variable: str = TOKEN,
        images: Literal["auto", "torch", "numpy"] = "auto",
        environment: Mapping[str, str] | None = None,
        log: str | Path | None = None,
        batch_size: AtLeastOne = 16,
        whole_groups: bool = False,
        timeout: float = 300.0,
        start_timeout: float = 900.0,
        retries: int = 3,
        backoff: float = 1.0,
    ) -> None:
        self.check_arguments(reward, url=url, python=python)
        self.batch_size, self.timeout, self.retries, self.backoff = batch_size, timeout, retries, backoff
        self.whole_groups = whole_groups
        self._one_caller = threading.Lock()  # it may be called from the thread that overlaps rewards with rollouts
        self.counters = {"retries": 0, "restarts": 0}
        """How often requests were repeated, and the process restarted."""
        if url is not None:
            self.server: _Process | _Host = _Host(url.rstrip("/"), start_timeout, os.environ.get(token_variable, ""))
        else:
            spec = _spec(reward)
            self.server = _Process(spec, python, images, dict(environment or {}), log, start_timeout)
        self.server.start()

    @staticmethod
    def check_arguments(
        reward: str | Mapping[str, Any] | None, *, url: str | None, python: str | Path | None, **others: Any
    ) -> None:
        """Raise UserError unless there is one thing to start or to ask, and an interpreter to start it in."""
        if (reward is None) == (url is None):
            raise UserError("RemoteReward takes either a reward to start, or the url of one that runs; give one.")
        if reward is not None and not _spec(reward).get("use"):
            raise UserError("RemoteReward: reward needs `use: package.module:name`.")
        if not _interpreter(python).is_file():
            raise UserError(
                f"RemoteReward: there is no Python at '{_interpreter(python)}'; give the environment's bin/python."
            )

    @property
    def name(self) -> str:
        return self.server.label

    @property
    def where(self) -> str:
        """The process or the address that scores."""
        return self.server.where

    @property
    def memory(self) -> float | None:
        """MiB of main memory that our process uses; None if it is not ours or this is unknown."""
        return self.server.memory()

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """Shape (B,), on CPU."""
        scores = torch.empty(len(examples))
        with self._one_caller:
            for rows in self._requests(examples):
                scores[rows] = torch.tensor(self._score(images[rows], [examples[row] for row in rows]))
        return scores

    def _requests(self, examples: Sequence[Example]) -> list[list[int]]:
        """The rows of each request."""
        requests: list[list[int]] = []
        for rows in groups(examples) if self.whole_groups else [[row] for row in range(len(examples))]:
            if not requests or len(requests[-1]) + len(rows) > self.batch_size:
                requests.append([])
            requests[-1] += rows
        return requests

    def close(self) -> None:
        """End the process we started, and all it started."""
        self.server.stop()

    def _score(self, images: Tensor, examples: Sequence[Example]) -> list[float]:
        body = to_wire(images, examples)
        reason = ""
        attempt = 0
        for attempt in attempts(self.retries, self.backoff):
            self.counters["retries"] += attempt > 0
            try:
                self.counters["restarts"] += self.server.revive()
                url, headers = f"{self.server.url}/score", self.server.headers
                return _scores(request_json(url, body, timeout=self.timeout, headers=headers), len(examples))
            except NoAnswer as error:
                reason = str(error)
                if error.final:
                    break
                if error.status is None:  # our process crashed or hangs: the next attempt starts another one
                    self.server.stop()
        raise RewardUnavailable(
            f"The reward {self.server.label} at {self.server.url} gave no scores after {attempt + 1} attempts "
            f"({reason}); fix it and resume the run.{self.server.last_words()}"
        )


def _spec(reward: str | Mapping[str, Any] | None) -> dict[str, Any]:
    return {"use": reward} if isinstance(reward, str) else dict(reward or {})


def _interpreter(python: str | Path | None) -> Path:
    return Path(python or sys.executable).expanduser().absolute()  # not resolved: a venv's python is a link


def to_wire(images: Tensor, examples: Sequence[Example]) -> dict[str, Any]:
    """The body of a request: each picture and each example once, as docs/rewards.md describes."""
    pictures: list[Image] = []
    places: dict[int, int] = {}

    def place(picture: Image | None) -> int | None:
        if picture is None:
            return None
        if id(picture) not in places:
            places[id(picture)] = len(pictures)
            pictures.append(picture)
        return places[id(picture)]

    distinct = {id(example): example for example in examples}
    order = {key: n for n, key in enumerate(distinct)}
    body: dict[str, Any] = {
        "images": [place(to_pil(image)) for image in images.cpu()],
        "rows": [order[id(example)] for example in examples],
        "examples": [
            {
                "id": example.id,
                "prompt": example.prompt,
                "subject": example.subject,
                "references": [place(picture) for picture in example.references],
                "masks": [place(mask) for mask in example.masks],
                "kind": example.kind,
                "target": place(example.target),
            }
            for example in distinct.values()
        ],
    }
    with ThreadPoolExecutor() as pool:
        body["pictures"] = [base64.b64encode(data).decode() for data in pool.map(png, pictures)]
    return body


def _scores(answer: Any, count: int) -> list[float]:
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list) or len(scores) != count:
        raise NoAnswer(f"expected {count} scores, got {str(answer)[:100]}")
    if not all(score is None or isinstance(score, (int, float)) for score in scores):
        raise NoAnswer(f"a score is not a number: {str(scores)[:100]}")
    return [math.nan if score is None or abs(score) > 1e308 else float(score) for score in scores]


def _wait_until_ready(
    url: str, label: str, timeout: float, *, headers: Mapping[str, str], patience: float,
    alive: Callable[[], bool] = lambda: True,
) -> None:  # fmt: skip
    """Poll the server until the reward is loaded.

    Args:
        url: of the server.
        label: of the reward, for errors.
        timeout: seconds that loading may take.
        headers: of the requests.
        patience: seconds that the server may be unreachable.
        alive: whether there is still something to wait for.

    Raises:
        UserError: if it failed to load, cannot be reached, its process ended, or time is up.
    """
    start, pause, reason = time.monotonic(), 0.02, "no answer"
    while (waited := time.monotonic() - start) < timeout and alive():
        try:
            health = request_json(f"{url}/health", timeout=min(10.0, timeout), headers=headers)
            reason = str(health["status"])
        except NoAnswer as error:
            reason = str(error)
            if error.final or waited > patience:
                break
        except (KeyError, TypeError):
            raise UserError(f"What answers at {url} is not a reward server; check the address.") from None
        if reason == "ready":
            return
        if reason == "failed":
            raise UserError(f"The reward {label} could not be loaded: {health.get('error')}.")
        time.sleep(pause)
        pause = min(1.0, 1.5 * pause)
    ended = "" if alive() else "; its process ended"
    raise UserError(f"The reward {label} at {url} was not ready after {waited:.0f} s ({reason}{ended}).")


class _Host:
    """A server that is already running and is not ours to watch or to end."""

    def __init__(self, url: str, start_timeout: float, token: str) -> None:
        self.url, self.label, self.where, self.start_timeout = url, url, url, start_timeout
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def start(self) -> None:
        _wait_until_ready(self.url, "server", self.start_timeout, headers=self.headers, patience=10.0)

    def revive(self) -> int:
        return 0

    def stop(self) -> None:
        """Not ours to end."""

    def last_words(self) -> str:
        return ""

    def memory(self) -> float | None:
        return None


class _Process:
    """A server that we start, watch and end."""

    def __init__(
        self,
        spec: dict[str, Any],
        python: str | Path | None,
        images: str,
        environment: dict[str, str],
        log: str | Path | None,
        start_timeout: float,
    ) -> None:
        self.label, self.python = str(spec.pop("use")), _interpreter(python)
        self.command = [
            sys.executable, "-I", str(SUPERVISOR), str(self.python), "-u", str(SERVER), self.label,
            "--arguments", json.dumps(spec, default=str), "--images", images,
        ]  # fmt: skip
        token = secrets.token_hex()  # other users of this machine may not have images scored
        self.environment, self.headers = environment | {TOKEN: token}, {"Authorization": f"Bearer {token}"}
        self.start_timeout, self.url, self.pid = start_timeout, "", 0
        if log is None:
            handle, name = tempfile.mkstemp(prefix="reward-", suffix=".log")
            os.close(handle)
            weakref.finalize(self, Path(name).unlink, missing_ok=True)
            log = name
        self.log = Path(log)
        self.process: subprocess.Popen[bytes] | None = None
        self.stop: Callable[[], Any] = lambda: None

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "VIRTUAL_ENV")}
        with self.log.open("ab") as log:
            self.process = process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
                env=environment | _own_gpu() | self.environment,
            )  # fmt: skip
        self.stop = weakref.finalize(self, _end, process, os.getpid())
        try:
            announced = _first_line(process, self.start_timeout)
            try:
                server = json.loads(announced)
                self.url, self.pid = f"http://127.0.0.1:{server['port']}", server["pid"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"The reward {self.label} could not be started with {self.python}.") from None
            _wait_until_ready(
                self.url,
                self.label,
                self.start_timeout,
                headers=self.headers,
                patience=self.start_timeout,
                alive=lambda: process.poll() is None,
            )
        except UserError as error:
            self.stop()
            raise UserError(f"{error}{self.last_words()}") from None
        except BaseException:
            self.stop()
            raise

    def revive(self) -> int:
        """Restart it if it ended. Returns the number of restarts, 0 or 1."""
        if self.process is not None and self.process.poll() is None:
            return 0
        try:
            self.start()
        except UserError as error:
            raise NoAnswer(str(error)) from error
        return 1

    @property
    def where(self) -> str:
        return f"process {self.pid}"

    def memory(self) -> float | None:
        status = Path(f"/proc/{self.pid}/status")
        if not status.exists():  # not on Linux
            return None
        resident = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmRSS")]
        return int(resident[0]) / 1024 if resident else None

    def last_words(self) -> str:
        """The last line of its log, to append to an error."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return f" Its last message: {lines[-1][:300]}" if lines else ""


def _first_line(process: "subprocess.Popen[bytes]", timeout: float) -> bytes:
    """The line that the server prints when it is ready; empty if it ended or time is up."""
    lines: list[bytes] = []
    output = process.stdout
    assert output is not None
    reader = threading.Thread(target=lambda: lines.append(output.readline()), daemon=True)
    reader.start()
    reader.join(timeout)
    return lines[0] if lines else b""


def _end(process: "subprocess.Popen[bytes]", owner: int) -> None:
    """Close the standard input of the supervisor, which then ends all its processes. Kill its group if it does not."""
    if os.getpid() != owner:  # a fork of the trainer: not its process to end
        return
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _own_gpu() -> dict[str, str]:
    """In a distributed run, make only the GPU of this rank visible to the process."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or not torch.cuda.is_available():
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": devices[int(rank) % len(devices)]}
