"""An HTTP proxy in front of ClickHouse that forwards requests, or accepts them and never answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx


class Between(ThreadingHTTPServer):
    """Forwards requests while `open` is set; otherwise accepts them and does not answer."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), PassOn)
        self.target, self.open = target, threading.Event()
        self.open.set()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Ignore it: clients may have disconnected."""


class PassOn(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Between

    def do_POST(self) -> None:
        """Forward one request."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.open.wait()
        kept = {k: v for k, v in self.headers.items() if k.lower() not in {"host", "connection"}}
        answer = httpx.request(
            self.command, self.server.target + self.path, content=body, headers=kept, timeout=60
        )
        self.send_response(answer.status_code)
        for name, value in answer.headers.items():
            if name.startswith(("x-clickhouse", "content-type")):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    def do_GET(self) -> None:
        """Forward like a POST."""
        self.do_POST()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def between(target: str) -> Iterator[Between]:
    """Run the proxy while the block lasts."""
    server = Between(target)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.open.set()
        server.shutdown()
        thread.join()
        server.server_close()
