"""Any answer that is not ClickHouse's own to the request is refused with a sentence without secrets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kalshi_platform.clickhouse.client import connect
from kalshi_platform.errors import StoreError, StoreRefused, StoreUnavailable
from kalshi_platform_tests.clickhouse.tables import settings_for

SECRET = "a-password-that-no-error-shows"


class Web(BaseHTTPRequestHandler):
    """A web server that is not ClickHouse."""

    protocol_version = "HTTP/1.1"

    def handle_any(self, answer: Callable[[Web], None]) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer(self)

    def say(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def web(answer: Callable[[Web], None]) -> Iterator[str]:
    def respond(self: Web) -> None:
        self.handle_any(answer)

    handler = type("Handler", (Web,), {"do_GET": respond, "do_POST": respond})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def own_id(server: Web) -> str:
    return server.path.partition("query_id=")[2].partition("&")[0]


def login_page(server: Web) -> None:
    server.say(200, b"<html>\n\x1b[2J Sign in", Content_Type="text/html")


def echo(server: Web) -> None:
    server.say(200, "\n".join([SECRET, *server.headers.values()]).encode())


def half_an_answer(server: Web) -> None:
    server.wfile.write(b"HTTP/1.1 200 OK\r\nServer: x\r\n")
    server.close_connection = True


def another_answer(server: Web) -> None:
    server.say(200, b"1\n", X_ClickHouse_Query_Id="of-another", X_ClickHouse_Format="TSV")


def a_body_without_a_format(server: Web) -> None:
    server.say(200, b"no upstream", X_ClickHouse_Query_Id=own_id(server))


def of(status: int) -> Callable[[Web], None]:
    return lambda server: server.say(status, b"no upstream")


@pytest.mark.parametrize(
    ("answer", "kind", "what"),
    [
        (
            login_page,
            StoreRefused,
            r"HTTP 200, but not as ClickHouse does.*<html> \\\\x1b\[2J Sign in",
        ),
        (echo, StoreRefused, r"It begins '\*\*\* "),
        (half_an_answer, StoreUnavailable, "breaks off in its headers"),
        (another_answer, StoreUnavailable, r"to another query \(of-another\)"),
        (of(204), StoreRefused, "HTTP 204, but not as"),
        (of(403), StoreRefused, "HTTP 403, but not as .* It begins 'no upstream'"),
        (of(429), StoreUnavailable, "HTTP 429, but not as"),
        (of(502), StoreUnavailable, "HTTP 502, but not as .* It begins 'no upstream'"),
    ],
    ids=["page", "echo", "half", "another", "204", "403", "429", "502"],
)
def test_what_is_not_clickhouse_is_named(
    answer: Callable[[Web], None], kind: type[StoreError], what: str
) -> None:
    with web(answer) as url, pytest.raises(kind, match=what) as met:
        connect(settings_for(url, "kalshi", clickhouse_password=SECRET))
    assert url in str(met.value)
    chain: BaseException | None = met.value
    while chain is not None:
        assert SECRET not in str(chain)
        chain = chain.__cause__ or chain.__context__


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(status: int) -> None:
    asked: list[str] = []

    def note(server: Web) -> None:
        asked.append(server.path)
        server.say(200)

    with web(note) as elsewhere:

        def redirect(server: Web) -> None:
            server.say(status, Location=f"{elsewhere}/login")

        with (
            web(redirect) as url,
            pytest.raises(StoreRefused, match=f"HTTP {status}.*not followed"),
        ):
            connect(settings_for(url, "kalshi", clickhouse_password=SECRET))
    assert asked == []
