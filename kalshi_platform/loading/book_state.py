"""The state of connections and books that building rows carries from one journal range to the next.

Tens of thousands of markets have millions of levels, of which a range touches few. So a level is packed into
one integer, its size into another, and a market is a small number; `BookState.levels` has the named columns.
Consecutive states share unchanged levels (`Ladders`). Saving a state belongs in `state_files`, changing it in
`rows`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Self

import msgspec
import numpy as np
import numpy.typing as npt
import polars as pl

from kalshi_platform.journal.clock import ReceiveClock
from kalshi_platform.loading.market_clocks import MarketClocks
from kalshi_platform.loading.sorted_levels import PACKED, PACKED_BYTES, SortedLevels
from kalshi_platform.loading.wire_drift import WireState

LEVELS = pl.Schema(
    {
        "conn": pl.String,
        "market_ticker": pl.String,
        "market_id": pl.String,
        "side": pl.String,
        "price": pl.Int64,
        "size": pl.Int64,
    }
)
_PRICES = 1 << 14
"""More than ONE_DOLLAR: prices as digits of a composite key."""
_OF_MARKET = 2 * _PRICES
RECENT_LEVELS = 1 << 15
RECENT_SHARE = 8
"""Changed levels are kept apart until they exceed RECENT_LEVELS and one RECENT_SHARE-th of all levels."""


class Book(msgspec.Struct, frozen=True, omit_defaults=True):
    """The state of one market's latest book, without its levels."""

    conn: str
    sid: int
    market_id: str
    based: bool
    """It began with a snapshot. A book without one has only the changes since its first delta."""
    verified: bool
    """The book is synced: it has a snapshot, no gap since, and its connection is open."""
    left: bool = False
    """No longer followed; further frames were in flight."""
    ended_ns: int = 0
    """When it was left or its connection ended, by a monotonic receive time; 0: neither."""
    stale_ns: int = 0
    """Receive time from which on it is stale; 0 where it is synced, or where that is not known."""
    unchanged: bool | None = None
    """While its connection is resyncing: whether the clocks proved it unchanged; None if they cannot say."""


class LostRecords(msgspec.Struct, frozen=True):
    """Lost journal records that may include frames of a connection."""

    since_ns: int
    """Receive time of the last record before them."""
    last: dict[int, int]
    """The last sequence number of each sid before them, until its next frame shows what was lost."""


class OpenGap(msgspec.Struct, frozen=True):
    """A gap of a sid after which not every book has had a snapshot yet."""

    expected: int
    got: int
    since_ns: int
    markets: int
    waiting: frozenset[str]

    def key(self) -> Hashable:
        """Equal for equal gaps."""
        return self.expected, self.got, self.waiting


class Connection(msgspec.Struct, frozen=True):
    """An open connection."""

    use_yes_price: bool
    last_recv_ns: int
    seqs: dict[int, int]
    """The last sequence number of each sid."""
    lost: LostRecords | None = None
    gaps: dict[int, OpenGap] = {}
    """By sid, the gaps found through lost records; capture closes its own gaps."""
    resyncing: bool = False
    """It replaces another connection, or has a gap, and not every book has had a snapshot since."""

    def has_all_frames(self, sid: int) -> bool:
        """Whether no frame of the sid can be among lost records."""
        return self.lost is None or sid not in self.lost.last


