"""Runs clickhouse-connect's own integration tests, unchanged, against the embedded ClickHouse (`make client-tests`).

Its repository is cloned at a fixed commit, and the client's installed version is tested in an environment of its own;
both are in a temporary folder. The figure in docs/embedded-clickhouse.md is this program's last line.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

from kalshi_platform.embedded_clickhouse import running

REPOSITORY = "https://github.com/ClickHouse/clickhouse-connect"
COMMIT = "842e4131"
"""The last commit whose tests were compared with a ClickHouse server."""
REQUIREMENTS = (
    *("aiohttp", "alembic>=1.18", "lz4", "numpy", "pandas<3", "polars", "pyarrow", "pyjwt[crypto]"),
    *(
        "pytest",
        "pytest-asyncio",
        "pytest-dotenv",
        "pytest-mock",
        "pytest-xdist",
        "sqlalchemy>=2,<3",
    ),
    *("tzlocal", "zstandard"),
)


def main() -> int:
    """Run the tests; arguments are pytest's. Returns its exit code."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = os.environ.get("CLICKHOUSE_CONNECT_SOURCE", REPOSITORY)
        subprocess.run(["git", "clone", "-q", source, folder / "client"], check=True)
        subprocess.run(["git", "checkout", "-q", COMMIT], cwd=folder / "client", check=True)
        # the package beside the tests would hide the installed one
        (folder / "client" / "clickhouse_connect").rename(folder / "unused")
        venv.create(folder / "venv", with_pip=True)
        python = str(folder / "venv" / "bin" / "python")
        installed = f"clickhouse-connect=={version('clickhouse-connect')}"
        pip = [python, "-m", "pip", "install", "-q", "--only-binary", ":all:"]
        subprocess.run([*pip, installed, *REQUIREMENTS], check=True)
        with running(folder / "data") as url:
            address = urlsplit(url)
            return subprocess.run(
                [python, "-m", "pytest", "-o", "addopts=", "-o", "log_cli=false", "-q", "--tb=line"]
                + (sys.argv[1:] or ["tests/integration_tests"]),
                cwd=folder / "client",
                env=os.environ
                | {
                    "CLICKHOUSE_CONNECT_TEST_HOST": str(address.hostname),
                    "CLICKHOUSE_CONNECT_TEST_PORT": str(address.port),
                },
                check=False,
            ).returncode


if __name__ == "__main__":
    sys.exit(main())
