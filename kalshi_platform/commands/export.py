"""`export --public`: copy hours of the archive for publication, without the operator's private data."""

from __future__ import annotations

from pathlib import Path

import click

from kalshi_platform import settings as platform_settings
from kalshi_platform.archive import open_archive
from kalshi_platform.archive.export import PUBLIC, Published, publish
from kalshi_platform.errors import StoreRefused
from kalshi_platform.loading.restore import parse_hours
from kalshi_platform.printable import printable


@click.command()
@click.option("--public", is_flag=True, help="Remove private data; without it nothing is exported.")
@click.option(
    "--to",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="A new folder, or one that was exported to before.",
)
@click.option("--hours", help="2026-11-22-14, or 2026-11-22-14..2026-11-23-02; default: all.")
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    type=click.Choice(PUBLIC),
    help="Repeatable; default: all of them.",
)
def command(*, public: bool, to: Path, hours: str | None, datasets: tuple[str, ...]) -> None:
    """Copy sealed hours of the archive to a folder that may be published.

    Layout and columns are the archive's, manifests are new. Client order ids are cleared; events
    of private channels, unreadable frames and free text are left out, and counted in the output. Each hour
    is read back before it is put in place. The archive itself is not changed.
    """
    if not public:
        raise click.UsageError(
            "`export` writes for publication: give --public. For a copy with your own order ids in it,"
            " copy the archive's folder (PARQUET_DIR); its files are whole at any time."
        )
    archive = open_archive(platform_settings.load())
    published: list[Published] = []

    def done(hour: Published) -> None:
        published.append(hour)
        click.echo(_line(hour))

    span = parse_hours(hours) if hours else None
    publish(
        archive,
        to,
        span=span,
        wanted=datasets or PUBLIC,
        done=done,
        left=lambda why: click.echo(printable(why), err=True),
    )
    if not published:
        raise StoreRefused(f"The archive in {archive} has no sealed hour of that span.")
    click.echo(
        f"{sum(hour.rows for hour in published):,} rows of {len(published)} hours are in {to}, read back and free of"
        f" own order ids. Cleared or left out: {sum(_touched(hour) for hour in published):,} rows."
    )


def _touched(published: Published) -> int:
    return published.cleared + published.withheld + published.removed.total()


def _line(published: Published) -> str:
    parts = [f"{published.rows:,} rows"]
    if published.cleared:
        parts.append(f"{published.cleared:,} client order ids cleared")
    if published.withheld:
        parts.append(f"{published.withheld:,} rows keep their number alone")
    parts += [
        f"{count:,} of kind {kind} left out" for kind, count in sorted(published.removed.items())
    ]
    return printable(
        f"{published.dataset}  {published.hour:%Y-%m-%d %H:00} UTC  {', '.join(parts)}"
    )
