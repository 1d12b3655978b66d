"""Local servers refuse every request from a web page of another site."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
def test_dns_rebinding_is_refused(host: str) -> None:
    assert refusal(Headers({"host": host}))
    assert refusal(Headers({"host": host}), loopback=False) is None


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:3000", "http://127.0.0.1:3000"),
        ("localhost:3000", "http://localhost:3000"),
        ("LocalHost:3000", "http://localhost:3000"),
        ("[::1]:3000", "http://[::1]:3000"),
        ("localhost", "http://localhost"),
        ("localhost:80", "http://localhost"),
    ],
)
def test_a_servers_own_pages_are_answered(host: str, origin: str) -> None:
    for site in ({}, {"sec-fetch-site": "same-origin"}):
        assert refusal(Headers({"host": host, "origin": origin, **site})) is None
        assert refusal(Headers({"host": host, "origin": origin, **site}), loopback=False) is None


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "",
        "http://[",
        "http://127.0.0.1.evil.example",
        "http://127.0.0.1",  # another port
        "http://127.0.0.1:3001",
        "http://localhost:3000",  # another name of the same server is another site
        "https://127.0.0.1:3000",  # another scheme
        "http://127.0.0.1:3000/",
        "http://127.0.0.1:3000@evil.example",
        "http://evil.example/127.0.0.1:3000",
    ],
)
def test_a_page_of_any_other_origin_is_refused(origin: str) -> None:
    for loopback in (True, False):
        for site in ({}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}):
            headers = Headers({"host": "127.0.0.1:3000", "origin": origin, **site})
            assert refusal(headers, loopback=loopback)


@given(origin=st.text(max_size=30), site=st.text(max_size=12))
def test_only_allowed_header_values_pass(origin: str, site: str) -> None:
    own = "http://127.0.0.1:3000"
    headers = [(b"host", b"127.0.0.1:3000"), (b"origin", origin.encode("latin-1", "replace"))]
    header = site.encode("latin-1", "replace")
    passes = headers[1][1] == own.encode() and header in {b"same-origin", b"none"}
    assert (refusal(Headers(raw=[*headers, (b"sec-fetch-site", header)])) is None) == passes


@pytest.mark.parametrize("site", ["cross-site", "same-site", "", "SAME-ORIGIN", "anything"])
def test_a_foreign_page_without_an_origin_is_refused(site: str) -> None:
    for loopback in (True, False):
        headers = Headers({"host": "127.0.0.1:3000", "sec-fetch-site": site})
        assert refusal(headers, loopback=loopback)


def test_a_header_that_comes_twice_is_refused() -> None:
    own = [(b"host", b"localhost:1"), (b"origin", b"http://localhost:1")]
    assert refusal(Headers(raw=own)) is None
    for again in (
        (b"host", b"localhost:1"),
        (b"origin", b"https://evil.example"),
        (b"origin", b"http://localhost:1"),
    ):
        assert refusal(Headers(raw=[*own, again]))
    sites = [(b"sec-fetch-site", b"none"), (b"sec-fetch-site", b"cross-site")]
    assert refusal(Headers(raw=[*own, *sites]))


def test_a_server_for_other_machines_answers_its_own_pages() -> None:
    headers = Headers({"host": "desk.example:8123", "origin": "http://desk.example:8123"})
    assert refusal(headers, loopback=False) is None
    assert refusal(headers)


def test_behind_a_proxy_the_public_address_passes() -> None:
    headers = Headers({"host": "desk.example", "origin": "https://desk.example"})
    for loopback in (True, False):
        assert refusal(headers, loopback=loopback)
        assert refusal(headers, loopback=loopback, address="https://desk.example/ui") is None
    other = Headers({"host": "desk.example", "origin": "https://other.example"})
    assert refusal(other, address="https://desk.example/ui")


async def _echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"{request.method} {request.url.path}?{request.url.query}")


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """The application on a port of its own; yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module", params=[True, False])
def client_and_links(request: pytest.FixtureRequest) -> Iterator[tuple[httpx.Client, bool]]:
    """A client of a server, and whether that server accepts links."""
    inner = Starlette(routes=[Route("/{path:path}", _echo, methods=["GET", "POST"])])
    with (
        served(OwnPagesOnly(inner, links=request.param)) as url,
        httpx.Client(base_url=url, trust_env=False) as web,
    ):
        yield web, request.param


@pytest.mark.parametrize("accept", ["text/html", "*/*", "application/json"])
def test_a_link_opens_the_front_page_and_nothing_else(
    client_and_links: tuple[httpx.Client, bool], accept: str
) -> None:
    web, links = client_and_links
    for site in ("cross-site", "same-site"):
        headers = {**LINK, "sec-fetch-site": site, "accept": accept}
        answer = web.get("/graphql?query=mutation{end}", headers=headers)
        assert answer.status_code == (200 if links else 403)
        assert not links or answer.text == "GET /?"


@pytest.mark.parametrize(
    "other",
    [
        {"sec-fetch-dest": "iframe"},
        {"sec-fetch-dest": "image"},
        {"sec-fetch-mode": "no-cors"},
        {"sec-fetch-mode": "cors", "sec-fetch-dest": "empty"},
        {"origin": "https://evil.example"},
        {"host": "evil.example"},
    ],
)
def test_requests_that_are_not_links_are_refused(
    client_and_links: tuple[httpx.Client, bool], other: dict[str, str]
) -> None:
    assert client_and_links[0].get("/", headers={**LINK, **other}).status_code == 403
    assert client_and_links[0].post("/", headers=LINK).status_code == 403


def test_programs_and_own_pages_reach_every_path(
    client_and_links: tuple[httpx.Client, bool],
) -> None:
    web, _ = client_and_links
    own = f"{web.base_url.scheme}://{web.base_url.host}:{web.base_url.port}"
    for headers in (
        {},
        {"sec-fetch-site": "same-origin"},
        {"origin": own},
        {"origin": own, "sec-fetch-site": "same-origin"},
        {**LINK, "sec-fetch-site": "none"},
    ):
        assert web.post("/a?b=1", headers=headers).text == "POST /a?b=1"
        assert web.get("/a?b=1", headers=headers).text == "GET /a?b=1"


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
        scope = {"type": "websocket", "scheme": "ws", "path": "/graphql", "headers": raw}
        asyncio.run(OwnPagesOnly(app, links=True)(scope, receive, send))
        return sent

    own = {"host": "localhost:3000", "origin": "http://localhost:3000"}
    assert dial(**own) == []
    assert len(handed_on) == 1
    for page in ("https://evil.example", "null", "http://localhost:3001"):
        assert dial(**{**own, "origin": page}) == [{"type": "websocket.close", "code": 1008}]
    assert len(handed_on) == 1


def test_the_simulator_takes_no_order_from_a_web_page(start_simulator: StartSimulator) -> None:
    simulator = start_simulator(markets=1, rate=0, rolling_markets=0)
    pause = f"{simulator.control_url}/pause"
    with httpx.Client(trust_env=False) as web:
        for headers in (
            {"Origin": "https://evil.example"},
            {"Origin": "http://127.0.0.1:9"},
            {"Host": "evil.example"},
            {"Sec-Fetch-Site": "same-site"},
            LINK,
        ):
            assert web.post(pause, headers=headers).status_code == 403
        assert web.post(pause).status_code == 200
