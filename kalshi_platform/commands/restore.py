"""`restore`: load hours of the Parquet archive into ClickHouse."""

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
    help="Replace an hour's rows if ClickHouse has other rows than the archive.",
)
def command(location: str | None, hours: str | None, *, replace: bool) -> None:
    """Load the archive's hours back into ClickHouse, and verify that both have the same rows.

    Each hour is compared first. Equal rows stay, missing rows are inserted, and an hour of which ClickHouse
    has other rows is refused and left as it is, unless --replace is given. It may run beside the platform
    and may be interrupted and repeated: no row is stored twice. Applies the migrations first.
    """
    settings = platform_settings.load()
    if not settings.use_clickhouse:
        raise SettingsError(
            "USE_CLICKHOUSE is 0: there is no ClickHouse to restore into. Set it to 1."
        )
    span = parse_hours(hours) if hours else None
    archive = archive_at(location) if location else open_archive(settings)
    archive.identity()  # refuses an archive of a later version
    migrations.migrate(settings, notify=click.echo)
    done = restore(settings, archive, span, _say, replace=replace)
    refused = refusals(done, asked_for=span is not None)
    for verdict in (Verdict.EXPIRED, Verdict.OPEN):
        passed_over = [
            hour for hour in done if hour.verdict is verdict and hour.what not in refused
        ]
        if passed_over:
            click.echo(
                f"{len(passed_over)} hours were skipped, which are {verdict.value}. The last one:"
                f" {passed_over[-1].what}"
            )
    if not refused or any(hour.verdict.in_clickhouse for hour in done):
        click.echo(_summary(done))
    if refused:
        raise StoreRefused(
            f"{len(refused)} {'is' if len(refused) == 1 else 'are'} not restored: "
            + " ".join(refused)
        )


def _summary(done: Sequence[Restored]) -> str:
    present = [hour for hour in done if hour.verdict.in_clickhouse]
    counts = Counter(hour.verdict for hour in present)
    how = ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items())
    sentence = (
        f"{sum(hour.rows for hour in present):,} rows of {len({hour.hour for hour in present})} hours are in ClickHouse;"
        f" counts and checksums agree{f' ({how})' if how else ''}."
    )
    if left := sum(hour.left for hour in present):
        sentence += f" {left:,} rows are left to the loader, which has not reached them yet."
    return sentence


def _say(hour: Restored) -> None:
    if hour.verdict.in_clickhouse:
        inserted = f"  {hour.inserted:,} inserted" if hour.inserted else ""
        click.echo(
            f"{hour.dataset}  {hour.hour:%Y-%m-%d %H:00} UTC  {hour.verdict.value}  {hour.rows:,} rows{inserted}"
            f"  checksum {hour.checksum}"
        )
