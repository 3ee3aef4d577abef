"""The limits of the reward server, against a real one in this process."""

import base64
import contextlib
import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
import zlib

import pytest
from PIL import Image

from customized_grpo.rewards import server
from customized_grpo.rewards.client import NoAnswer, request_json
from customized_grpo.rewards.server import BadRequest, Scorer, Server, read_json, read_request

JSON = "Content-Type: application/json\r\n"


@pytest.fixture
def start():
    """Starts a server that scores brightness; its port."""
    started = []

    def begin(token=""):
        scorer = Scorer("far:brightness", {}, "numpy")
        scorer.reward, scorer.torch, scorer.status = lambda images, examples: images.mean((1, 2, 3)), False, "ready"
        started.append(Server(("127.0.0.1", 0), scorer, token))
        threading.Thread(target=started[-1].serve_forever, args=(0.01,), daemon=True).start()
        return started[-1].server_address[1]

    yield begin
    for some in started:
        some.shutdown()
        some.server_close()


def png(side, height=None):
    """A black PNG in base64, of few bytes."""
    width, height = side, height or side
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes((width // 8 + 1) * height), 9)), (b"IEND", b"")]
    chunks = [
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big") for kind, data in parts
    ]
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


def request(*pictures, images=(0,), **fields):
    examples = [{"id": "a", "prompt": "a hat", "references": [], **fields}]
    return {"pictures": list(pictures), "images": list(images), "rows": [0] * len(images), "examples": examples}


def send(port, data):
    """The status and the body of the answer to raw bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(data.encode("latin-1"))
        with connection.makefile("rb") as answer:
            head, _, body = answer.read().partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


def post(body="{}", headers=JSON, length=None):
    return f"POST /score HTTP/1.1\r\n{headers}Content-Length: {len(body) if length is None else length}\r\n\r\n{body}"


def still_scores(port):
    assert request_json(f"http://127.0.0.1:{port}/score", request(png(8)), timeout=10) == {"scores": [0.0]}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda: request(png(13000)), r"a picture has 169000000 pixels, but at most"),
        (lambda: request(png(8), png(13000), references=[1]), "a picture has 169000000 pixels"),
        (lambda: request(*[png(8000)] * 5), "the pictures have 320000000 pixels"),
        (lambda: request(png(1000), images=[0] * 70), "the images have 70000000 pixels"),
        (lambda: request(png(8), images=[-1]), "there is no number -1 among 1"),
        (lambda: request(png(8), images=[True]), "there is no number True"),
        (lambda: request(png(8), references=[1]), "there is no number 1"),
        (lambda: request(png(8), png(9), images=[0, 1]), "of one size"),
        (lambda: request(), "there is no number 0"),
        (lambda: request(images=[]), "0 images for 0 rows"),
        (lambda: request(base64.b64encode(b"GIF89a").decode()), "cannot identify"),
        (lambda: request(png(8)[:60] + "AAAA"), "Error"),
        (lambda: request("?"), "Error"),
        (lambda: request(7), "TypeError"),
        (lambda: None, "TypeError"),
        (lambda: [], "TypeError"),
    ],
)
@pytest.mark.filterwarnings("ignore:Image size")  # Pillow warns too
def test_requests_that_are_wrong_or_too_large(body, reason):
    start = time.monotonic()
    with pytest.raises(BadRequest, match=reason):
        read_request(body())
    assert time.monotonic() - start < 2


def test_pixels_are_those_of_the_picture():
    picture = Image.effect_noise((5, 4), 90).convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    images, _ = read_request(request(base64.b64encode(buffer.getvalue()).decode(), images=[0, 0]))
    assert images.shape == (2, 3, 4, 5)
    assert images[1, 2, 3, 4] == pytest.approx(picture.getpixel((4, 3))[2] / 255)


@pytest.mark.parametrize("body", ["[" * 10**6, '{"a":' * 10**5, "9" * 5000, "[" + "1," * 10**6, "", "\xff"])
def test_what_is_no_json_or_too_much(body):
    with pytest.raises(BadRequest, match="the body"):
        read_json(body.encode("latin-1"))


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (post(length=-1), 411), (post(length=""), 411), (post(length="\xb2"), 411), (post(length="1e3"), 411),
        (post(length="9" * 5000), 413), (post(length=2**30), 413),
        (f"POST /score HTTP/1.1\r\n{JSON}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (post(headers="Content-Type: text/plain\r\n"), 415), (post(headers=""), 415),
        (post(headers=JSON + "Origin: http://a.b\r\n"), 403), ("GET /health HTTP/1.1\r\nOrigin: null\r\n\r\n", 403),
        (post("["), 400), (post("null"), 400), (post('{"a":' * 10**5), 400),
        ("GET / HTTP/1.1\r\n\r\n", 404), ("POST / HTTP/1.1\r\n\r\n", 404),
        ("GET / HTTP/1.1\r\n" + "A: b\r\n" * 200, 431),
    ],
)  # fmt: skip
def test_requests_that_are_refused(sent, status, start):
    port = start()
    assert send(port, sent)[0] == status
    still_scores(port)


def test_a_token_is_asked_for(start):
    port = start("secret")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        for path, body in (("health", None), ("score", request(png(8)))):
            with pytest.raises(NoAnswer, match=r"HTTP 401: the token is missing or wrong; set .* CGRPO_REWARD_TOKEN"):
                request_json(f"http://127.0.0.1:{port}/{path}", body, timeout=10, headers=headers)
    assert send(port, "GET /health HTTP/1.1\r\nAuthorization: Bearer s\xe9cret\r\n\r\n")[0] == 401
    right = {"Authorization": "Bearer secret"}
    assert request_json(f"http://127.0.0.1:{port}/score", request(png(8)), timeout=10, headers=right)


def test_a_large_body_that_is_refused_does_not_hide_the_answer(start):
    with pytest.raises(NoAnswer, match="HTTP 401"):
        request_json(f"http://127.0.0.1:{start('secret')}/score", "x" * 10**7, timeout=10)


@pytest.mark.parametrize("begun", ["", "POST /score", post(length=1000), post()[:-1]])
def test_stalled_connections_are_bounded_and_keep_nobody_out(begun, start):
    port, before = start(), threading.active_count()
    stalled = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
    for connection in stalled:
        connection.sendall(begun.encode())
    still_scores(port)
    deadline = time.monotonic() + 5
    while threading.active_count() > before + server.MAX_CONNECTIONS and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before + server.MAX_CONNECTIONS
    for connection in stalled:
        connection.close()


@pytest.mark.parametrize("begun", ["", post(length=1000)])
def test_a_byte_now_and_then_does_not_hold_a_connection(begun, start, monkeypatch):
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(server, "BODY_SECONDS", 0.3)
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", start())) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(begun.encode())
        while time.monotonic() < begin + 3:
            time.sleep(0.05)
            connection.sendall(b"A")
    assert time.monotonic() - begin < 3


def test_bodies_held_at_once_are_bounded(start, monkeypatch):
    monkeypatch.setattr(server, "MAX_BYTES", 1000)
    port = start()
    with socket.create_connection(("127.0.0.1", port)) as first:
        first.sendall(post("[" * 900, length=1000).encode())
        time.sleep(0.1)
        assert send(port, post("[" * 200))[0] == 503
    time.sleep(0.1)
    still_scores(port)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--port", "{used}"], r"error: cannot listen at 127\.0\.0\.1:\d+ \(.*in use\); choose another --port\.\n"),
        (["--port", "70000"], r"error: cannot listen at .*; choose another --port\.\n"),
        (["--host", "0.0.0.0"], r"error: other machines reach 0\.0\.0\.0: set a token in CGRPO_REWARD_TOKEN, .*\n"),
        (["--host", "0.0.0.0", "--token-variable", "MINE"], r"error: .* set a token in MINE, .*\n"),
        (["--arguments", "[1"], r"error: --arguments must be a JSON object, not '\[1'\.\n"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_sentence(options, reason, start):
    words = [word.format(used=start()) if word == "{used}" else word for word in options]
    environment = {name: value for name, value in os.environ.items() if name != "CGRPO_REWARD_TOKEN"}
    command = [sys.executable, server.__file__, "far:brightness", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert re.fullmatch(reason, done.stderr)
    assert not done.stdout
