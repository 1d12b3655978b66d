"""Export for hftbacktest 2.4: one event array for each market and UTC day, and the book at the day's end.

    DIR/{TICKER}_{YYYYMMDD}.npz          `data`: the day's events
    DIR/{TICKER}_{YYYYMMDD}_eod.npz      `data`: the book at its end, the next day's `initial_snapshot`
    DIR/{TICKER}.json                    tick and lot size, gaps, terms, fees, result

A row is of the exchange and of the local side at once: both times never decrease. A snapshot is a `DEPTH_CLEAR_EVENT`
for each side and a `DEPTH_SNAPSHOT_EVENT` for each level; the first day begins with one. A stale book is cleared. Bids are
YES bids, asks are YES asks; a trade's side is the taker's. The engine itself is not needed to write them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kalshi_platform import durable
from kalshi_platform.exchange.numbers import ONE_DOLLAR
from kalshi_platform.reading.archive import Archive
from kalshi_platform.reading.arguments import EPOCH, microseconds_of, span, ticker_of
from kalshi_platform.reading.events import EventKind
from kalshi_platform.reading.exporters import sidecar
from kalshi_platform.reading.exporters.levels import BookChange, Level, YesBook, changes

DEPTH_EVENT, TRADE_EVENT, DEPTH_CLEAR_EVENT, DEPTH_SNAPSHOT_EVENT = 1, 2, 3, 4
BUY, SELL = 1 << 29, 1 << 28
BOTH = 1 << 31 | 1 << 30
"""The event is seen by the exchange and by the local side."""
EVENT = np.dtype(
    [
        *(("ev", "u8"), ("exch_ts", "i8"), ("local_ts", "i8"), ("px", "f8"), ("qty", "f8")),
        *(("order_id", "u8"), ("ival", "i8"), ("fval", "f8")),
    ],
    align=True,
)
"""hftbacktest's `event_dtype`."""
LOT_SIZE = 0.01
DAY_US = 86_400_000_000
Row = tuple[int, int, int, float, float]


@dataclass(frozen=True)
class Day:
    """The files of one market and day."""

    date: str
    events: Path
    end_of_day: Path
    rows: int


@dataclass(frozen=True)
class Exported:
    """What was written."""

    days: tuple[Day, ...]
    sidecar: Path
    tick_size: float
    lot_size: float


def export(
    archive: Archive, ticker: str, start: datetime, end: datetime, folder: str | Path
) -> Exported:
    """Write a market's days for hftbacktest. Spans that are not synced become a cleared book.

    Args:
        archive: The archive.
        ticker: The market.
        start: The first instant, in receive time.
        end: The instant after the last.
        folder: Where to write; made if it is not there.

    Returns:
        The files, and tick and lot size for the engine.

    Raises:
        RequestRefused: An argument is wrong, or the archive has nothing of it; the sentence says what to do.
        StoreError: The archive cannot be read.
    """
    name, when, target = ticker_of(ticker), span(start, end), Path(folder)
    terms = sidecar.terms_of(archive, name)
    target.mkdir(parents=True, exist_ok=True)
    tick, days = terms.tick, []
    by_day = groupby(changes(archive, name, *when), key=lambda change: change.known_us // DAY_US)
    book = YesBook()
    for day, made in by_day:
        rows, grid = _rows_of_day(made, book)
        tick = math.gcd(tick, grid)
        date = f"{EPOCH + timedelta(days=day):%Y%m%d}"
        ends_us = min((day + 1) * DAY_US, microseconds_of(when[1]))
        events = target / f"{name}_{date}.npz"
        end_of_day = target / f"{name}_{date}_eod.npz"
        _save(events, rows)
        _save(end_of_day, _snapshot(book, ends_us))
        days.append(Day(date, events, end_of_day, len(rows)))
    path = target / f"{name}.json"
    tick_size = tick / ONE_DOLLAR
    sidecar.write(
        path,
        archive,
        terms,
        when,
        [
            {
                "date": one.date,
                "events": one.events.name,
                "end_of_day": one.end_of_day.name,
                "rows": one.rows,
            }
            for one in days
        ],
        engine="hftbacktest 2.4",
        tick_size=tick_size,
        lot_size=LOT_SIZE,
    )
    return Exported(tuple(days), path, tick_size, LOT_SIZE)


def _rows_of_day(made: Iterable[BookChange], book: YesBook) -> tuple[npt.NDArray[np.void], int]:
    """Return the day's rows, and the greatest step that divides all prices; apply them to the book."""
    rows: list[Row] = []
    grid = 0
    for change in made:
        rows += rows_of(change)
        book.apply(change)
        grid = math.gcd(grid, change.event.price_units, *(level.price for level in change.levels))
    return _array(rows), grid


def rows_of(change: BookChange) -> Iterator[Row]:
    """Return the rows of one change: flags, exchange time and receive time in ns, price, size."""
    times = (change.exchange_us * 1000, change.known_us * 1000)
    if change.event.kind is EventKind.TRADE:
        buys = change.event.side == "yes"
        units = change.event.price_units
        price = units if buys else ONE_DOLLAR - units
        side = BUY if buys else SELL
        yield TRADE_EVENT | BOTH | side, *times, price / ONE_DOLLAR, change.event.qty_units / 100
        return
    if change.whole:
        yield DEPTH_CLEAR_EVENT | BOTH | BUY, *times, 0.0, 0.0
        yield DEPTH_CLEAR_EVENT | BOTH | SELL, *times, 1.0, 0.0
    kind = DEPTH_SNAPSHOT_EVENT if change.whole else DEPTH_EVENT
    for level in change.levels:
        yield _row_of(level, kind, *times)


def _row_of(level: Level, kind: int, exchange_ns: int, local_ns: int) -> Row:
    side = BUY if level.bid else SELL
    return kind | BOTH | side, exchange_ns, local_ns, level.price / ONE_DOLLAR, level.size / 100


def _snapshot(book: YesBook, us: int) -> npt.NDArray[np.void]:
    return _array(
        [_row_of(level, DEPTH_SNAPSHOT_EVENT, us * 1000, us * 1000) for level in book.levels()]
    )


def _array(rows: list[Row]) -> npt.NDArray[np.void]:
    found = np.zeros(len(rows), dtype=EVENT)
    if rows:
        for name, values in zip(EVENT.names or (), zip(*rows, strict=True), strict=False):
            found[name] = values
    return found


def _save(path: Path, rows: npt.NDArray[np.void]) -> None:
    """Write an array as the engine loads it, whole or not at all."""
    content = io.BytesIO()
    np.savez_compressed(content, data=rows)
    durable.replace(path, content.getvalue())
