"""Protection of local servers against requests from web pages of other sites.

Every program on this machine may use the servers on its loopback interface, and so could every web page that
is open in a browser here. A server keeps pages out by three headers that the browser sets and no page can
forge:

- `Host`: a page whose name was made to point at 127.0.0.1 (DNS rebinding) still has its own name there;
- `Origin`: scheme, host and port of the page that sends it; absent from plain GETs;
- `Sec-Fetch-Site`: how that page and the server are related; absent from browsers older than 2023.

All three are compared with the values that the server's own pages send. A program other than a browser names
the server in `Host` and sends neither of the other two.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from kalshi_platform.loopback import is_loopback

_OWN = frozenset({"same-origin", "none"})
"""`Sec-Fetch-Site` of a server's own pages, and of an address that a person typed."""
_SCHEMES = {"http": "http", "ws": "http", "https": "https", "wss": "https"}
"""Scheme of a request or WebSocket → scheme of the page that sends it."""
_PORTS = {"http": ":80", "https": ":443"}
"""Default ports, which browsers leave out of an origin and of `Host`."""


def refusal(
    headers: Headers, *, scheme: str = "http", loopback: bool = True, address: str | None = None
) -> str | None:
    """A sentence that says why a request is refused; None if it may be answered.

    `scheme` is that of the request. `loopback` means that the server listens on the loopback interface only;
    a server that other machines reach may have any name, so its `Host` is not checked. `address` is a further
    URL of the server, for instance that of a proxy in front of it.
    """
    sites = headers.getlist("sec-fetch-site")
    return _refusal_by_address(headers, scheme, loopback, address) or (
        None
        if not sites or (len(sites) == 1 and sites[0] in _OWN)
        else "Requests from web pages of other sites are refused."
    )


def _refusal_by_address(
    headers: Headers, scheme: str, loopback: bool, address: str | None
) -> str | None:
    """Refuse a request by its `Host` and `Origin`; None if both may be answered."""
    hosts, origins = headers.getlist("host"), headers.getlist("origin")
    if len(hosts) > 1 or len(origins) > 1:
        return "A request has one Host and one Origin, not more."
    host = hosts[0] if hosts else ""
    known = _hostname(f"//{host}") == _hostname(address or "") != ""
    if loopback and host and not known and not is_loopback(_hostname(f"//{host}")):
        return f"This server answers to localhost and 127.0.0.1, not to {host!r}."
    own = {_origin(f"{scheme}://{host}"), _origin(address or "")} - {""}
    if origins and origins[0] not in own:
        return f"Requests from web pages of other sites are refused: {origins[0]!r}."
    return None


def _origin(url: str) -> str:
    """The origin of the pages at a URL, as browsers write it; empty if they have none."""
    scheme, separator, rest = url.partition("://")
    page = _SCHEMES.get(scheme.lower(), "")
    host = rest.partition("/")[0].lower()
    return f"{page}://{host.removesuffix(_PORTS[page])}" if separator and page and host else ""


def _hostname(url: str) -> str:
    """The host of a URL, in lower case; empty if it has none, like the origin `null`."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # brackets without an IPv6 address in them
        return ""


class OwnPagesOnly:
    """ASGI middleware: answers 403 to requests that `refusal` refuses.

    With `links` a link on another site opens the server's front page, whatever path and query it names. The
    page opens in a tab of its own and reads path and query from the tab's address; the server itself acts on
    neither.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        loopback: bool = True,
        links: bool = False,
        address: str | None = None,
    ) -> None:
        self._app = app
        self._loopback = loopback
        self._links = links
        self._address = address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403, or pass the request to the application."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        why = refusal(
            headers,
            scheme=scope.get("scheme", "http"),
            loopback=self._loopback,
            address=self._address,
        )
        if why is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # refuses the handshake
        elif self._links and self._is_link(scope, headers):
            root = scope.get("root_path", "")
            front = {"path": f"{root}/", "raw_path": f"{root}/".encode(), "query_string": b""}
            await self._app({**scope, **front}, receive, send)
        else:
            await PlainTextResponse(f"{why}\n", 403)(scope, receive, send)

    def _is_link(self, scope: Scope, headers: Headers) -> bool:
        """Whether a person followed a link; images, frames, scripts and forms send other headers."""
        opened = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest"))
        return (
            scope["method"] == "GET"
            and opened == ("navigate", "document")
            and "origin" not in headers
            and _refusal_by_address(headers, scope["scheme"], self._loopback, self._address) is None
        )
