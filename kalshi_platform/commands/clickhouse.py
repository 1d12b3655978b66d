"""`clickhouse`: run the embedded ClickHouse in the foreground."""

from __future__ import annotations

from pathlib import Path

import click

from kalshi_platform import settings


@click.command("clickhouse")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    help="0: any free one  [default: EMBEDDED_CLICKHOUSE_PORT, 8123]",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--path",
    type=click.Path(path_type=Path),
    help="Data folder  [default: $KALSHI_DATA_DIR/clickhouse]",
)
def command(port: int | None, host: str, path: Path | None) -> None:
    """Run the embedded ClickHouse in the foreground. Ctrl-C ends it."""
    from kalshi_platform.embedded_clickhouse import launch

    current = settings.current()
    launch.replace_this_process(
        launch.Options(
            path=launch.absolute(path or current.embedded_clickhouse_dir),
            host=host,
            port=current.embedded_clickhouse_port if port is None else port,
            user=current.clickhouse_user,
            password=current.clickhouse_password.get_secret_value() or None,
            object_store=current.object_store_urls,
            log_format=current.log_format,
            log_level=current.log_level,
        )
    )
