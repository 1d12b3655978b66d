"""The embedded ClickHouse with its allow-list as the only defence, for tests of the list.

    python -m kalshi_platform_tests.embedded_clickhouse.list_alone FOLDER

The engine has every right and the process may do anything on the host. So what the list lets through
happens, and can be seen. Prints the URL when it answers.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from kalshi_platform.embedded_clickhouse import Running, rights, server

EVERYTHING = (
    "<clickhouse><profiles><default/></profiles><users><default><password></password>"
    "<profile>default</profile><quota>default</quota>"
    "<grants><query>GRANT ALL ON *.* WITH GRANT OPTION</query></grants></default></users>"
    "<quotas><default/></quotas></clickhouse>"
)


def main(folder: Path) -> None:
    """Serve until SIGTERM."""
    options: dict[str, Any] = {"user": "default", "password": "", "object_store": ()}
    with (
        mock.patch.object(rights, "users", lambda _: EVERYTHING),
        mock.patch.object(server, "confine", lambda *_: None),
    ):
        server.serve(
            path=folder,
            host="127.0.0.1",
            port=0,
            ready=lambda port: print(f"http://127.0.0.1:{port}", flush=True),  # noqa: T201
            **options,
        )


@contextmanager
def running(folder: Path) -> Iterator[Running]:
    """Context manager: serve from a child process; yields its URL."""
    child = subprocess.Popen(
        [sys.executable, "-m", __name__, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        yield Running(child.stdout.readline().strip(), child)
    finally:
        child.terminate()
        child.communicate(timeout=30)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
