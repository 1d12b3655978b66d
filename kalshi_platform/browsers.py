"""Servers on the loopback interface and the web: what another site's page asks of them is refused.

Whoever sits at this machine may use them without a password, and so may every page that is open in
their browser, unless the server looks at what browsers say of a request and no page can forge:

- `Host`: a page whose name was made to point at 127.0.0.1 (DNS rebinding) still has its own name there;
- `Origin`: the page that sends it; absent from plain GETs;
- `Sec-Fetch-Site`: how that page and the server are related; absent from old browsers.

Programs that are no browsers name the server in `Host` and send neither of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from kalshi_platform.loopback import is_loopback


def refusal(headers: Mapping[str, str], *, loopback: bool = True) -> str | None:
    """Why a request is another site's, as a sentence; None where it may be answered.

    `headers` ignores case. `loopback` says that the server listens there alone; one that other
    machines reach has names that nobody here knows, so its `Host` proves nothing.
    """
    named = headers.get("host")
    host = _hostname(f"//{named}")
    if loopback and named and not is_loopback(host):
        return f"This server answers to localhost and 127.0.0.1, not to {named!r}."
    origin = headers.get("origin")
    if origin is not None:
        page = _hostname(origin)
        if not is_loopback(page) and (loopback or not page or page != host):
            return f"Requests from web pages of other sites are refused: {origin!r}."
    elif headers.get("sec-fetch-site") == "cross-site":
        return "Requests from web pages of other sites are refused."
    return None


def _hostname(url: str) -> str:
    """The host of a URL, in lower case; empty where it has none, as the origin `null`."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # brackets that hold no address
        return ""


class OwnPagesOnly:
    """ASGI middleware: answers 403 to what `refusal` refuses.

    `links` lets a link on another site open a page all the same: its answer is shown to the person
    who followed it, in a tab of its own, and not to that site.
    """

    def __init__(self, app: ASGIApp, *, loopback: bool = True, links: bool = False) -> None:
        self._app = app
        self._loopback = loopback
        self._links = links

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or hand on."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        headers: Mapping[str, str] = Headers(scope=scope)
        if self._links and scope["type"] == "http" and scope["method"] == "GET":
            headers = _without_link(headers)
        why = refusal(headers, loopback=self._loopback)
        if why is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # refuses the handshake
        else:
            await PlainTextResponse(f"{why}\n", 403)(scope, receive, send)


def _without_link(headers: Mapping[str, str]) -> Mapping[str, str]:
    """The headers, as if the person had typed the address that a link has in truth opened."""
    opened = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest"))
    if opened != ("navigate", "document"):
        return headers
    return {name: value for name, value in headers.items() if name != "sec-fetch-site"}
