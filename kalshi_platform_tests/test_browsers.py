"""What another site's page may ask of a server on this machine: nothing."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from kalshi_platform.browsers import OwnPagesOnly, refusal
from kalshi_platform_tests.simulator_fixtures import StartSimulator

LINK = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


@pytest.mark.parametrize("host", ["127.0.0.1:8123", "localhost", "LOCALHOST:1", "[::1]:80", ""])
def test_a_program_on_this_machine_is_answered(host: str) -> None:
    assert refusal(Headers({"host": host})) is None
    assert refusal(Headers({})) is None


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8123", "127.0.0.1.evil.example", "[", "10.0.0.1", ":80"]
)
def test_a_name_that_was_pointed_here_is_refused(host: str) -> None:
    assert refusal(Headers({"host": host}))
    assert refusal(Headers({"host": host}), loopback=False) is None


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "", "http://[", "http://127.0.0.1.evil.example"]
)
def test_another_sites_page_is_refused_wherever_the_server_listens(origin: str) -> None:
    for loopback in (True, False):
        headers = Headers({"host": "127.0.0.1:3000", "origin": origin})
        assert refusal(headers, loopback=loopback)


def test_a_server_for_other_machines_takes_its_own_pages() -> None:
    headers = Headers({"host": "desk.example:8123", "origin": "http://desk.example:8123"})
    assert refusal(headers, loopback=False) is None
    assert refusal(headers)


def test_a_page_of_this_machine_is_answered_whatever_its_port() -> None:
    headers = {"host": "127.0.0.1:8123", "origin": "http://localhost:3000"}
    assert refusal(Headers({**headers, "sec-fetch-site": "same-site"})) is None


async def _ok(_: object) -> PlainTextResponse:
    return PlainTextResponse("ok")


def answered(method: str, headers: dict[str, str], *, links: bool) -> int:
    """The status of one request's answer."""
    app = OwnPagesOnly(Starlette(routes=[Route("/", _ok, methods=["GET", "POST"])]), links=links)

    async def ask() -> int:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return (await client.request(method, "/", headers=headers)).status_code

    return asyncio.run(ask())


def test_a_link_opens_a_page_where_that_is_wanted_and_an_image_or_a_frame_does_not() -> None:
    assert answered("GET", LINK, links=True) == 200
    assert answered("GET", LINK, links=False) == 403
    assert answered("POST", LINK, links=True) == 403
    for other in ({"sec-fetch-dest": "iframe"}, {"sec-fetch-mode": "no-cors"}):
        assert answered("GET", {**LINK, **other}, links=True) == 403
    assert answered("GET", {**LINK, "host": "evil.example"}, links=True) == 403


def test_a_websocket_of_another_site_is_refused() -> None:
    handed_on: list[Scope] = []

    async def app(scope: Scope, _: Receive, __: Send) -> None:
        handed_on.append(scope)

    def dial(**headers: str) -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "websocket.connect"}

        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "websocket", "path": "/graphql", "headers": raw}
        asyncio.run(OwnPagesOnly(app, links=True)(scope, receive, send))
        return sent

    own = {"host": "localhost:3000", "origin": "http://localhost:3000"}
    assert dial(**own) == []
    assert len(handed_on) == 1
    for page in ("https://evil.example", "null"):
        assert dial(**{**own, "origin": page}) == [{"type": "websocket.close", "code": 1008}]
    assert len(handed_on) == 1


def test_the_simulator_takes_no_order_from_a_web_page(start_simulator: StartSimulator) -> None:
    simulator = start_simulator(markets=1, rate=0, rolling_markets=0)
    pause = f"{simulator.control_url}/pause"
    with httpx.Client(trust_env=False) as web:
        for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
            assert web.post(pause, headers=headers).status_code == 403
        assert web.post(pause).status_code == 200
