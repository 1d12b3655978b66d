"""HTTP transport to ClickHouse that accepts only ClickHouse's own answer to the request.

A proxy in between can answer with HTTP 200 and a login page, an error text, nothing, or the answer to another
request. ClickHouse identifies its answers: the driver gives each request an id (`query_id`), which the answer
repeats in `X-ClickHouse-Query-Id`. An answer is therefore accepted only if

- its status is 200, or it is an error with `X-ClickHouse-Exception-Code`, which the driver translates;
- it has the id of this request;
- its body is empty, as that of an INSERT, or has `X-ClickHouse-Format`;
- it is not a redirect: following one would send rows and password to another host.

Anything else is a `StoreError` with the address, the status and the beginning of the body. Whether rows are stored
is checked elsewhere: see `client.insert_arrow` and `verified_inserts`.
"""

from __future__ import annotations

import base64
import functools
import re
import uuid
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from clickhouse_connect.driver.httputil import check_env_proxy, get_pool_manager_options
from urllib3 import PoolManager, ProxyManager
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse

from kalshi_platform.errors import StoreError, StoreRefused, StoreUnavailable
from kalshi_platform.loopback import is_loopback
from kalshi_platform.printable import printable

__all__ = ["pool_to"]

EXCERPT = 120
"""Characters of a foreign answer that an error shows."""
_QUERY_ID = re.compile(r"[?&]query_id=([^&]*)")
_RETRYABLE = frozenset({408, 425, 429})
_NOT_OURS = "not as ClickHouse does"
_BETWEEN = "Check CLICKHOUSE_URL, and what is between here and ClickHouse."
_MIXED_UP = (
    "A proxy between here and ClickHouse caches answers, mixes them up, or replaces query ids. Remove it, or let it"
    " forward query_id."
)
_Fault = tuple[type[StoreError], str, str]
"""The kind of error, what is wrong, and what to do."""


def pool_to(url: str, **files: Any) -> PoolManager:
    """The connection pool of a server, shared by all its clients; the loopback interface never uses a proxy.

    `files` are the driver's certificate options.
    """
    at = urlsplit(url)
    host = at.hostname or ""
    default_port = 8443 if at.scheme == "https" else 8123
    proxy = None if is_loopback(host) else check_env_proxy(at.scheme, host, at.port or default_port)
    return _pool(proxy, **files)


@functools.cache
def _pool(proxy: str | None, **files: Any) -> PoolManager:
    options = get_pool_manager_options(**files)
    if proxy is None:
        return _OwnAnswers(**options)
    return _ProxiedOwnAnswers(proxy if "://" in proxy else f"http://{proxy}", **options)


class _OwnAnswers(PoolManager):
    """A connection pool that checks each answer as the module describes."""

    def urlopen(  # type: ignore[override]  # of urllib3's overloads
        self, method: str, url: str, redirect: bool = True, **kw: Any
    ) -> BaseHTTPResponse:
        """Send a request. Raises `StoreError` for an answer that is not ClickHouse's own."""
        asked = _QUERY_ID.search(url)
        if asked is not None and not asked[1]:  # the driver sends this query without an id
            url = f"{url[: asked.end()]}{uuid.uuid4()}{url[asked.end() :]}"
            asked = _QUERY_ID.search(url)
        answer = super().urlopen(method, url, redirect=False, **kw)
        if asked is None:  # a ping
            return answer
        is_read = bool(kw.get("preload_content", True))
        fault = _fault(answer, unquote(asked[1]), is_read=is_read)
        if fault is None:
            return answer
        kind, reason, remedy = fault
        begins = _beginning(answer, is_read=is_read, headers=kw.get("headers") or {})
        answer.close()
        self.clear()  # later answers on these connections may be mixed up, too
        at = urlsplit(url)
        raise kind(
            f"ClickHouse at {at.scheme}://{at.netloc.rpartition('@')[2]}{at.path} answered HTTP"
            f" {answer.status}, but {reason}. {begins} {remedy}"
        )


class _ProxiedOwnAnswers(_OwnAnswers, ProxyManager):
    """The same through the environment's proxy."""


def _fault(answer: BaseHTTPResponse, query_id: str, *, is_read: bool) -> _Fault | None:
    """Why an answer is not ClickHouse's answer to this query; None if it is."""
    headers = answer.headers
    if headers.get("X-ClickHouse-Exception-Code"):
        return None
    if answer.status != 200:
        return _of_status(answer.status)
    answered = headers.get("X-ClickHouse-Query-Id")
    if answered != query_id:
        return _of_query(answered, headers)
    if is_read and answer.data and not headers.get("X-ClickHouse-Format"):
        return StoreRefused, "with a body where ClickHouse has none", _BETWEEN
    return None


def _of_query(answered: str | None, headers: Mapping[str, str]) -> _Fault:
    if answered is not None:
        reason = f"to another query ({printable(answered[:EXCERPT])})"
        return StoreUnavailable, reason, _MIXED_UP
    if "Content-Length" not in headers and "Transfer-Encoding" not in headers:
        return StoreUnavailable, "the answer breaks off in its headers", _BETWEEN
    return StoreRefused, f"{_NOT_OURS}: without X-ClickHouse-Query-Id", _BETWEEN


def _of_status(status: int) -> _Fault:
    if status >= 500 or status in _RETRYABLE:
        return StoreUnavailable, _NOT_OURS, "A proxy before it, or it is starting."
    if 300 <= status < 400:
        return StoreRefused, f"{_NOT_OURS}: a redirect, which is not followed", _BETWEEN
    return StoreRefused, _NOT_OURS, _BETWEEN


def _beginning(answer: BaseHTTPResponse, *, is_read: bool, headers: Mapping[str, str]) -> str:
    """The beginning of the body, as a sentence, without the user and password of the request's headers."""
    try:
        body = answer.data if is_read else answer.read(4 * EXCERPT, decode_content=False)
    except HTTPError as error:
        return f"Its body cannot be read ({type(error).__name__})."
    text = body[: 16 * EXCERPT].decode(errors="replace")
    for secret in sorted(_secrets(headers), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = " ".join(text.split())
    return f"It begins {printable(text[:EXCERPT])!r}." if text else "Its body is empty."


def _secrets(headers: Mapping[str, str]) -> Iterator[str]:
    """The passwords in a request's headers, as sent and decoded."""
    for name, value in headers.items():
        if name.lower() not in {"authorization", "x-clickhouse-key", "proxy-authorization"}:
            continue
        kind, _, credentials = str(value).rpartition(" ")
        yield credentials
        if kind.lower() == "basic":
            password = base64.b64decode(credentials).decode(errors="replace").partition(":")[2]
            if password:
                yield password