@dataclass(frozen=True)
class Ladders:
    """The levels of all books, sizes other than 0; `level` as `level_number` has it."""

    base: SortedLevels = field(default_factory=SortedLevels)
    """The levels that consecutive states share, fully or mostly."""
    recent: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=PACKED))
    """Levels that differ from `base`, unordered; size 0 where a level of `base` is gone."""

    @property
    def height(self) -> int:
        """The approximate number of levels."""
        return self.base.height + self.recent.height

    def all(self) -> pl.DataFrame:
        """Every level with its size, sorted."""
        return pl.concat([pl.DataFrame(schema=PACKED), *self.parts()]).rechunk()

    def parts(self) -> Iterator[pl.DataFrame]:
        """Every level with its size, sorted, in batches."""
        return self.base.parts(self.recent.sort("level"))

    def heights(self, markets: pl.Series) -> npt.NDArray[np.int64]:
        """The number of levels of each of these markets (given as numbers)."""
        recent = self.recent.sort("level")
        level, stands = recent["level"].to_numpy(), (recent["size"] != 0).to_numpy()
        known = self.base.find(level + 1) - self.base.find(level)
        more = np.concatenate([[0], np.cumsum(stands.astype(np.int64) - known)])
        lowest = markets.to_numpy() * _OF_MARKET
        order = np.argsort(lowest)
        spans = np.empty(len(lowest), np.int64)
        spans[order] = _widths(self.base, lowest[order])
        heights: npt.NDArray[np.int64] = (
            spans
            + more[np.searchsorted(level, lowest + _OF_MARKET)]
            - more[np.searchsorted(level, lowest)]
        )
        return heights

    def of(self, levels: pl.Series, markets: pl.Series) -> pl.DataFrame:
        """The existing ones among `levels`, and all levels of `markets` (given as numbers)."""
        level = pl.col("level")
        whole = market_of(level).is_in(markets.implode())
        others = pl.DataFrame({"level": levels}).filter(~whole)["level"].unique().sort()
        lowest = markets.unique().sort().to_numpy() * _OF_MARKET
        positions = [self.base.has(others.to_numpy()), _spans(self.base, lowest)]
        shared = self.base.take(np.sort(np.concatenate(positions)))
        changed = self.recent.filter(level.is_in(others.implode()) | whole)
        return pl.concat(
            [
                shared.filter(~level.is_in(changed["level"].implode())),
                changed.filter(pl.col("size") != 0),
            ]
        )

    def changed(self, levels: pl.DataFrame, renewed: pl.Series) -> Ladders:
        """Ladders with these sizes, 0 for dropped levels; all other levels of the markets `renewed` are dropped."""
        level = pl.col("level")
        gone = self.of(levels["level"].clear(), renewed)
        gone = gone.filter(~level.is_in(levels["level"].implode())).with_columns(
            pl.lit(0, pl.Int64).alias("size")
        )
        newest = pl.concat([gone, levels.select(PACKED.names())])
        recent = pl.concat(
            [self.recent.filter(~level.is_in(newest["level"].implode())), newest]
        ).rechunk()
        if recent.height > max(RECENT_LEVELS, self.base.height // RECENT_SHARE):
            return Ladders(self.base.changed(recent.sort("level")))
        return Ladders(self.base, recent)


def _widths(base: SortedLevels, lowest: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The numbers of levels of the markets with these lowest possible levels, ascending."""
    return base.find(lowest + _OF_MARKET) - base.find(lowest)


def _spans(base: SortedLevels, lowest: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The positions of the levels of the markets with these lowest possible levels, ascending."""
    count = _widths(base, lowest)
    spans: npt.NDArray[np.int64] = np.repeat(base.find(lowest) - np.cumsum(count) + count, count)
    return spans + np.arange(len(spans))


@dataclass(frozen=True)
class BookState:
    """Everything on which the rows of the next range depend."""

    n: int = 0
    """The next journal record."""
    clock: ReceiveClock = field(default_factory=ReceiveClock)
    connections: dict[str, Connection] = field(default_factory=dict)
    books: dict[str, Book] = field(default_factory=dict)
    """By market ticker."""
    numbers: dict[str, int] = field(default_factory=dict)
    """The number of each of these markets."""
    ladders: Ladders = field(default_factory=Ladders)
    partial: frozenset[str] = frozenset()
    """Open connections whose beginning was not read: some of their books may be missing here."""
    clocks: MarketClocks = field(default_factory=MarketClocks)
    hours: tuple[int, ...] = ()
    """The latest hours with records, in hours since the epoch."""
    wire: WireState | None = field(default_factory=WireState)
    """None after a state that an earlier version saved, until the next hour."""

    @classmethod
    def of(
        cls,
        n: int,
        clock: ReceiveClock,
        connections: dict[str, Connection],
        books: dict[str, Book],
        levels: pl.DataFrame,
    ) -> Self:
        """Create a state with these levels, in the columns of `LEVELS`."""
        market, numbers = number_markets(
            levels["market_ticker"], {t: i for i, t in enumerate(books)}
        )
        packed = levels.with_columns(market.alias("market")).select(
            level_number().alias("level"), "size"
        )
        return cls(
            n, clock, connections, books, numbers, Ladders(SortedLevels.of(packed.sort("level")))
        )

    @property
    def version(self) -> int:
        """The latest receive time so far, in ns; monotonic even where the clock was set back."""
        return self.clock.newest_ns

    def follows(self, book: Book) -> bool:
        """Whether a book's market is followed, and its connection open."""
        return not book.left and book.conn in self.connections

    def may_have_rows_in(self, hour_ns: int, book: Book) -> bool:
        """Whether an hour that is entered again may have rows of a book.

        It may if the book's connection is open (frames of a left market may still arrive), or if the book
        ended in that hour or later.
        """
        return book.conn in self.connections or book.ended_ns >= hour_ns

    @property
    def all_ended_ns(self) -> int | None:
        """When the last followed books ended, if no open connection has books: an outage continues; else None."""
        based = [book for book in self.books.values() if book.based]
        if any(book.conn in self.connections for book in based):
            return None
        ended = (book.ended_ns for book in based if not book.left)
        return max(ended, default=None)

    def is_synced(self, book: Book) -> bool:
        """Whether a book is followed and synced, and none of its frames can be among lost records."""
        return (
            self.follows(book)
            and book.verified
            and self.connections[book.conn].has_all_frames(book.sid)
        )

    def seq_of(self, book: Book) -> int:
        """The last sequence number of a book's subscription; 0 where its connection has ended."""
        connection = self.connections.get(book.conn)
        return connection.seqs.get(book.sid, 0) if connection else 0

    @property
    def loss_key(self) -> Hashable:
        """A key of what lost records leave undecided; equal for states of one record that give the same rows."""
        lossy = (
            (conn, connection.lost, connection.gaps)
            for conn, connection in sorted(self.connections.items())
        )
        return (
            *sorted(self.partial),
            *(
                (conn, lost.since_ns, *lost.last.items(), *map(OpenGap.key, gaps.values()))
                for conn, lost, gaps in lossy
                if lost is not None
            ),
        )

    def without_snapshotless_books(self) -> BookState:
        """The state for loading from a place whose earlier rows are not stored.

        Books without a snapshot are dropped, so that the gap of their next first delta is reported again.
        """
        books = {ticker: book for ticker, book in self.books.items() if book.based}
        gone = [self.numbers[ticker] for ticker in self.books.keys() - books.keys()]
        levels = self.ladders.all().filter(
            ~market_of(pl.col("level")).is_in(pl.Series(gone, dtype=pl.Int64).implode())
        )
        partial = frozenset(self.connections)
        return replace(self, books=books, ladders=Ladders(SortedLevels.of(levels)), partial=partial)

    def pieces(self) -> Iterator[tuple[object, int]]:
        """Yield the objects that take the memory, with their sizes in bytes; states share equal objects."""
        for frame in (self.ladders.recent, *self.ladders.base.leaves):
            yield frame, frame.height * PACKED_BYTES
        for by_ticker in (self.books, self.numbers):
            yield by_ticker, sys.getsizeof(by_ticker)

    @property
    def levels(self) -> pl.DataFrame:
        """The levels of the books in the columns of LEVELS."""
        return with_names(self.ladders.all(), self.books, self.numbers).select(LEVELS.names())


def number_markets(tickers: pl.Series, known: dict[str, int]) -> tuple[pl.Series, dict[str, int]]:
    """Return (the number of each ticker, all numbers); `known` numbers are kept, new ones are the next free."""
    encoded = tickers.to_arrow().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    free = itertools.count(max(known.values(), default=-1) + 1)
    numbers = known | {name: next(free) for name in names if name not in known}
    of_names = pl.Series([numbers[name] for name in names], dtype=pl.Int64)
    return of_names.gather(pl.Series(encoded.indices)), numbers


def level_number() -> pl.Expr:
    """Pack `market` (its number), `side` and `price` into one integer; null without a side."""
    return (pl.col("market") * 2 + (pl.col("side") == "no").cast(pl.Int64)) * _PRICES + pl.col(
        "price"
    )


def ladder_level() -> pl.Expr:
    """The packed `level` with the number of a `ladder` instead of a market."""
    return pl.col("ladder") * _OF_MARKET + pl.col("level") % _OF_MARKET


def market_of(level: pl.Expr) -> pl.Expr:
    """The market number of a packed level."""
    return level // _OF_MARKET


def with_names(
    packed: pl.DataFrame, books: dict[str, Book], numbers: dict[str, int]
) -> pl.DataFrame:
    """Add connection, market, side and price to rows with a `level`; keeps their order."""
    head = pl.DataFrame(
        {
            "market": pl.Series([numbers[ticker] for ticker in books], dtype=pl.Int64),
            "market_ticker": pl.Series(list(books), dtype=pl.String),
            "conn": pl.Series([book.conn for book in books.values()], dtype=pl.String),
            "market_id": pl.Series([book.market_id for book in books.values()], dtype=pl.String),
        }
    )
    return with_level_fields(packed).join(head, on="market", how="left", maintain_order="left")


def with_level_fields(levels: pl.DataFrame) -> pl.DataFrame:
    """Add market (its number), side and price to rows with a `level`."""
    level = pl.col("level")
    return levels.with_columns(
        market_of(level).alias("market"),
        pl.when(level // _PRICES % 2 == 1)
        .then(pl.lit("no"))
        .otherwise(pl.lit("yes"))
        .alias("side"),
        (level % _PRICES).alias("price"),
    )
