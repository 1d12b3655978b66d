"""Replay an archived hour: the best prices after every event, and a whole book at an instant.

    python examples/replay_hour.py data/parquet                   # the busiest market of the newest hour
    python examples/replay_hour.py data/parquet --ticker KXFED-27-T0.5

What a decision at an event may know is that event's row and those before it.
"""

import argparse
from datetime import datetime, timedelta

import polars as pl

from kalshi_platform.analytics import replay
from kalshi_platform.archive import Archive, archive_at


def best(archive: Archive, hour: datetime, tickers: list[str] | None) -> pl.DataFrame:
    """Yield the best bid and ask of verified books after every event, a few markets in memory at a time."""
    groups = (
        [replay.read(archive, hour, tickers)] if tickers else replay.read_in_groups(archive, hour)
    )
    tables = [pl.DataFrame(replay.after_events(books)) for books in groups]
    return pl.concat(tables).cast({"market_ticker": pl.String}).filter("verified")


def ladder(archive: Archive, hour: datetime, ticker: str, at: datetime) -> pl.DataFrame:
    """Return the whole book of a market at an instant: side, price in dollars, size in contracts."""
    books = replay.read(archive, hour, [ticker])
    levels = pl.DataFrame(replay.at_instants(books, [at])).cast({"side": pl.String})
    return levels.select("side", "price", "size").drop_nulls()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", help="a folder, or s3://bucket/prefix")
    parser.add_argument("--ticker", help="a market; default: the one with the most events")
    arguments = parser.parse_args()
    archive = archive_at(arguments.archive)
    hours = archive.hours("orderbook_events")
    if not hours:
        raise SystemExit(f"{archive} has no recorded hour.")
    hour = hours[-1]
    events = best(archive, hour, [arguments.ticker] if arguments.ticker else None)
    if events.is_empty():
        raise SystemExit(f"Nothing is recorded of it in the hour {hour:%Y-%m-%dT%H} UTC.")
    busiest = events.group_by("market_ticker").len().sort("len", "market_ticker").row(-1)[0]
    of_market = events.filter(pl.col("market_ticker") == busiest)
    print(f"{busiest}: {len(of_market)} events, the last")
    print(of_market.select("ingest_ts", "cause", "^yes_.*_1$").tail(5))
    print("and its book at the end of the hour")
    for side, price, size in ladder(
        archive, hour, busiest, hour + timedelta(hours=1, microseconds=-1)
    ).iter_rows():
        print(f"{side:<4} {price} {size}")


if __name__ == "__main__":
    main()
