"""HTTP to ClickHouse: only ClickHouse's own answer to the very request is taken for an answer.

Between here and ClickHouse there may be proxies. One of them can answer with HTTP 200 and a login page, an
error text, nothing, or the answer of another request. ClickHouse names the query in every answer: the driver
gives each request an id of its own (`query_id`), and the answer carries it (`X-ClickHouse-Query-Id`). So:

    status 200, or an error with `X-ClickHouse-Exception-Code`, which the driver translates
    the id of this request
    a body only with `X-ClickHouse-Format`: an INSERT's is empty
    no redirect is followed, for it would carry rows and password elsewhere

Anything else is a `StoreError` with the address, the status and how the body begins. That rows are there is
another question: see `clickhouse.insert_arrow` and `verified_inserts`.
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
_OF_ANOTHER_TRY = frozenset({408, 425, 429})
_NOT_OURS = "not as ClickHouse does"
_BETWEEN = "Check CLICKHOUSE_URL, and what is between here and ClickHouse."
_MIXED_UP = (
    "Something between here and ClickHouse keeps answers, mixes them up, or replaces query ids. Take it out of"
    " the way, or let it pass query_id on."
)
_Wrong = tuple[type[StoreError], str, str]
"""The kind of error, what is wrong, and what to do."""


def pool_to(url: str, **files: Any) -> PoolManager:
    """Connections to a server, shared by all clients of it: to this machine never through a proxy.

    `files` are the driver's names for certificates.
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
    """See the module."""

    def urlopen(  # type: ignore[override]  # of urllib3's overloads
        self, method: str, url: str, redirect: bool = True, **kw: Any
    ) -> BaseHTTPResponse:
        """Send a request. Raises `StoreError` for an answer that is not ClickHouse's own to it."""
        asked = _QUERY_ID.search(url)
        if asked is not None and not asked[1]:  # the driver names the query of a table's columns so
            url = f"{url[: asked.end()]}{uuid.uuid4()}{url[asked.end() :]}"
            asked = _QUERY_ID.search(url)
        answer = super().urlopen(method, url, redirect=False, **kw)
        if asked is None:  # a ping
            return answer
        is_read = bool(kw.get("preload_content", True))
        wrong = _wrong(answer, unquote(asked[1]), is_read=is_read)
        if wrong is None:
            return answer
        kind, what, remedy = wrong
        begins = _beginning(answer, is_read=is_read, headers=kw.get("headers") or {})
        answer.close()
        self.clear()  # who answers for another may have mixed up the next answers, too
        at = urlsplit(url)
        raise kind(
            f"ClickHouse at {at.scheme}://{at.netloc.rpartition('@')[2]}{at.path} answered HTTP"
            f" {answer.status}, but {what}. {begins} {remedy}"
        )


class _ProxiedOwnAnswers(_OwnAnswers, ProxyManager):
    """The same through a proxy of the environment."""


def _wrong(answer: BaseHTTPResponse, query_id: str, *, is_read: bool) -> _Wrong | None:
    """What shows that an answer is not ClickHouse's to this query; None where nothing does."""
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


def _of_query(answered: str | None, headers: Mapping[str, str]) -> _Wrong:
    if answered is not None:
        what = f"to another query ({printable(answered[:EXCERPT])})"
        return StoreUnavailable, what, _MIXED_UP
    if "Content-Length" not in headers and "Transfer-Encoding" not in headers:
        return StoreUnavailable, "the answer breaks off in its headers", _BETWEEN
    return StoreRefused, f"{_NOT_OURS}: without X-ClickHouse-Query-Id", _BETWEEN


def _of_status(status: int) -> _Wrong:
    if status >= 500 or status in _OF_ANOTHER_TRY:
        return StoreUnavailable, _NOT_OURS, "A proxy before it, or it is starting."
    if 300 <= status < 400:
        return StoreRefused, f"{_NOT_OURS}: it sends us elsewhere, which is not followed", _BETWEEN
    return StoreRefused, _NOT_OURS, _BETWEEN


def _beginning(answer: BaseHTTPResponse, *, is_read: bool, headers: Mapping[str, str]) -> str:
    """How the body begins, as a sentence, without what the request's headers say of user and password."""
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
    for name, value in headers.items():
        if name.lower() not in {"authorization", "x-clickhouse-key", "proxy-authorization"}:
            continue
        kind, _, credentials = str(value).rpartition(" ")
        yield credentials
        if kind.lower() == "basic":
            password = base64.b64decode(credentials).decode(errors="replace").partition(":")[2]
            if password:
                yield password
