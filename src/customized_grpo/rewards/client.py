"""JSON over HTTP: requests that are bounded in time and size, and fail with one exception."""

import functools
import ipaddress
import json
import ssl
import time
from collections.abc import Iterator, Mapping
from typing import Any

from customized_grpo.errors import printable

MAX_BYTES = 2**24
"""Most bytes that are read of an answer."""


class NoAnswer(Exception):
    """A request without a usable answer.

    `status` is the HTTP status, or None if there is none (refused, reset, timed out, not JSON). `retry_after` is the
    number of seconds that the server asked to wait, or None.
    """

    def __init__(self, reason: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(printable(" ".join(reason.split()))[:400])
        self.status, self.retry_after = status, retry_after

    @property
    def final(self) -> bool:
        """Whether the server refused the request itself, so that repeating it would not help."""
        return self.status is not None and 300 <= self.status < 500 and self.status not in (408, 429)


def request_json(url: str, body: Any = None, *, timeout: float, headers: Mapping[str, str] | None = None) -> Any:
    """Send a GET request, or POST `body` as JSON, and parse the answer as JSON.

    Redirects are not followed. Addresses of this machine are reached directly, others as the proxy variables say.

    Args:
        url: an http or https address.
        body: anything that JSON can hold; None sends a GET request.
        timeout: seconds that the request may take from its start to the last byte of the answer.
        headers: added to the request.

    Raises:
        NoAnswer: for a status other than 2xx, a connection that is refused or closed, no complete answer in time, or
            an answer that is too large or not JSON.
    """
    import anyio
    import httpx2
    from anyio.from_thread import start_blocking_portal

    method, data = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
    headers = {"Accept-Encoding": "identity", "Content-Type": "application/json", **(headers or {})}
    for name, value in headers.items():
        if not (value.isascii() and value.isprintable()):
            raise NoAnswer(f"the value of the header {name} has characters that HTTP does not allow")

    async def exchange() -> tuple[httpx2.Response, bytes]:
        secure = _tls() if url.lower().startswith("https:") else False  # making a context takes 0.1 s
        client = httpx2.AsyncClient(timeout=None, trust_env=not is_loopback(url), verify=secure)
        with anyio.fail_after(timeout):
            async with client, client.stream(method, url, content=data, headers=headers) as answer:
                content = bytearray()
                async for chunk in answer.aiter_raw():
                    content += chunk
                    if len(content) > MAX_BYTES:
                        raise NoAnswer(f"the answer is larger than {MAX_BYTES} bytes", status=answer.status_code)
                return answer, bytes(content)

    try:
        with start_blocking_portal() as portal:  # works beside a running event loop, and an interrupt cancels it
            answer, content = portal.call(exchange)
    except TimeoutError:
        raise NoAnswer(f"no complete answer within {timeout:g} s") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        cause: BaseException = error  # below it: refused, no such host, a bad certificate
        while isinstance(error, httpx2.ConnectError) and (deeper := cause.__cause__ or cause.__context__):
            cause = deeper
        raise NoAnswer(f"{type(cause).__name__}: {cause}") from None
    try:
        parsed = json.loads(content)
        said = error_text(parsed)
    except (ValueError, RecursionError):
        parsed, said = None, content[:1000].decode(errors="replace").strip()
        if answer.is_success:
            raise NoAnswer("the answer is not JSON") from None
    if answer.is_success:
        return parsed
    moved = f"moved to {answer.headers['Location']}" if "Location" in answer.headers else ""
    wait = _seconds(answer.headers.get("Retry-After"))
    reason = f"HTTP {answer.status_code}: {moved or said or answer.reason_phrase or 'no message'}"
    raise NoAnswer(reason, status=answer.status_code, retry_after=wait)


def attempts(retries: int, backoff: float) -> Iterator[int]:
    """0, 1, ... `retries`, sleeping before each but the first: `backoff` seconds, then twice as long, and so on."""
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(backoff * 2 ** (attempt - 1))
        yield attempt


def error_text(answer: Any) -> str:
    """The message of an error in the forms that servers send: `error`, `error.message`, `message` or `detail`."""
    if not isinstance(answer, dict):
        return ""
    said = answer.get("error") or answer.get("message") or answer.get("detail") or ""
    return str(said.get("message") or said) if isinstance(said, dict) else str(said)


def is_loopback(url: str) -> bool:
    """Whether a URL is an http or https address of this machine."""
    import httpx2

    try:
        parts = httpx2.URL(url)  # as the request reads it
        local = parts.host == "localhost" or ipaddress.ip_address(parts.host).is_loopback
    except (httpx2.InvalidURL, ValueError):  # another name than localhost, or not a URL
        return False
    return local and parts.scheme in ("http", "https")


@functools.cache
def _tls() -> ssl.SSLContext:
    import httpx2

    return httpx2.create_ssl_context()


def _seconds(retry_after: str | None) -> float | None:
    try:
        return max(0.0, float(retry_after)) if retry_after else None
    except ValueError:  # a date: the caller's own backoff is used
        return None
