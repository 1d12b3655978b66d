"""The market catalogue: the terms of the followed markets, read over REST and kept for good.

    $PARQUET_DIR/market_catalog/markets.parquet    every market ever catalogued, its newest state
    market_catalog in ClickHouse                   a row for each reading; FINAL gives the newest

It has no hours, so it is outside the hourly layout. A catalogued market is read again until it is
finalized, even after it left the market selection, so that its result is not missed. Nothing is written
where the exchange's response was incomplete. Which markets to record belongs in `market_selection`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform.archive import File, table_of
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.errors import StoreRefused
from kalshi_platform.exchange.answers import Market
from kalshi_platform.exchange.errors import ProtocolError
from kalshi_platform.exchange.numbers import PRICE_SCALE, QTY_SCALE, fixed_point
from kalshi_platform.exchange.rest import RestClient
from kalshi_platform.loading.presence import known_archive
from kalshi_platform.recorder.market_selection import selection_of
from kalshi_platform.schema import MARKET_CATALOG, NAME
from kalshi_platform.settings import Settings

FILE = "markets.parquet"
FINAL = "finalized"
"""The final status of a market."""
BACK = timedelta(hours=1)
"""Overlap: markets that closed up to this long before the last reading (at first: before now) are read again."""


@dataclass(frozen=True)
class Catalog:
    """One reading of the catalogue, in the columns of `market_catalog`."""

    read: pa.Table
    """The markets read this time."""
    known: pa.Table
    """These and all that were catalogued before, sorted by ticker."""
    new: int
    """How many markets were not catalogued before."""
    as_of: datetime


def take(settings: Settings, rest: RestClient) -> Catalog:
    """Read every market of the market selection, and catalogued ones that can still change.

    Raises: `ExchangeError` where the exchange does not return all of them, `StoreRefused` where the
    existing file cannot be read.
    """
    as_of = datetime.fromtimestamp(time.time(), UTC)
    before = _catalogued(settings)
    selection = selection_of(settings)
    newest = pc.max(before["as_of"]).as_py()
    since = int(((newest or as_of) - BACK).timestamp())
    listed: dict[str, Market] = {}

    def add(markets: Iterable[Market]) -> None:
        listed.update((market.ticker, market) for market in markets)

    # A market may trade past its close time, so the open ones are read, too.
    if selection.everything:
        add(rest.markets(min_close_ts=since, mve_filter="exclude"))
        add(rest.markets(status="open", mve_filter="exclude"))
    for series in selection.series:
        add(rest.markets(series_ticker=series, min_close_ts=since))
        add(rest.markets(series_ticker=series, status="open"))
    for event in sorted(selection.events):
        add(rest.markets(event_ticker=event))
    unfinished = before.filter(pc.not_equal(before["status"].cast(pa.string()), FINAL))
    by_name = [*selection.tickers, *unfinished["market_ticker"].cast(pa.string()).to_pylist()]
    add(rest.markets(tickers=[ticker for ticker in by_name if ticker not in listed]))
    read = _table(list(listed.values()), as_of)
    kept = pc.invert(
        pc.is_in(before["market_ticker"].cast(pa.string()), pa.array(list(listed), pa.string()))
    )
    known = pa.concat_tables([before.filter(kept), read]).unify_dictionaries()
    order = pc.sort_indices(known["market_ticker"].cast(pa.string()))
    return Catalog(read, known.take(order), known.num_rows - before.num_rows, as_of)


def store(settings: Settings, catalog: Catalog) -> File:
    """Write the file and insert the rows that ClickHouse lacks; return the file. Idempotent.

    A ClickHouse with fewer markets than the file (a new one) gets them all.

    Raises: what the stores raise.
    """
    file = known_archive(settings).write_whole(
        MARKET_CATALOG.name, FILE, catalog.known, level=9, sorted_by=("market_ticker",)
    )
    if not settings.use_clickhouse:
        return file
    name = MARKET_CATALOG.name
    with closing(clickhouse.connect(settings, log_comment=name)) as client:
        with clickhouse.translated():
            stored = client.query(f"SELECT uniqExact(market_ticker) FROM {name}").result_rows[0][0]  # noqa: S608 - the schema's own name
        incomplete = stored < catalog.known.num_rows - catalog.new
        rows = catalog.known if incomplete else catalog.read
        token = f"{name}:{catalog.as_of.isoformat()}:{rows.num_rows}"
        clickhouse.insert_arrow(client, name, rows, token)
    return file


def _catalogued(settings: Settings) -> pa.Table:
    schema = MARKET_CATALOG.arrow
    file = known_archive(settings).whole(MARKET_CATALOG.name, FILE)
    if file is None:
        return schema.empty_table()
    try:
        return table_of(file, schema)
    except StoreRefused as error:
        if error.name:  # the object store's refusal, with its own remedy
            raise
        raise StoreRefused(
            f"{file.path} cannot be read. Restore it from a backup; or move it away: then markets that the"
            " exchange no longer lists are missing from the new file."
        ) from None


def _table(markets: Sequence[Market], as_of: datetime) -> pa.Table:
    columns: dict[str, Callable[[Market], Any]] = {
        "market_ticker": lambda m: m.ticker,
        "event_ticker": lambda m: m.event_ticker,
        "series_ticker": lambda m: m.event_ticker.partition("-")[0],
        "title": lambda m: m.title,
        "yes_sub_title": lambda m: m.yes_sub_title,
        "market_type": lambda m: m.market_type,
        "status": lambda m: m.status,
        "result": lambda m: m.result,
        "open_time": lambda m: m.open_time,
        "close_time": lambda m: m.close_time,
        "latest_expiration_time": lambda m: m.latest_expiration_time,
        "settlement_ts": lambda m: m.settlement_ts,
        "settlement_value": lambda m: _exact(m, m.settlement_value_dollars, PRICE_SCALE),
        "price_level_structure": lambda m: m.price_level_structure,
        "price_ranges": _ranges,
        "last_price": lambda m: _exact(m, m.last_price_dollars, PRICE_SCALE),
        "volume": lambda m: _exact(m, m.volume_fp, QTY_SCALE),
        "open_interest": lambda m: _exact(m, m.open_interest_fp, QTY_SCALE),
        "as_of": lambda _: as_of,
    }
    arrays = []
    for field in MARKET_CATALOG.arrow:
        values = [columns[field.name](market) for market in markets]
        plain = pa.string() if field.type == NAME else field.type
        arrays.append(pa.array(values, plain).cast(field.type))
    return pa.Table.from_arrays(arrays, schema=MARKET_CATALOG.arrow)


def _ranges(market: Market) -> list[dict[str, Decimal | None]]:
    return [
        {
            "start": _exact(market, grid.start, PRICE_SCALE),
            "end": _exact(market, grid.end, PRICE_SCALE),
            "step": _exact(market, grid.step, PRICE_SCALE),
        }
        for grid in market.price_ranges or ()
    ]


def _exact(market: Market, text: str | None, scale: int) -> Decimal | None:
    if text is None:
        return None
    try:
        return Decimal(fixed_point(text, scale)).scaleb(-scale)
    except ValueError as error:
        raise ProtocolError(
            f"The exchange lists {market.ticker} with a number that cannot be stored: {error}."
        ) from None
