"""`export`: hours of the archive for publication, without private data; or markets for a backtesting engine."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import click

from kalshi_platform import settings as platform_settings
from kalshi_platform.archive import open_archive
from kalshi_platform.archive.export import PUBLIC, Published, publish
from kalshi_platform.errors import RequestRefused, StoreRefused
from kalshi_platform.loading.restore import parse_hours
from kalshi_platform.printable import printable
from kalshi_platform.reading import Archive

FORMATS = ("hftbacktest", "nautilus")


@click.command()
@click.option("--public", is_flag=True, help="Copy hours for publication, without private data.")
@click.option(
    "--format",
    "engine",
    type=click.Choice(FORMATS),
    help="Write a market for a backtesting engine.",
)
@click.option(
    "--to",
    required=True,
    metavar="FOLDER|TIME",
    help="With --public: a new folder, or one that was exported to before. With --format: the end, as --from.",
)
@click.option(
    "--hours", help="--public: 2026-11-22-14, or 2026-11-22-14..2026-11-23-02; default: all."
)
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    type=click.Choice(PUBLIC),
    help="--public: repeatable; default: all of them.",
)
@click.option("--ticker", "tickers", multiple=True, help="--format: the market; repeatable.")
@click.option(
    "--from",
    "start",
    metavar="TIME",
    help="--format: the first instant, such as 2026-11-22T14:00Z.",
)
@click.option(
    "--to-dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="--format: where to write.",
)
def command(
    *,
    public: bool,
    engine: str | None,
    to: str,
    hours: str | None,
    datasets: tuple[str, ...],
    tickers: tuple[str, ...],
    start: str | None,
    folder: Path | None,
) -> None:
    """Copy sealed hours for publication (--public), or write markets for a backtesting engine (--format).

    --public: layout and columns are the archive's, manifests are new. Client order ids are cleared; events
    of private channels, unreadable frames and free text are left out, and counted in the output. Each hour
    is read back before it is put in place.

    --format: hftbacktest's event arrays (.npz, a file for each market and day) or NautilusTrader's catalog, with a JSON
    file beside them that names gaps, terms, fees and result. A stale book is cleared until its next snapshot.

    The archive itself is not changed.
    """
    if public == (engine is not None):
        raise click.UsageError(
            "`export` writes for publication with --public, or for a backtesting engine with --format: give one of them."
            " For a copy with your own order ids in it, copy the archive's folder (PARQUET_DIR); its files are whole at"
            " any time."
        )
    if engine is None:
        _publish(Path(to), hours, datasets)
        return
    if not tickers or start is None or folder is None:
        raise click.UsageError("--format needs --ticker, --from, --to and --to-dir.")
    _export(engine, tickers, (start, to), folder)


def _export(engine: str, tickers: Sequence[str], span: tuple[str, str], folder: Path) -> None:
    """Write markets for a backtesting engine."""
    begin, end = (
        _instant(option, text) for option, text in zip(("--from", "--to"), span, strict=True)
    )
    try:
        exporter = importlib.import_module(f"kalshi_platform.reading.exporters.{engine}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("nautilus_trader"):
            raise
        raise RequestRefused(
            "NautilusTrader is not installed beside the platform, and writes its catalog itself. Install it:"
            ' pip install "nautilus_trader>=1.221,<1.222".'
        ) from None
    archive = Archive(open_archive(platform_settings.load()))
    for ticker in tickers:
        written = exporter.export(archive, ticker, begin, end, folder)
        click.echo(printable(f"{ticker}  {written}"))


def _instant(option: str, text: str) -> datetime:
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is no time. Give one such as 2026-11-22T14:00Z.", param_hint=option
        ) from None
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)


def _publish(to: Path, hours: str | None, datasets: tuple[str, ...]) -> None:
    """Copy hours for publication."""
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
