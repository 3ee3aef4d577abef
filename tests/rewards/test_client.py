"""Requests to real servers on 127.0.0.1, which answer with the bytes that a test gives."""

import asyncio
import contextlib
import socket
import threading
import time

import pytest

from customized_grpo.rewards import client
from customized_grpo.rewards.client import NoAnswer, attempts, error_text, is_loopback, request_json

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.fixture
def serve():
    """Starts a server that sends `parts` to everyone, with a pause after each; the address."""
    stopped, sockets = threading.Event(), []

    def answer(listening, parts, pause):
        with contextlib.suppress(OSError):
            while not stopped.is_set():
                connection, _ = listening.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(65536)
                    for part in parts:
                        connection.sendall(part)
                        stopped.wait(pause)

    def start(*parts, pause=0.0):
        sockets.append(socket.create_server(("127.0.0.1", 0)))
        threading.Thread(target=answer, args=(sockets[-1], parts, pause), daemon=True).start()
        return f"http://127.0.0.1:{sockets[-1].getsockname()[1]}"

    yield start
    stopped.set()
    for listening in sockets:
        listening.close()


def test_an_answer(serve):
    assert request_json(serve(OK + b'\r\n{"a": [1, null]}'), timeout=5) == {"a": [1, None]}


def test_an_answer_beside_a_running_event_loop(serve):
    async def cell_of_a_notebook():
        return request_json(serve(OK + b"\r\n10"), timeout=5)

    assert asyncio.run(cell_of_a_notebook()) == 10


@pytest.mark.parametrize("parts", [[OK], [bytes([byte]) for byte in OK], [OK + b"\r\n", *[b"1"] * 80]])
def test_the_deadline_is_that_of_the_whole_request(serve, parts):
    """Silence, and a byte every 0.1 s in the headers or in the body."""
    start = time.monotonic()
    with pytest.raises(NoAnswer, match=r"no complete answer within 0\.4 s"):
        request_json(serve(*parts, pause=0.1 if len(parts) > 1 else 5), timeout=0.4)
    assert time.monotonic() - start < 2


def test_the_size_of_an_answer_is_bounded(serve, monkeypatch):
    monkeypatch.setattr(client, "MAX_BYTES", 100)
    assert request_json(serve(OK + b"\r\n" + b"1" * 100), timeout=5) == int("1" * 100)
    with pytest.raises(NoAnswer, match="larger than 100 bytes"):
        request_json(serve(OK + b"\r\n" + b"1" * 101), timeout=5)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "without sending a response|disconnected"),
        (b"SSH-2.0\r\n\r\n", "illegal status line"),
        (OK + b"Content-Length: 9\r\n\r\n1", "incomplete|received 1 bytes"),
        (OK + b"\r\n", "not JSON"),
        (OK + b"\r\n<html>", "not JSON"),
        (OK + b"\r\n" + b"[" * 10**5, "not JSON"),
        (OK + b"\r\n" + b"9" * 5000, "not JSON"),
        (OK + b"\r\n\xff", "not JSON"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://10.0.0.1/x\r\n\r\n", "HTTP 302: moved to http://10.0.0.1/x$"),
        (b"HTTP/1.1 500 \r\n\r\n", "HTTP 500: no message$"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n" + b"[" * 10**5, r"HTTP 502: \[\[\["),
        (b'HTTP/1.1 422 X\r\n\r\n{"detail": "bad\\n \\ud800"}', r"HTTP 422: bad \\ud800$"),
        (
            b'HTTP/1.1 500 X\r\n\r\n{"error": "\\u001b[2J\\u009b1m\\u202egone"}',
            r"HTTP 500: \\x1b\[2J\\x9b1m\\u202egone$",
        ),
    ],
)
def test_every_failure_is_one_printable_sentence(serve, answer, reason):
    with pytest.raises(NoAnswer, match=reason) as raised:
        request_json(serve(answer), timeout=5)
    assert len(str(raised.value)) <= 400
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9", "127.0.0.1:9", "http://[::", "ftp://127.0.0.1", "http://x.invalid", ""]
)
def test_an_address_that_cannot_be_reached(url):
    with pytest.raises(NoAnswer) as raised:
        request_json(url, timeout=5)
    assert url != "http://127.0.0.1:9" or "Refused" in str(raised.value)


@pytest.mark.parametrize("key", ["secret\n", "sécret"])
def test_a_key_that_cannot_be_sent_is_not_shown(key):
    with pytest.raises(NoAnswer, match="header Authorization") as raised:
        request_json("http://127.0.0.1:9", timeout=5, headers={"Authorization": key})
    assert "cret" not in str(raised.value)


@pytest.mark.parametrize(
    ("status", "retry_after", "final"),
    [
        (301, "", True),
        (400, "", True),
        (408, "", False),
        (429, "7", False),
        (429, "tomorrow", False),
        (503, "-1", False),
    ],
)
def test_what_a_status_says_about_trying_again(serve, status, retry_after, final):
    with pytest.raises(NoAnswer) as raised:
        request_json(serve(f"HTTP/1.1 {status} X\r\nRetry-After: {retry_after}\r\n\r\n".encode()), timeout=5)
    assert raised.value.status == status
    assert raised.value.retry_after == {"7": 7, "-1": 0}.get(retry_after)
    assert raised.value.final == final


def test_attempts_wait_twice_as_long_each_time(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    assert list(attempts(3, 0.5)) == [0, 1, 2, 3]
    assert slept == [0.5, 1, 2]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({"error": "full"}, "full"),
        ({"error": {"message": "no credits", "code": 402}}, "no credits"),
        ({"object": "error", "message": "no such model"}, "no such model"),
        ({"detail": [{"msg": "field required"}]}, "[{'msg': 'field required'}]"),
        ({"error": None, "status": "ready"}, ""),
        ([], ""),
        (None, ""),
    ],
)
def test_error_text(answer, text):
    assert error_text(answer) == text


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://localhost/v1", True),
        ("https://[::1]:9000", True),
        ("http://127.0.0.1@evil.example/v1", False),
        ("http://evil.example#@127.0.0.1", False),
        ("http://127.0.0.1\\@evil.example", False),
        ("http://localhost.evil.example", False),
        ("http://10.0.0.1", False),
        ("file://localhost/etc/passwd", False),
        ("localhost:8000", False),
        ("http://[::1", False),
        ("http://127.0.0.1\t@evil.example", False),
        ("https://127.8.9.1", True),
        ("", False),
    ],
)
def test_loopback_is_this_machine_only(url, here):
    assert is_loopback(url) == here
