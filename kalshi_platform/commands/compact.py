"""`compact`: rewrite each sealed hour of the archive as one sorted file."""

from __future__ import annotations

from datetime import datetime

import click

from kalshi_platform import settings as platform_settings
from kalshi_platform.archive import compaction
from kalshi_platform.archive.compaction import Compacted
from kalshi_platform.errors import StoreError, StoreRefused
from kalshi_platform.loading.presence import known_archive
from kalshi_platform.loading.restore import parse_hours
from kalshi_platform.printable import printable


@click.command()
@click.option("--hour", help="2026-11-22-14, UTC: only this hour.")
@click.option(
    "--all", "everything", is_flag=True, help="Every sealed hour not compacted yet  [default]"
)
def command(hour: str | None, everything: bool) -> None:
    """Rewrite each sealed hour as one file, sorted for reading.

    Rows and checksum are compared with the parts before these are deleted. Readers and the streamer go
    on meanwhile; an interrupted compaction is completed by the next one.
    """
    if hour is not None and everything:
        raise click.UsageError("Give --hour or --all, not both.")
    archive = known_archive(platform_settings.load())
    if hour is None:
        wanted = compaction.pending(archive)
    else:
        first, last = parse_hours(hour)
        if first != last:
            raise click.UsageError("--hour is one hour; --all takes all of them.")
        wanted = [first]
    before = after = files = 0

    def say(compacted: Compacted) -> None:
        nonlocal before, after, files
        before, after, files = (
            before + compacted.bytes_before,
            after + compacted.bytes_after,
            files + 1,
        )
        click.echo(
            f"{compacted.dataset}  {compacted.hour:%Y-%m-%d %H:00} UTC  {compacted.rows:,} rows  {compacted.files_before} files →"
            f" 1  {compacted.bytes_before:,} → {compacted.bytes_after:,} bytes  checksum {compacted.checksum}"
        )

    refusals: list[StoreError] = []

    def refused(_: datetime, error: StoreError) -> None:
        refusals.append(error)
        click.echo(printable(f"Not compacted: {error}"), err=True)

    compaction.compact(archive, wanted, say, refused)
    if hour is not None and refusals:
        raise SystemExit(1)
    if refusals:
        raise StoreRefused(f"{len(refusals)} of {len(wanted)} hours were not compacted; see above.")
    if not files:
        click.echo("Nothing to compact: every sealed hour is one file per dataset already.")
    else:
        click.echo(f"{len(wanted)} hours compacted, {before:,} → {after:,} bytes.")
