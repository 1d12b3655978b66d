"""Servers on the loopback interface and the web: requests from the pages of other sites are refused.

Every program on this machine may use these servers, and so could every page that is open in a browser
here, unless the server reads what browsers say about a request, which no page can forge:

- `Host`: a page whose name was made to point at 127.0.0.1 (DNS rebinding) still has its own name there;
- `Origin`: scheme, host and port of the page that sends it; absent from plain GETs;
- `Sec-Fetch-Site`: how that page and the server are related; absent from browsers older than 2023.

All three are checked against the values that the server's own pages have. A program that is no browser
names the server in `Host` and sends neither of the others.
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
"""The scheme that a page has whose requests, or WebSockets, have this one."""
_PORTS = {"http": ":80", "https": ":443"}
"""Left out of an origin and of `Host`."""


def refusal(
    headers: Headers, *, scheme: str = "http", loopback: bool = True, address: str | None = None
) -> str | None:
    """Why a request comes from another site, as a sentence; None where it may be answered.

    `scheme` is that of the request. `loopback` says that the server listens there alone; the names of
    one that other machines reach are not known, so its `Host` proves nothing. `address` is a URL by
    which people reach the server besides, through a proxy.
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
    """The origin of the pages at a URL, as browsers write it; empty where they have none."""
    scheme, separator, rest = url.partition("://")
    page = _SCHEMES.get(scheme.lower(), "")
    host = rest.partition("/")[0].lower()
    return f"{page}://{host.removesuffix(_PORTS[page])}" if separator and page and host else ""


def _hostname(url: str) -> str:
    """The host of a URL, in lower case; empty where it has none, as the origin `null`."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # brackets that hold no address
        return ""


class OwnPagesOnly:
    """ASGI middleware: answers 403 to what `refusal` refuses.

    With `links` a link on another site opens the server's front page, whatever path and query it
    names: the page is shown to the person who followed the link, in a tab of its own, and finds the
    rest in the tab's address. Nothing else can be reached by such a link.
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
        """Refuse, or hand on."""
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
        """Whether a person followed a link to here; no image, frame, script or form does."""
        opened = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest"))
        return (
            scope["method"] == "GET"
            and opened == ("navigate", "document")
            and "origin" not in headers
            and _refusal_by_address(headers, scope["scheme"], self._loopback, self._address) is None
        )
