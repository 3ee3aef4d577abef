"""A reward behind HTTP, for a trainer in another process, Python environment or host.

    python server.py package.module:name --arguments '{"path": "..."}' --host 0.0.0.0 --port 9000

Besides the reward, this file needs only numpy and Pillow; this package need not be installed. The wire format is in
docs/rewards.md; nothing is unpickled. Requests are bounded in bytes, values, pixels, connections and time.
`RemoteReward` starts it through supervisor.py.
"""

from __future__ import annotations  # Python 3.8 must be able to read this file

import argparse
import base64
import contextlib
import functools
import hmac
import importlib
import importlib.util
import inspect
import io
import ipaddress
import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PROTOCOL = 1
PACKAGE = Path(__file__).resolve().parents[1]
TOKEN = "CGRPO_REWARD_TOKEN"
"""The environment variable that holds the token, unless `--token-variable` names another."""

MAX_BYTES = 2**29
"""Most bytes of requests in memory at once."""
MAX_VALUES = 10**5
"""Most commas in a request, which bound the number of its values."""
MAX_PICTURE = 2**26
"""Most pixels of one picture, and of all images of a request together."""
MAX_PICTURES = 2**28
"""Most pixels of all pictures of a request together."""
MAX_CONNECTIONS = 64
HEAD_SECONDS, BODY_SECONDS = 30, 300
"""Seconds to receive the head and the body of a request."""


@dataclass(frozen=True)
class Example:
    """The example of a row, with fields of `customized_grpo.structures.Example`."""

    id: str
    prompt: str
    references: tuple[Image.Image, ...]
    subject: str = ""
    masks: tuple[Image.Image | None, ...] = ()
    kind: str = ""
    target: Image.Image | None = None


class BadRequest(Exception):
    """The request is not in the wire format, or too large."""


class Scorer:
    """Loads the reward in the background and scores one request at a time."""

    def __init__(self, use: str, arguments: dict[str, Any], images: str) -> None:
        self.use, self.arguments, self.images = use, arguments, images
        self.status, self.error = "loading", None
        self._lock = threading.Lock()

    def load(self) -> None:
        try:
            self.reward = make_reward(self.use, self.arguments)
            self.torch = self.images == "torch" or (self.images == "auto" and bool(importlib.util.find_spec("torch")))
            self.status = "ready"
        except BaseException as error:
            traceback.print_exc()
            self.status, self.error = "failed", f"{type(error).__name__}: {error}"

    def health(self) -> dict[str, Any]:
        return {"status": self.status, "error": self.error, "reward": self.use, "protocol": PROTOCOL}

    def score(self, request: Any) -> list[float | None]:
        with self._lock:
            images, examples = read_request(request)
            if self.torch:
                import torch

                images = torch.from_numpy(images)
            scores = self.reward(images, examples)
            scores = np.asarray(
                scores.detach().float().cpu() if hasattr(scores, "detach") else scores, dtype=np.float64
            )
        if scores.shape != (len(examples),):
            raise TypeError(f"{self.use} returned shape {scores.shape} for {len(examples)} images, not one number each")
        return [float(score) if math.isfinite(score) else None for score in scores]


def make_reward(use: str, arguments: dict[str, Any]) -> Callable[..., Any]:
    """The function, or an object of the class, that `package.module:name` names, with its arguments."""
    module, separator, name = use.partition(":")
    if not separator:
        module, name = "customized_grpo.rewards", use
    if module.partition(".")[0] == "customized_grpo":
        _provide_package()
    target: Any = getattr(importlib.import_module(module), name)
    if inspect.isclass(target):
        maker: Any = getattr(target, "from_pretrained", target)
        return maker(**arguments)
    return functools.partial(target, **arguments) if arguments else target


