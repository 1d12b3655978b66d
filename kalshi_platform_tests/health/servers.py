"""A web server and a mail server that keep what they receive, or refuse it as configured."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session


class Web:
    """The received requests, and the statuses to answer with; the last one repeats."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.asked = 0
        self.headers: Mapping[str, str] = {}
        """The body of the last request."""
        self.statuses = [200]
        self.url = ""


@contextmanager
def web_server() -> Iterator[Web]:
    """A web server on a free port of the loopback interface."""
    web = Web()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            web.asked += 1
            web.headers = dict(self.headers)
            status = web.statuses.pop(0) if len(web.statuses) > 1 else web.statuses[0]
            if status < 300:
                web.bodies.append(json.loads(body))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    web.url = f"http://127.0.0.1:{server.server_port}/services/T0/B0/s3cr3t"
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def socket_server(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port that serves each connection in a thread of its own, until the client or the test ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def meet(caller: socket.socket) -> None:
            with caller, suppress(OSError):
                talk(caller)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    caller, _ = listener.accept()
                    threading.Thread(target=meet, args=(caller,), daemon=True).start()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


class Mail:
    """The received mails, and the answers to give."""

    def __init__(self) -> None:
        self.messages: list[EmailMessage] = []
        self.recipients: list[list[str]] = []
        self.answer = "250 OK"
        self.port = 0

    async def handle_DATA(  # noqa: N802 - aiosmtpd's name
        self, server: SMTP, session: Session, envelope: Envelope
    ) -> str:
        del server, session
        if self.answer.startswith("250"):
            content = envelope.content
            assert isinstance(content, bytes)
            self.messages.append(message_from_bytes(content, policy=policy.default))
            self.recipients.append([str(address) for address in envelope.rcpt_tos])
        return self.answer


@contextmanager
def mail_server(user: str = "", password: str = "") -> Iterator[Mail]:
    """A mail server on a free port of the loopback interface, without TLS; with a user it requires a password."""
    mail = Mail()

    def authenticate(*args: Any) -> AuthResult:
        data = args[-1]
        assert isinstance(data, LoginPassword)
        good = (data.login, data.password) == (user.encode(), password.encode())
        return AuthResult(success=good, handled=False)

    class Server(Controller):
        def _trigger_server(self) -> None:  # it would connect to port 0
            assert isinstance(self.server, asyncio.Server)
            mail.port = self.port = self.server.sockets[0].getsockname()[1]
            super()._trigger_server()  # type: ignore[no-untyped-call]

    controller = Server(
        mail,
        hostname="127.0.0.1",
        port=0,
        authenticator=authenticate if user else None,
        auth_required=bool(user),
        auth_require_tls=False,
        ready_timeout=60.0,
    )
    controller.start()
    try:
        yield mail
    finally:
        controller.stop()
