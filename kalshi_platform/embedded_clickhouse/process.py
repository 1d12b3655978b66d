"""The embedded ClickHouse in a child process: for tests and benchmarks, also those that kill it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from kalshi_platform.embedded_clickhouse import launch
from kalshi_platform.errors import StoreError

END_S = 15


class Running(str):
    """The server's URL, as a text that also has its process."""

    process: subprocess.Popen[str]
    """The child: tests may kill it."""

    def __new__(cls, url: str, process: subprocess.Popen[str]) -> Running:
        """Create the URL with its process."""
        self = super().__new__(cls, url)
        self.process = process
        return self


@contextmanager
def running(
    path: Path, *, user: str = "default", password: str | None = "", port: int = 0
) -> Iterator[Running]:
    """Context manager: serve `path` from a child process on a free port; yields its URL.

    `password` is as in `launch.Options`: if it is empty, every program that reaches the port may write.
    Raises `StoreError` with the child's output if it does not start.
    """
    options = launch.Options(launch.absolute(path), "127.0.0.1", port, user, password)
    child = subprocess.Popen(  # noqa: S603 - our own command, no shell
        launch.command(options.path),
        env=launch.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that Ctrl-C reaches only the caller
    )
    try:
        with cast(IO[str], child.stdin) as stdin:
            stdin.write(launch.encoded(options).decode())
        child.stdin = None
        line = cast(IO[str], child.stdout).readline()
        if not line:
            _, output = child.communicate(timeout=END_S)
            raise StoreError(
                f"The embedded ClickHouse did not start: {output.strip() or f'exit code {child.returncode}'}"
            )
        yield Running(line.split()[-1], child)
    finally:
        if child.poll() is None:
            child.terminate()
        try:
            child.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            raise
