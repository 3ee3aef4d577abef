"""A reward behind HTTP, for a trainer in another process, Python environment or host.

    python server.py package.module:name --arguments '{"path": "..."}' --host 0.0.0.0 --port 9000

This file stands alone: beside the reward itself it needs only numpy and Pillow, and no part of this package installed.
Its wire format is in docs/rewards.md; nothing is unpickled. `RemoteReward` starts and supervises it.
"""

from __future__ import annotations  # an environment of old may have Python 3.8

import argparse
import base64
import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import json
import math
import os
import signal
import sys
import threading
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


@dataclass(frozen=True)
class Example:
    """What the trainer knows of a row; the fields of `customized_grpo.types.Example`."""

    id: str
    prompt: str
    references: tuple[Image.Image, ...]
    subject: str = ""
    masks: tuple[Image.Image | None, ...] = ()


class BadRequest(Exception):
    """The request is not what the wire format says."""


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
        images, examples = read_request(request)
        if self.torch:
            import torch

            images = torch.from_numpy(images)
        with self._lock:
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
        pictures = [_read_png(text) for text in request["pictures"]]
        images = [np.asarray(pictures[n].convert("RGB"), dtype=np.float32) / 255 for n in request["images"]]
        examples = [
            Example(
                id=str(fields["id"]),
                prompt=str(fields["prompt"]),
                references=tuple(pictures[n] for n in fields["references"]),
                subject=str(fields.get("subject", "")),
                masks=tuple(None if n is None else pictures[n] for n in fields.get("masks", ())),
            )
            for fields in request["examples"]
        ]
        rows = [examples[n] for n in request["rows"]]
    except (KeyError, IndexError, TypeError, ValueError, OSError, SyntaxError) as error:
        raise BadRequest(f"{type(error).__name__}: {error}") from error
    if not images or len(images) != len(rows) or len({image.shape for image in images}) != 1:
        raise BadRequest(f"{len(images)} images for {len(rows)} rows; expected one each, one or more, of one size")
    return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)), rows


def _read_png(text: str) -> Image.Image:
    picture = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
    picture.load()
    return picture


class Handler(BaseHTTPRequestHandler):
    scorer: Scorer

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(200, self.scorer.health())
        else:
            self._answer(404, {"error": "GET /health or POST /score"})

    def do_POST(self) -> None:
        try:
            request = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        except ValueError:
            return self._answer(400, {"error": "the body is not JSON"})
        if self.path != "/score":
            return self._answer(404, {"error": "GET /health or POST /score"})
        if self.scorer.status != "ready":
            return self._answer(503, {"error": self.scorer.error or "the reward is still loading"})
        try:
            self._answer(200, {"scores": self.scorer.score(request)})
        except BadRequest as error:
            self._answer(400, {"error": str(error)})
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            self._answer(500, {"error": f"{type(error).__name__}: {error}"})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        with contextlib.suppress(ConnectionError):  # the trainer may have given up on it
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # requests are the trainer's to log
        pass


def die_with_the_trainer() -> None:
    """Wait until the pipe from the trainer closes, however it ended, then end this process and all it started."""
    while sys.stdin.buffer.read(1024):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a reward over HTTP.")
    parser.add_argument("reward", help="package.module:name of a function or class")
    parser.add_argument("--arguments", default="{}", help="its arguments, as JSON")
    parser.add_argument("--images", choices=("auto", "torch", "numpy"), default="auto", help="what the reward takes")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--supervised", action="store_true", help="end when standard input closes")
    options = parser.parse_args()
    del sys.path[0]  # this folder, whose files would hide packages of the same name, such as clip
    sys.path.append(str(Path.cwd()))  # last, as for the trainer: nothing there takes the place of an installed package
    announce = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the reward prints must not mix with the announcement

    Handler.scorer = Scorer(options.reward, json.loads(options.arguments), options.images)
    server = ThreadingHTTPServer((options.host, options.port), Handler)
    server.daemon_threads = True
    if options.supervised:
        threading.Thread(target=die_with_the_trainer, daemon=True).start()
    announce.write(json.dumps({"host": options.host, "port": server.server_address[1], "protocol": PROTOCOL}) + "\n")
    announce.close()
    threading.Thread(target=Handler.scorer.load, daemon=True).start()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
