"""Compare recorded books with the exchange's REST books.

REST books are cached for up to 15 s, so only levels that did not change during that time can be compared:
a level without an event from well before the request until after the answer must be equal on both sides.
The streamer requests the books, writes a `mismatch` row for each difference and requests a new snapshot.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl
import pyarrow as pa

from kalshi_platform.exchange.numbers import ONE_DOLLAR, contracts, dollars, price_units, qty_units
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.rows import Rows
from kalshi_platform.schema import LATEST_LEVELS

CACHE_S = 20.0
"""The exchange's cache (15 s), plus some seconds for the difference of the clocks and the latency."""
KEEP_S = 90.0
"""How long changed levels are remembered; a comparison that takes longer is abandoned."""
SAMPLE = 100
"""Markets of one comparison: what one REST request returns."""
MIRRORED = 0.75
"""Share of the no bids that must equal the exchange's at 1 - p; as read, at most the rest may."""

Wire = Mapping[str, Sequence[tuple[str, str]]]
"""A REST book: by side, (price in dollars, contracts)."""


@dataclass(frozen=True)
class Mismatch:
    """One level that differs from the exchange's."""

    market_ticker: str
    side: str
    price: str
    ours: str
    theirs: str


@dataclass(frozen=True)
class Round:
    """The result of one comparison."""

    markets: int
    levels: int
    mismatches: tuple[Mismatch, ...]
    yes_price: bool | None = None
    """Whether the stream quotes no bids on the YES scale, if that is not how they are read; None otherwise."""


class Recent:
    """The loader's newest books, and the levels that changed lately. Shared between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state = BookState()
        self._touched: deque[tuple[int, pa.Table]] = deque()

    def saw(self, rows: Rows, state: BookState) -> None:
        """Take the rows that the loader has built, and the state after them."""
        levels = rows.tables[LATEST_LEVELS.name]
        with self._lock:
            self._state = state
            if levels.num_rows:
                columns = ["market_ticker", "side", "price", "ingest_ts"]
                self._touched.append((state.version, levels.select(columns)))
            horizon = state.version - int(KEEP_S * 1e9)
            while self._touched and self._touched[0][0] < horizon:
                self._touched.popleft()

    @property
    def state(self) -> BookState:
        """The books after the newest rows."""
        with self._lock:
            return self._state

    def touched_since(self, since_ns: int) -> pl.DataFrame:
        """Return levels with an event since then: market_ticker, side, price (1e-4 dollars)."""
        with self._lock:
            tables = [table for newest, table in self._touched if newest >= since_ns]
        schema = {"market_ticker": pl.String, "side": pl.String, "price": pl.Int64}
        if not tables:
            return pl.DataFrame(schema=schema)
        levels = pl.concat(
            [
                pl.DataFrame(t).with_columns(pl.col("market_ticker", "side").cast(pl.String))
                for t in tables
            ]
        )
        at = pl.lit(since_ns // 1000).cast(pl.Datetime("us", "UTC"))
        return (
            levels.filter(pl.col("ingest_ts") >= at)
            .select("market_ticker", "side", (pl.col("price") * 10_000).cast(pl.Int64))
            .unique()
        )


def comparable(state: BookState, offset: int) -> list[str]:
    """Return the markets of the comparison that starts at `offset`: verified books, in turn."""
    verified = sorted(ticker for ticker, book in state.books.items() if book.verified)
    if not verified:
        return []
    start = offset % len(verified)
    return (verified[start:] + verified[:start])[:SAMPLE]


def compare(recent: Recent, since_ns: int, books: Mapping[str, Wire]) -> Round:
    """Compare the exchange's books with ours, at levels without an event since `since_ns`.

    Call it when our state is later than the answer.
    """
    state = recent.state
    tickers = [t for t in books if (book := state.books.get(t)) is not None and book.verified]
    key = ["market_ticker", "side", "price"]
    theirs = pl.DataFrame(
        [
            (ticker, side, price_units(price), qty_units(size))
            for ticker in tickers
            for side, levels in books[ticker].items()
            for price, size in levels
        ],
        schema={
            "market_ticker": pl.String,
            "side": pl.String,
            "price": pl.Int64,
            "theirs": pl.Int64,
        },
        orient="row",
    )
    ours = state.levels.filter(pl.col("market_ticker").is_in(tickers)).select(
        *key, pl.col("size").alias("ours")
    )
    unchanged = _joined(ours, theirs).join(recent.touched_since(since_ns), on=key, how="anti")
    differing = unchanged.filter(pl.col("ours") != pl.col("theirs")).sort(key)
    return Round(
        len(tickers),
        unchanged.height,
        tuple(
            Mismatch(t, side, dollars(price), contracts(our), contracts(their))
            for t, side, price, our, their in differing.select(*key, "ours", "theirs").iter_rows()
        ),
        None if differing.is_empty() else _sent_scale(state, tickers, ours, theirs),
    )


def _joined(ours: pl.DataFrame, theirs: pl.DataFrame) -> pl.DataFrame:
    """Join both sizes of every level; 0 if there is none."""
    return ours.join(
        theirs, on=["market_ticker", "side", "price"], how="full", coalesce=True
    ).with_columns(pl.col("ours", "theirs").fill_null(0))


def _sent_scale(
    state: BookState, tickers: Sequence[str], ours: pl.DataFrame, theirs: pl.DataFrame
) -> bool | None:
    """Find out whether the stream quotes no bids on the other scale than the one they are read on.

    That is so where most of them differ from REST's, and at 1 - p nearly all agree. Snapshots cannot show it if a
    book has no bids only near its best one: such a book is crossed on neither scale. Levels that changed lately
    are included, because every level has while mismatches make capture request snapshots repeatedly.

    Returns:
        Whether the stream is on the YES scale; None: it is as it is read, or the books do not show it.
    """
    of_no = pl.col("side") == "no"
    ours, theirs = ours.filter(of_no), theirs.filter(of_no)
    mirrored = ours.with_columns(price=ONE_DOLLAR - pl.col("price"))
    conns = {state.books[ticker].conn for ticker in tickers}
    use_yes_price = {
        state.connections[conn].use_yes_price for conn in conns & state.connections.keys()
    }
    if len(use_yes_price) != 1 or ours.is_empty():
        return None
    found = _agreeing(mirrored, theirs) >= MIRRORED and _agreeing(ours, theirs) <= 1 - MIRRORED
    return not use_yes_price.pop() if found else None


def _agreeing(ours: pl.DataFrame, theirs: pl.DataFrame) -> float:
    """The share of the levels that have the same size on both sides."""
    levels = _joined(ours, theirs)
    return levels.filter(pl.col("ours") == pl.col("theirs")).height / levels.height


def window_start_ns() -> int:
    """Return the instant from which on changed levels are not compared: now, minus the cache's time."""
    return time.time_ns() - int(CACHE_S * 1e9)