def _provide_package() -> None:
    """Let an environment without customized_grpo import it from beside this file, and nothing else from there."""
    if "customized_grpo" in sys.modules or importlib.util.find_spec("customized_grpo"):
        return
    spec = importlib.util.spec_from_file_location(
        "customized_grpo", PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)]
    )
    if spec is not None and spec.loader is not None:
        sys.modules["customized_grpo"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def read_request(request: Any) -> tuple[np.ndarray, Sequence[Example]]:
    """Images (B, 3, H, W), float32 in [0, 1], and B examples; rows of one example share the object.

    Raises:
        BadRequest: naming what is wrong.
    """
    try:
        pictures = [_open_png(text) for text in request["pictures"]]
        images = [_pick(pictures, n) for n in request["images"]]
        examples = [
            Example(
                id=str(fields["id"]),
                prompt=str(fields["prompt"]),
                references=tuple(_pick(pictures, n) for n in fields["references"]),
                subject=str(fields.get("subject", "")),
                masks=tuple(_pick_or_none(pictures, n) for n in fields.get("masks", ())),
                kind=str(fields.get("kind", "")),
                target=_pick_or_none(pictures, fields.get("target")),
            )
            for fields in request["examples"]
        ]
        rows = [_pick(examples, n) for n in request["rows"]]
        if not images or len(images) != len(rows) or len({image.size for image in images}) != 1:
            raise ValueError(f"{len(images)} images for {len(rows)} rows; expected one each, one or more, of one size")
        _check_pixels(pictures, images)
        width, height = images[0].size
        batch = np.empty((len(images), 3, height, width), dtype=np.float32)
        for picture in pictures:
            picture.load()
        for n, image in enumerate(images):
            np.divide(np.asarray(image.convert("RGB")).transpose(2, 0, 1), 255, out=batch[n], dtype=np.float32)
    except Exception as error:  # a damaged picture fails in many ways
        raise BadRequest(f"{type(error).__name__}: {error}") from error
    return batch, rows


def _open_png(text: str) -> Image.Image:
    """A picture whose size is known but whose pixels are not decoded yet."""
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])


def _pick(some: Sequence[Any], index: Any) -> Any:
    if type(index) is not int or not 0 <= index < len(some):
        raise IndexError(f"there is no number {index!r} among {len(some)}")
    return some[index]


def _pick_or_none(some: Sequence[Any], index: Any) -> Any:
    return None if index is None else _pick(some, index)


def _check_pixels(pictures: Sequence[Image.Image], images: Sequence[Image.Image]) -> None:
    for what, pixels, most in (
        ("a picture has", max(picture.width * picture.height for picture in pictures), MAX_PICTURE),
        ("the images have", sum(image.width * image.height for image in images), MAX_PICTURE),
        ("the pictures have", sum(picture.width * picture.height for picture in pictures), MAX_PICTURES),
    ):
        if pixels > most:
            raise ValueError(f"{what} {pixels} pixels, but at most {most} are read; lower batch_size or their size")


