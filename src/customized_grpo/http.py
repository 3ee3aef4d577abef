"""JSON over HTTP with the standard library: one request, one answer, one kind of failure."""

import http.client
import ipaddress
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit


class NoAnswer(Exception):
    """A request that brought no usable answer.

    `status` is the HTTP status, None if there was none (refused, reset, timed out, not JSON); `retry_after` the seconds
    the server asked to wait.
    """

    def __init__(self, reason: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.status, self.retry_after = status, retry_after


def request_json(url: str, body: Any = None, *, timeout: float, headers: Mapping[str, str] | None = None) -> Any:
    """GET, or POST `body` as JSON, and read the answer as JSON.

    Args:
        url: http or https. Addresses of this machine are asked directly, others as the proxy variables say.
        body: anything JSON can hold; None is a GET.
        timeout: seconds that the server may be silent.
        headers: added to the request.

    Raises:
        NoAnswer: for a status of 400 or above, a refused, reset or silent connection, or an answer that is not JSON.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if is_loopback(url) else []))
    try:
        with opener.open(request, timeout=timeout) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            reason = f"HTTP {error.code}: {_message(error)}"
        raise NoAnswer(reason, status=error.code, retry_after=_seconds(error.headers.get("Retry-After"))) from None
    except TimeoutError:
        raise NoAnswer(f"no answer within {timeout:g} s") from None
    except urllib.error.URLError as error:
        silent = isinstance(error.reason, TimeoutError)
        raise NoAnswer(f"no answer within {timeout:g} s" if silent else str(error.reason)) from None
    except (http.client.HTTPException, OSError) as error:
        raise NoAnswer(f"{type(error).__name__}: {error}") from None
    except ValueError:
        raise NoAnswer("the answer is not JSON") from None


def is_loopback(url: str) -> bool:
    """Whether a URL is an http address of this machine, so that nothing leaves it."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name than localhost, or no URL
        return False
    return local and parts.scheme in ("http", "https")


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says went wrong: the `error` of a JSON body, else the beginning of the text."""
    try:
        text = error.read().decode(errors="replace")
    except (http.client.HTTPException, OSError):
        return str(error.reason)
    try:
        said = json.loads(text)["error"]
        text = str(said.get("message", said) if isinstance(said, dict) else said)
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:300] or str(error.reason)


def _seconds(retry_after: str | None) -> float | None:
    try:
        return max(0.0, float(retry_after)) if retry_after else None
    except ValueError:  # a date; the caller's own back-off will do
        return None
