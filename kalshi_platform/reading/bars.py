"""Bars: what a market did in each interval, labelled with the interval's end, at which the whole bar is known."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import polars as pl

from kalshi_platform.reading.arguments import EPOCH
from kalshi_platform.reading.rows import KNOWN, TICKER, VERIFIED

AT = "at"
_US = pl.Datetime("us", "UTC")


def bars(
    top: pl.DataFrame,
    trades: pl.DataFrame,
    tickers: Sequence[str],
    *,
    start: datetime,
    end: datetime,
    every: timedelta,
) -> pl.DataFrame:
    """Make the bars of a span.

    An interval holds what became known from its beginning to before its end; intervals are counted from 1970-01-01, and
    the first and the last are cut at the span. Of the book only states count that are verified and lasted for some time.

        open, close    the mid at the interval's beginning and just before its end
        spread, imbalance    the mean, weighted by time: (bid - ask) / (bid + ask) of the sizes at the best prices

    Args:
        top: Changes of the top of the book, the state at `start` first.
        trades: Trades of the span, with `known_at`.
        tickers: The markets.
        start: The first instant.
        end: The instant after the last.
        every: The length of an interval.

    Returns:
        One row for each market and interval, with a column `at`: the interval's end.
    """
    edges = _edges(start, end, every)
    grid = pl.DataFrame({TICKER: sorted(tickers)}).join(
        pl.DataFrame({"begins": edges[:-1], AT: edges[1:]}), how="cross"
    )
    states = _states(top, grid, end)
    weight = pl.col("lasts")
    with_spread = pl.col("spread").is_not_null()
    with_sizes = pl.col("imbalance").is_not_null()
    of_book = states.group_by(TICKER, "begins", maintain_order=True).agg(
        pl.col("mid").drop_nulls().first().alias("open"),
        pl.col("mid").max().alias("high"),
        pl.col("mid").min().alias("low"),
        pl.col("mid").drop_nulls().last().alias("close"),
        _mean("spread", weight, with_spread),
        _mean("imbalance", weight, with_sizes),
        (pl.col("lasts").sum() / 1e6).alias("verified_s"),
    )
    begins = pl.Series("begins", edges[:-1])
    of_trades = (
        trades.sort(KNOWN, maintain_order=True)
        .join_asof(
            pl.DataFrame({"begins": begins}),
            left_on=KNOWN,
            right_on="begins",
            check_sortedness=False,
        )
        .group_by(TICKER, "begins", maintain_order=True)
        .agg(
            pl.col("yes_price").first().alias("trade_open"),
            pl.col("yes_price").max().alias("trade_high"),
            pl.col("yes_price").min().alias("trade_low"),
            pl.col("yes_price").last().alias("trade_close"),
            pl.col("qty").sum().alias("volume"),
            pl.len().cast(pl.Int64).alias("trades"),
        )
    )
    found = grid.join(of_book, on=[TICKER, "begins"], how="left")
    found = found.join(of_trades, on=[TICKER, "begins"], how="left").sort(TICKER, AT)
    return found.drop("begins").with_columns(pl.col("volume", "trades", "verified_s").fill_null(0))


def _edges(start: datetime, end: datetime, every: timedelta) -> pl.Series:
    first = EPOCH + ((start - EPOCH) // every + 1) * every
    inner = pl.Series([], dtype=_US)
    if first < end:
        inner = pl.datetime_range(first, end, every, closed="left", eager=True, time_unit="us")
    ends = [pl.Series([at], dtype=_US) for at in (start, end)]
    return pl.concat([ends[0], inner, ends[1]])


def _states(top: pl.DataFrame, grid: pl.DataFrame, end: datetime) -> pl.DataFrame:
    """Return the states with the time that each lasted, cut at the intervals' edges; states that are not verified are left out."""
    columns = [TICKER, KNOWN, VERIFIED, "mid", "spread", "yes_bid_size", "yes_ask_size"]
    rows = top.select(columns).sort(KNOWN, maintain_order=True)
    cut = grid.select(TICKER, pl.col("begins").alias(AT)).join_asof(
        rows, left_on=AT, right_on=KNOWN, by=TICKER, check_sortedness=False
    )
    cut = cut.with_columns(pl.col(AT).alias(KNOWN)).select(columns).drop_nulls(VERIFIED)
    first = grid["begins"].min()
    rows = pl.concat([rows.filter(pl.col(KNOWN) > first), cut.sort(KNOWN, maintain_order=True)])
    # A state that begins at an edge comes after the one that is cut there, which then lasts no time.
    rows = rows.with_columns(pl.int_range(pl.len()).alias("order"))
    number_of_changes = rows.height - cut.height
    rows = rows.with_columns((pl.col("order") < number_of_changes).alias("change"))
    rows = rows.sort(TICKER, KNOWN, "change", "order")
    until = pl.col(KNOWN).shift(-1).over(TICKER).fill_null(end)
    rows = rows.with_columns((until - pl.col(KNOWN)).dt.total_microseconds().alias("lasts"))
    rows = rows.filter((pl.col("lasts") > 0) & pl.col(VERIFIED))
    bid, ask = (pl.col(f"yes_{side}_size").cast(pl.Float64).fill_null(0) for side in ("bid", "ask"))
    rows = rows.with_columns(
        pl.when(bid + ask > 0).then((bid - ask) / (bid + ask)).alias("imbalance"),
        pl.col("spread").cast(pl.Float64),
    )
    edges = grid.select("begins").unique().sort("begins")
    return rows.sort(KNOWN, maintain_order=True).join_asof(
        edges, left_on=KNOWN, right_on="begins", check_sortedness=False
    )


def _mean(name: str, weight: pl.Expr, where: pl.Expr) -> pl.Expr:
    total = weight.filter(where).sum()
    value = (pl.col(name) * weight).filter(where).sum()
    return pl.when(total > 0).then(value / total).alias(name)
