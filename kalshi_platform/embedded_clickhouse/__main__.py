"""The server's main program; launch.py starts it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click

from kalshi_platform import logs
from kalshi_platform.embedded_clickhouse import launch
from kalshi_platform.embedded_clickhouse.server import serve
from kalshi_platform.errors import PlatformError
from kalshi_platform.printable import printable
from kalshi_platform.settings import Settings


def main() -> None:
    """Serve until SIGTERM or SIGINT; a `PlatformError` exits 1 with one line on stderr."""
    options = launch.received(sys.stdin.buffer)
    logs.configure(
        Settings.model_construct(log_format=options.log_format, log_level=options.log_level)
    )
    address = f"[{options.host}]" if ":" in options.host else options.host
    try:
        serve(
            path=Path(options.path),
            host=options.host,
            port=options.port,
            user=options.user,
            password=options.password,
            object_store=options.object_store,
            ready=lambda port: click.echo(f"ClickHouse answers on http://{address}:{port}"),
        )
    except PlatformError as error:
        if options.log_format == "json":
            logging.getLogger(logs.PLATFORM).error("%s", error)
        else:
            click.echo(printable(f"Error: {error}"), err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
