"""One URL of an HTTP API: a POST that is bounded in time and in size, and the health of the URL behind it.

requests bounds each read of a socket, so a server that sends a byte now and then is never given up. Here a timer cuts the
connection when the time of the whole exchange is over. What else is decided here and not by the environment:

* redirects are not followed: they would carry the prompt, and perhaps the key, to a host that nobody named;
* a proxy variable (HTTPS_PROXY, NO_PROXY, ...) counts for other machines, never for this one (localhost, 127.0.0.0/8, ::1);
* ~/.netrc is not read: the key that was named is sent, or none; cookies are not kept.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import http.cookiejar
import ipaddress
import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

import requests
from urllib3.exceptions import HTTPError

CONNECT_SECONDS = 10.0
MAX_BYTES = 8 << 20  # of an answer: a hundred times what the longest reasoning takes


class Unreachable(Exception):
    """No whole answer came. The message says why; it may be tried again."""


class Endpoint:
    """A base URL with its connections. `failures` in a row, `ready_at` and `in_flight` are its health, kept by the caller.

    A URL without a path gets /v1. Raises ValueError for one that cannot be used or may hold a password: URLs are logged.
    """

    def __init__(self, url: str, key: str = "", connections: int = 32) -> None:
        parts = _split(url)
        self.url, self._key = url.rstrip("/") + ("" if parts.path.strip("/") else "/v1"), key
        self.failures, self.ready_at, self.in_flight = 0, 0.0, 0
        self._session = requests.Session()
        self._session.trust_env = not _is_this_machine(parts.hostname)
        self._session.headers["Accept-Encoding"] = "identity"  # a small answer cannot unpack to a large one
        self._session.auth = functools.partial(_authorise, key)
        self._session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
        self._session.get_redirect_target = lambda answer: None  # requests would read a redirect's body to its end
        self._session.mount(f"{parts.scheme}://", _Adapter(pool_maxsize=connections))

    def post(self, path: str, body: Any, timeout: float) -> tuple[int, Mapping[str, str], bytes]:
        """(status, headers, content), at most `timeout` seconds after the connection stands.

        Raises Unreachable, and ValueError where the next try would meet the same (a certificate, an impossible proxy).
        """
        limit = min(CONNECT_SECONDS, timeout)
        _this_thread.watch = watch = _Watch(timeout)
        try:
            with self._session.post(self.url + path, json=body, stream=True, allow_redirects=False,
                                    timeout=(limit, timeout)) as answer:
                content = answer.raw.read(MAX_BYTES + 1, decode_content=False)
                missing = answer.raw.length_remaining  # None where the server did not say how long its answer is
        except (requests.RequestException, HTTPError) as error:
            cause = _root(error)
            if isinstance(error, ValueError) or isinstance(cause, ssl.SSLCertVerificationError):
                raise ValueError(self._name(cause)) from None
            if not watch.expired and not isinstance(cause, TimeoutError):
                by = "the proxy that the environment names: " if isinstance(error, requests.exceptions.ProxyError) else ""
                raise Unreachable(by + self._name(cause)) from None
            if watch.socket is None:
                raise Unreachable(f"no connection within {limit:g} s") from None
            watch.expired = True
        finally:
            watch.cancel()
        if watch.expired:  # a cut can look like a regular end
            raise Unreachable(f"no whole answer within {timeout:g} s")
        if len(content) > MAX_BYTES:
            raise Unreachable(f"the answer is larger than {MAX_BYTES >> 20} MiB")
        if missing:
            raise Unreachable(f"the connection ended {missing} bytes before the answer did")
        return answer.status_code, answer.headers, content

    def _name(self, error: BaseException) -> str:
        return self.quote(f"{type(error).__name__}: {error}".encode("utf-8", "replace"))

    def redact(self, text: str) -> str:
        """Without the key, which servers like to quote. A short one, such as EMPTY, is no secret but a word."""
        return text.replace(self._key, "***") if len(self._key) >= 8 else text

    def quote(self, said: bytes) -> str:
        """The start of what a server said, on one line, without the key."""
        text = said[:100_000].decode("utf-8", "replace")
        with contextlib.suppress(ValueError, RecursionError):
            text = json.dumps(json.loads(text), ensure_ascii=False)  # so that no escape hides the key
        return " ".join("".join(c if c.isprintable() else " " for c in self.redact(text)).split())[:300]


def read_key(name: str, flag: str = "--executor-key-env") -> str:
    """The API key in the environment variable `name`, which `flag` gave. Raises ValueError, which never quotes a key."""
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise ValueError(f"{flag} takes the name of an environment variable, not the key itself")
    key = os.environ.get(name, "").strip()
    if not key:
        raise ValueError(f"the environment variable {name} ({flag}) is empty or not set")
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"the environment variable {name} ({flag}) holds characters that no header can carry")
    return key


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait: a number, or a date by the server's own clock (RFC 9110 10.2.3); else 0."""
    asked = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", asked, re.ASCII):
        return float(asked)
    until, now = (email.utils.parsedate_tz(text) for text in (asked, headers.get("Date", "")))
    with contextlib.suppress(ValueError, OverflowError):  # a date such as 31 February
        return max(0.0, email.utils.mktime_tz(until) - (email.utils.mktime_tz(now) if now else time.time())) if until else 0.0
    return 0.0


def _split(url: str) -> SplitResult:
    """The parts of a base URL; ValueError if it is none or may hold a secret, which is then not quoted."""
    if set("@?#") & set(url):
        raise ValueError("a server's URL must hold no password and no parameters, because it is logged; name an environment "
                         "variable that holds the key")
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https"):
            raise ValueError("it must begin with http:// or https://")
        requests.Request("POST", url).prepare()  # what urllib3 says of host and port
    except ValueError as error:
        raise ValueError(f"{url!r} is no server's URL: {error}") from None
    return parts


def _is_this_machine(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.rstrip(".") == "localhost" or host.rstrip(".").endswith(".localhost")


def _authorise(key: str, request: requests.PreparedRequest) -> requests.PreparedRequest:
    if key:
        request.headers["Authorization"] = f"Bearer {key}"
    return request


def _root(error: BaseException) -> BaseException:
    """The innermost cause: 'Connection refused' instead of three layers of wrapping."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


# ---- the clock ------------------------------------------------------------------------------------------------------


class _Watch:
    """Shuts the socket of one exchange when its time is over, which wakes the thread that reads it."""

    def __init__(self, seconds: float) -> None:
        self.expired, self.socket = False, None
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True
        self._timer.start()
        self.cancel = self._timer.cancel

    def attach(self, connection: socket.socket | None) -> None:
        self.socket = connection
        if self.expired:
            self._cut()

    def _cut(self) -> None:
        self.expired = True
        if self.socket is not None:
            with contextlib.suppress(OSError):  # it was closed in the meantime
                socket.socket.shutdown(self.socket, socket.SHUT_RDWR)  # below TLS, whose own state the reader uses


_this_thread = threading.local()


class _Watched:
    """Mixed into urllib3's connections: tells the watch of the thread that sends which socket it is about."""

    def request(self, *args: Any, **kwargs: Any) -> None:
        super().request(*args, **kwargs)
        _this_thread.watch.attach(self.sock)


@functools.cache
def _watched(connection: type) -> type:
    return connection if issubclass(connection, _Watched) else type("Watched", (_Watched, connection), {})


class _Adapter(requests.adapters.HTTPAdapter):
    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool = super().get_connection_with_tls_context(*args, **kwargs)
        pool.ConnectionCls = _watched(pool.ConnectionCls)
        return pool
