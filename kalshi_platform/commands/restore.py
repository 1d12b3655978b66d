"""`restore`: from the Parquet archive into an empty ClickHouse."""

from __future__ import annotations

import click

from kalshi_platform import settings as platform_settings
from kalshi_platform.errors import SettingsError
from kalshi_platform.loading.restore import Restored, parse_hours, restore
from kalshi_platform.storage import migrations
from kalshi_platform.storage.archive import archive_at, open_archive


@click.command()
@click.option(
    "--from",
    "location",
    help="The archive, a folder or s3://bucket/prefix  [default: PARQUET_DIR]",
)
@click.option("--hours", help="2026-11-22-14, or 2026-11-22-14..2026-11-23-02; default: all.")
def command(location: str | None, hours: str | None) -> None:
    """Bring the archive's hours back into ClickHouse, and prove that they are the same.

    Applies the migrations first. May be run again after an interruption: nothing goes in twice.
    """
    settings = platform_settings.load()
    if not settings.use_clickhouse:
        raise SettingsError(
            "USE_CLICKHOUSE is 0: there is no ClickHouse to restore into. Set it to 1."
        )
    span = parse_hours(hours) if hours else None
    migrations.migrate(settings)
    done = restore(
        settings, archive_at(location) if location else open_archive(settings), span, _say
    )
    rows = sum(it.rows for it in done)
    click.echo(f"{rows:,} rows of {len(done)} hours are in ClickHouse; counts and checksums agree.")


def _say(it: Restored) -> None:
    click.echo(
        f"{it.dataset}  {it.hour:%Y-%m-%d %H:00} UTC  {it.rows:,} rows  checksum {it.checksum}"
    )
