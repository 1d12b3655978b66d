"""`restore`: from the Parquet archive into ClickHouse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import click

from kalshi_platform import settings as platform_settings
from kalshi_platform.archive import archive_at, open_archive
from kalshi_platform.clickhouse import migrations
from kalshi_platform.errors import SettingsError, StoreRefused
from kalshi_platform.loading.restore import Restored, Verdict, parse_hours, refusals, restore


@click.command()
@click.option(
    "--from",
    "location",
    help="The archive, a folder or s3://bucket/prefix  [default: PARQUET_DIR]",
)
@click.option("--hours", help="2026-11-22-14, or 2026-11-22-14..2026-11-23-02; default: all.")
@click.option(
    "--replace",
    is_flag=True,
    help="Where ClickHouse has other rows of an hour than the archive, take the archive's.",
)
def command(location: str | None, hours: str | None, *, replace: bool) -> None:
    """Bring the archive's hours back into ClickHouse, and prove that they are the same.

    Each hour is compared first. What is equal stays, what ClickHouse lacks is inserted, and an hour of which
    it has other rows is refused and left as it is, unless --replace is given. It may run beside the platform
    and may be interrupted and run again: no row comes twice. Applies the migrations first.
    """
    settings = platform_settings.load()
    if not settings.use_clickhouse:
        raise SettingsError(
            "USE_CLICKHOUSE is 0: there is no ClickHouse to restore into. Set it to 1."
        )
    span = parse_hours(hours) if hours else None
    archive = archive_at(location) if location else open_archive(settings)
    archive.identity()  # a later version's is refused
    migrations.migrate(settings, tell=click.echo)
    done = restore(settings, archive, span, _say, replace=replace)
    refused = refusals(done, asked_for=span is not None)
    for verdict in (Verdict.EXPIRED, Verdict.OPEN):
        passed_over = [it for it in done if it.verdict is verdict and it.what not in refused]
        if passed_over:
            click.echo(
                f"{len(passed_over)} hours were passed over, which are {verdict.value}. The last one:"
                f" {passed_over[-1].what}"
            )
    if not refused or any(it.verdict.is_there for it in done):
        click.echo(_summary(done))
    if refused:
        raise StoreRefused(
            f"{len(refused)} {'is' if len(refused) == 1 else 'are'} not restored: "
            + " ".join(refused)
        )


def _summary(done: Sequence[Restored]) -> str:
    there = [it for it in done if it.verdict.is_there]
    counts = Counter(it.verdict for it in there)
    how = ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items())
    said = (
        f"{sum(it.rows for it in there):,} rows of {len({it.hour for it in there})} hours are in ClickHouse;"
        f" counts and checksums agree{f' ({how})' if how else ''}."
    )
    if left := sum(it.left for it in there):
        said += f" {left:,} rows are left to the loader, which has not come to them yet."
    return said


def _say(it: Restored) -> None:
    if it.verdict.is_there:
        inserted = f"  {it.inserted:,} inserted" if it.inserted else ""
        click.echo(
            f"{it.dataset}  {it.hour:%Y-%m-%d %H:00} UTC  {it.verdict.value}  {it.rows:,} rows{inserted}"
            f"  checksum {it.checksum}"
        )
