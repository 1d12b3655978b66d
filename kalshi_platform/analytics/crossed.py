"""Find crossed books in rows of `spreads`: the best YES bid at or above the best YES ask for longer than a limit.

Pure; the check that reads both stores is `quality.crossed_books`.
"""

from __future__ import annotations

from datetime import datetime

import polars as pl

COLUMNS = (
    "market_ticker",
    "conn_id",
    "sid",
    "seq",
    "ts",
    "ingest_ts",
    "verified",
    "yes_bid",
    "yes_ask",
)
"""The columns of `spreads` that `lasting` needs."""


def lasting(states: pl.DataFrame, until: datetime, longer_than_s: float) -> pl.DataFrame:
    """Return runs of crossed states that lasted for more than `longer_than_s` seconds of receive time, the longest first.

    `states` are rows of `spreads` (COLUMNS), each market's in their order. A state holds until the
    market's next row, but not beyond its hour, since hours are computed separately, nor beyond `until`. It is
    crossed if yes_bid >= yes_ask, neither is null, and the book is verified. The deltas of one matching event
    share the exchange time `ts`: a state that is followed by another of the same `ts` is transient and does
    not count.

    One row per run: market_ticker, since, lasted_s, lasts (whether it holds at `until`), and of its
    first state yes_bid, yes_ask, conn_id, sid, seq.
    """
    followed = pl.col("ts").shift(-1).over("market_ticker")
    settled = states.filter((followed != pl.col("ts")).fill_null(value=True))
    crossed = (pl.col("verified") & (pl.col("yes_bid") >= pl.col("yes_ask"))).fill_null(value=False)
    ends = pl.min_horizontal(
        pl.col("ingest_ts").shift(-1).over("market_ticker"),
        pl.col("ingest_ts").dt.truncate("1h").dt.offset_by("1h"),
        pl.lit(until).cast(pl.Datetime("us", "UTC")),
    )
    run = (pl.col("crossed") != pl.col("crossed").shift(1)).fill_null(value=True)
    return (
        settled.with_columns(crossed=crossed, ends=ends)
        .with_columns(run=run.cast(pl.UInt32).cum_sum().over("market_ticker"))
        .filter("crossed")
        .group_by("market_ticker", "run", maintain_order=True)
        .agg(
            pl.col("ingest_ts").first().alias("since"),
            (
                (pl.col("ends").last() - pl.col("ingest_ts").first()).dt.total_microseconds() / 1e6
            ).alias("lasted_s"),
            (pl.col("ends").last() == until).alias("lasts"),
            *(pl.col(name).first() for name in ("yes_bid", "yes_ask", "conn_id", "sid", "seq")),
        )
        .filter(pl.col("lasted_s") > longer_than_s)
        .drop("run")
        .sort(["lasted_s", "market_ticker", "since"], descending=[True, False, False])
    )
