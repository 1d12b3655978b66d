"""`export --public`: hours of the archive for others to read, without what is the recorder's own."""

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
@click.option(
    "--public", is_flag=True, help="Scrub what is private; without it nothing is exported."
)
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

    Same layout, same columns, manifests of their own. Client order ids are cleared; events of private
    channels, unreadable frames and free text are left out; each hour is read back before it is put
    in place. What was left out is said. The archive itself is not changed.
    """
    if not public:
        raise click.UsageError(
            "`export` writes for publication: give --public. For a copy with your own order ids in it,"
            " copy the archive's folder (PARQUET_DIR); its files are whole at any time."
        )
    archive = open_archive(platform_settings.load())
    told: list[Published] = []

    def done(it: Published) -> None:
        told.append(it)
        click.echo(_line(it))

    span = parse_hours(hours) if hours else None
    publish(
        archive,
        to,
        span=span,
        wanted=datasets or PUBLIC,
        done=done,
        left=lambda why: click.echo(printable(why), err=True),
    )
    if not told:
        raise StoreRefused(f"The archive in {archive} has no sealed hour of that span.")
    click.echo(
        f"{sum(it.rows for it in told):,} rows of {len(told)} hours are in {to}, read back and free of"
        f" own order ids. Cleared or left out: {sum(_touched(it) for it in told):,} rows."
    )


def _touched(it: Published) -> int:
    return it.cleared + it.withheld + it.removed.total()


def _line(it: Published) -> str:
    said = [f"{it.rows:,} rows"]
    if it.cleared:
        said.append(f"{it.cleared:,} client order ids cleared")
    if it.withheld:
        said.append(f"{it.withheld:,} rows keep their number alone")
    said += [f"{count:,} of kind {kind} left out" for kind, count in sorted(it.removed.items())]
    return printable(f"{it.dataset}  {it.hour:%Y-%m-%d %H:00} UTC  {', '.join(said)}")