class Server(ThreadingHTTPServer):
    """Serves up to `MAX_CONNECTIONS` at once. Another one replaces the connection that has been sending for longest."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, address: tuple[str, int], scorer: Scorer, token: str) -> None:
        self.scorer, self.token = scorer, token
        self.lock = threading.Lock()
        self.stages: dict[socket.socket, int] = {}
        """Stage of each connection, in order of arrival: 0 while it sends the head of a request, 1 the body, then 2."""
        self.held = 0
        super().__init__(address, Handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        with self.lock:
            if len(self.stages) >= MAX_CONNECTIONS:
                sending = [connection for connection, stage in self.stages.items() if stage < 2]
                if not sending:
                    return False
                oldest = min(sending, key=lambda connection: self.stages[connection])
                del self.stages[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # which wakes its thread
            self.stages[request] = 0
        return True

    def enter(self, request: Any, stage: int) -> None:
        with self.lock:
            if request in self.stages:
                self.stages[request] = stage

    def hold(self, count: int) -> int:
        """Add to the number of bytes held, and return it."""
        with self.lock:
            self.held += count
            return self.held

    def shutdown_request(self, request: Any) -> None:
        with self.lock:
            self.stages.pop(request, None)
        super().shutdown_request(request)


class Incoming(io.RawIOBase):
    """Reads from a connection until a deadline, however slowly it sends."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self.connection, self.deadline = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.connection.settimeout(max(0.001, self.deadline - time.monotonic()))
        return self.connection.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def setup(self) -> None:
        super().setup()
        self.incoming = Incoming(self.connection, HEAD_SECONDS)
        self.rfile = io.BufferedReader(self.incoming)

    def do_GET(self) -> None:
        if self._refused("/health"):
            return
        self._answer(200, self.server.scorer.health())

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self._refused("/score"):
            return
        if self.headers.get_content_type() != "application/json":  # web pages may send others without asking
            return self._refuse(415, "the Content-Type must be application/json")
        if not (length.isascii() and length.isdigit()):
            return self._refuse(411, "the Content-Length is missing or not a number")
        if len(length) > 12 or int(length) > MAX_BYTES:
            return self._refuse(413, f"the request has more than {MAX_BYTES} bytes; lower batch_size")
        received: list[bytes] = []
        try:
            self._score(int(length), received)
        finally:
            self.server.hold(-sum(map(len, received)))

    def _score(self, length: int, received: list[bytes]) -> None:
        self.server.enter(self.connection, 1)
        self.incoming.deadline = time.monotonic() + BODY_SECONDS
        while length > 0:
            chunk = self.rfile.read1(min(length, 2**20))
            if not chunk:
                return
            length -= len(chunk)
            received.append(chunk)
            if self.server.hold(len(chunk)) > MAX_BYTES:
                return self._refuse(503, "other requests take all the room; try again later")
        self.server.enter(self.connection, 2)
        scorer = self.server.scorer
        if scorer.status != "ready":
            return self._answer(503, {"error": scorer.error or "the reward is still loading"})
        try:
            self._answer(200, {"scores": scorer.score(read_json(b"".join(received)))})
        except BadRequest as error:
            self._answer(400, {"error": str(error)})
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            self._answer(500, {"error": f"{type(error).__name__}: {error}"})

    def _refused(self, path: str) -> bool:
        """Refuse a request that is not permitted; returns whether it was refused."""
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")
        if self.headers.get("Origin") is not None:
            self._refuse(403, "requests of web pages are not answered")
        elif self.server.token and not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
            self._refuse(401, f"the token is missing or wrong; set the server's in {TOKEN} where the trainer runs")
        elif self.path != path:
            self._refuse(404, "GET /health or POST /score")
        else:
            return False
        return True

    def _refuse(self, status: int, error: str) -> None:
        """Answer before the body was read, then read it for two seconds, so that the client reads the answer."""
        self._answer(status, {"error": error})
        self.incoming.deadline = time.monotonic() + 2
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.rfile.read1(2**16) and time.monotonic() < self.incoming.deadline:
                pass

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.connection.settimeout(HEAD_SECONDS)
        with contextlib.suppress(OSError):  # the client may have closed the connection
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # requests are the trainer's to log
        pass


def read_json(body: bytes) -> Any:
    """A request's body.

    Raises:
        BadRequest: if it is not JSON, too deeply nested, or has too many values.
    """
    if body.count(b",") > MAX_VALUES:
        raise BadRequest(f"the body has more than {MAX_VALUES} values")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON, or nested too deeply") from None


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a reward over HTTP.")
    parser.add_argument("reward", help="package.module:name of a function or class")
    parser.add_argument("--arguments", default="{}", help="its arguments, as JSON")
    parser.add_argument("--images", choices=("auto", "torch", "numpy"), default="auto", help="what the reward takes")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--token-variable", default=TOKEN, help="environment variable with the token to ask for")
    options = parser.parse_args()
    del sys.path[0]  # this folder, whose files would hide packages of the same name, such as clip
    sys.path.append(str(Path.cwd()))  # last, as for the trainer: nothing there takes the place of an installed package
    token = os.environ.pop(options.token_variable, "")
    if not token and not is_loopback(options.host):
        parser.exit(2, f"error: other machines reach {options.host}: set a token in {options.token_variable}, here and "
                    "where the trainer runs.\n")  # fmt: skip
    try:
        arguments = dict(json.loads(options.arguments))
        server = Server((options.host, options.port), Scorer(options.reward, arguments, options.images), token)
    except (ValueError, TypeError):
        parser.exit(2, f"error: --arguments must be a JSON object, not {options.arguments!r}.\n")
    except (OSError, OverflowError) as error:
        parser.exit(2, f"error: cannot listen at {options.host}:{options.port} ({error}); choose another --port.\n")
    announce = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the reward prints must not mix with the announcement
    port = server.server_address[1]
    announce.write(json.dumps({"host": options.host, "port": port, "pid": os.getpid(), "protocol": PROTOCOL}) + "\n")
    announce.close()
    threading.Thread(target=server.scorer.load, daemon=True).start()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
