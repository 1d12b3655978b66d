"""Find verified books that have been crossed for longer than any matching event takes.

Two sources, both cheap. For past hours, once computed, `spreads` has every state. For the current hour, the
events of those markets that are crossed now (`latest_levels`) are replayed from the hour's start, which shows
since when they are crossed, and whether they are verified. The definition is in `analytics.crossed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import polars as pl
import pyarrow as pa

from kalshi_platform.analytics.books import EVENT_COLUMNS, books
from kalshi_platform.analytics.crossed import COLUMNS, lasting
from kalshi_platform.analytics.spreads import spreads
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.clickhouse import queries
from kalshi_platform.loading.rebuild import as_archived, select_list
from kalshi_platform.quality.continuity import Extent, ask
from kalshi_platform.schema import (
    BOOK_CHECKPOINTS,
    ORDERBOOK_EVENTS,
    STREAM_EVENTS,
    Dataset,
)
from kalshi_platform.utc_hours import floor_hour

LONGER_THAN_S = 5.0
"""Seconds for which a book may be crossed: an event's deltas come within milliseconds."""
LOOK_BACK = timedelta(hours=3)
"""How long a crossed state of a computed hour is reported."""
REPLAYED_AT_A_TIME = 200
"""Markets that are replayed at a time."""


def crossed_books(client: clickhouse.Client, hot: Extent) -> list[dict[str, object]]:
    """Return runs of crossed states of verified books, the longest first, with the columns of `analytics.crossed.lasting`."""
    until = hot.newest
    crossed_now = [row["market_ticker"] for row in ask(client, "checks/crossed_now")]
    hour = floor_hour(until)
    found = [lasting(_recorded(client, until - LOOK_BACK, hour), hour, LONGER_THAN_S)]
    for first in range(0, len(crossed_now), REPLAYED_AT_A_TIME):
        states = _replayed(client, hour, crossed_now[first : first + REPLAYED_AT_A_TIME])
        found.append(lasting(states, until, LONGER_THAN_S).filter("lasts"))
    return pl.concat(found).sort("lasted_s", descending=True).to_dicts()


def _recorded(client: clickhouse.Client, since: datetime, until: datetime) -> pl.DataFrame:
    with clickhouse.translated():
        rows = client.query_arrow(
            queries.text("checks/crossed_recorded"), parameters={"since": since, "until": until}
        )
    return _states(pl.DataFrame(rows))


def _replayed(client: clickhouse.Client, hour: datetime, tickers: Sequence[str]) -> pl.DataFrame:
    """Return every state of these markets since the start of the current hour."""

    def rows(dataset: Dataset) -> pa.Table:
        wanted = "market_ticker IN {tickers:Array(String)}"
        if dataset is STREAM_EVENTS:
            wanted += " OR market_ticker = ''"  # events of whole subscriptions
        with clickhouse.translated():
            return client.query_arrow(
                f"SELECT {select_list(dataset)} FROM {dataset.name}"  # noqa: S608 - schema's names
                f" WHERE {dataset.time} >= {{since:DateTime64(6, 'UTC')}} AND ({wanted})",
                parameters={"since": hour, "tickers": list(tickers)},
            )

    events = as_archived(rows(ORDERBOOK_EVENTS), ORDERBOOK_EVENTS)
    of_hour = books(
        hour,
        [events.select(EVENT_COLUMNS)],
        [as_archived(rows(BOOK_CHECKPOINTS), BOOK_CHECKPOINTS)],
        [as_archived(rows(STREAM_EVENTS), STREAM_EVENTS)],
    )
    return _states(pl.DataFrame(spreads(of_hour)))


def _states(table: pl.DataFrame) -> pl.DataFrame:
    return table.select(COLUMNS).with_columns(
        pl.col("market_ticker", "conn_id").cast(pl.String),
        pl.col("verified").cast(pl.Boolean),
        pl.col("ts", "ingest_ts").cast(pl.Datetime("us", "UTC")),
        pl.col("sid").cast(pl.UInt32),
    )
