"""Compute the time-weighted spread of each market over an archived hour, with Polars.

    python examples/hour_spreads.py data/parquet                  # the newest hour
    python examples/hour_spreads.py s3://bucket/prefix 2026-11-22T14

Runs beside a recording: an archive is read without a lock, and each row is there once.
"""

import argparse
from datetime import UTC, datetime

import polars as pl

from kalshi_platform.archive import Archive, archive_at

COLUMNS = ["market_ticker", "known_at", "verified", "spread"]


def spreads(archive: Archive, hour: datetime) -> pl.DataFrame:
    """Return the mean spread in dollars and the seconds with a verified spread, by market, the widest first."""
    rows = pl.concat([pl.DataFrame(table) for table in archive.read("spreads", hour, COLUMNS)])
    rows = rows.cast({"market_ticker": pl.String, "spread": pl.Float64})
    # A row holds until the market's next one. What is not verified counts for the time, and not for the mean.
    until = pl.col("known_at").shift(-1).over("market_ticker", order_by="known_at")
    held = (until - pl.col("known_at")).dt.total_seconds(fractional=True)
    rows = rows.with_columns(held.alias("seconds")).filter("verified").drop_nulls()
    mean = (pl.col("spread") * pl.col("seconds")).sum() / pl.col("seconds").sum()
    return (
        rows.group_by("market_ticker")
        .agg(mean.alias("spread"), pl.col("seconds").sum())
        .sort("spread", "market_ticker", descending=[True, False])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", help="a folder, or s3://bucket/prefix")
    parser.add_argument(
        "hour", nargs="?", help="such as 2026-11-22T14, in UTC; default: the newest"
    )
    arguments = parser.parse_args()
    archive = archive_at(arguments.archive)
    hours = archive.hours("spreads")
    if not hours:
        raise SystemExit(
            f"{archive} has no hour of spreads. Dagster computes one when it is sealed."
        )
    hour = (
        datetime.fromisoformat(arguments.hour).replace(tzinfo=UTC) if arguments.hour else hours[-1]
    )
    if hour not in hours:
        raise SystemExit(f"{archive} has no spreads of {hour:%Y-%m-%dT%H} UTC.")
    for ticker, spread, seconds in spreads(archive, hour).iter_rows():
        print(f"{ticker:<32} {spread:.4f} dollars over {seconds:.0f} s")


if __name__ == "__main__":
    main()
