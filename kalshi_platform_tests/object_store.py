"""An object store for a test: moto's S3 over real HTTP, which can be stopped or made to fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

import httpx
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from pyarrow import fs
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

BUCKET = "archive"
KEY_ID, KEY = "AKIDTEST", "s3cr3t-of-the-test"
Fault = Callable[[str, str], int | None]
"""Given a request's method and path with query: the status to answer instead, or None."""


class ObjectStore:
    """A server with one bucket; `url` is its endpoint. Its objects survive `stop` and `start`."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.fault: Fault | None = None
        self.lost: Fault | None = None
        """Like `fault`, but the request is executed: only its answer is lost."""
        self._port = 0
        self._server: BaseWSGIServer | None = None
        self._moto = DomainDispatcherApplication(create_backend_app)
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._server = make_server(
            "127.0.0.1", self._port, self._answer, threaded=True, request_handler=_Silent
        )
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def files(self) -> fs.S3FileSystem:
        """The store as its owner sees it."""
        return fs.S3FileSystem(
            access_key=KEY_ID,
            secret_key=KEY,
            region="us-east-1",
            endpoint_override=self.url.partition("://")[2],
            scheme="http",
            allow_bucket_creation=True,
            allow_bucket_deletion=True,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=10),
        )

    def objects(self) -> list[str]:
        """Every object, below the bucket."""
        infos = self.files().get_file_info(fs.FileSelector(BUCKET, recursive=True))
        return sorted(
            i.path.removeprefix(f"{BUCKET}/") for i in infos if i.type is fs.FileType.File
        )

    def require_keys(self, on: bool) -> None:
        """Refuse requests without a key of a user; the store has no users, so it refuses all."""
        count = b"0" if on else b"1000000000"
        httpx.post(f"{self.url}/moto-api/reset-auth", content=count, timeout=60).raise_for_status()

    def _answer(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        path = f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        self.requests.append(f"{environ['REQUEST_METHOD']} {path}")
        status = self.fault(environ["REQUEST_METHOD"], path) if self.fault else None
        if status is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(f"{status} Fault", [("Content-Length", "0")])
            return [b""]
        status = self.lost(environ["REQUEST_METHOD"], path) if self.lost else None
        if status is not None:
            b"".join(self._moto(environ, lambda *_: lambda _: None))
            start(f"{status} Lost", [("Content-Length", "0")])
            return [b""]
        answer: Iterable[bytes] = self._moto(environ, start)
        return answer


class _Silent(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_: Any) -> None:
        pass


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A store with the empty bucket `BUCKET`."""
    store = ObjectStore()
    try:
        store.files().create_dir(BUCKET)
        yield store
    finally:
        store.fault = store.lost = None
        if store._server is None:
            store.start()
        files = store.files()
        files.delete_dir_contents(BUCKET)
        files.delete_dir(BUCKET)
        store.stop()
