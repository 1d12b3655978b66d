"""The books so far: what the derivation carries from one range of the journal to the next.

Tens of thousands of markets have millions of levels, of which a range touches few. So a level is one
integer and its size another, and a market is a small number; `BookState.levels` says it in words. And states
that follow each other share what has not changed for a while (`Ladders`).
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
from kalshi_platform.loading.sorted_levels import PACKED, PACKED_BYTES, SortedLevels

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
"""Changed levels are kept apart until they are more than the one, and than all divided by the other."""


class Book(msgspec.Struct, frozen=True):
    """What is known of one market's newest book, besides its levels."""

    conn: str
    sid: int
    market_id: str
    based: bool
    """It began with a snapshot. A book without one holds only the changes that came since."""
    verified: bool
    """Based, without a gap since, and its connection is open."""
    left: bool = False
    """No longer followed; what still comes is in flight."""
    ended_ns: int = 0
    """When it was left or its connection ended, by a time that never steps back; 0: neither."""


class LostRecords(msgspec.Struct, frozen=True):
    """Records of the journal are gone in which a connection may have had frames."""

    since_ns: int
    """Receive time of the last record before them."""
    last: dict[int, int]
    """The last number of each sid then, until its next frame shows what it lost."""


class OpenGap(msgspec.Struct, frozen=True):
    """Frames of a sid are missing, and not every book of it has had a snapshot since."""

    expected: int
    got: int
    since_ns: int
    markets: int
    waiting: frozenset[str]

    def key(self) -> Hashable:
        """The same of gaps that are the same."""
        return self.expected, self.got, self.waiting


class Connection(msgspec.Struct, frozen=True):
    """An open connection."""

    use_yes_price: bool
    last_recv_ns: int
    seqs: dict[int, int]
    """The last number of each sid."""
    lost: LostRecords | None = None
    gaps: dict[int, OpenGap] = {}
    """By sid, those that came to light by lost records; capture closes its own."""

    def believes(self, sid: int) -> bool:
        """Whether the frames of a sid are known to be whole."""
        return self.lost is None or sid not in self.lost.last


@dataclass(frozen=True)
class Ladders:
    """The levels of all books, sizes other than 0; `level` as `level_number` has it."""

    base: SortedLevels = field(default_factory=SortedLevels)
    """What states that follow each other share, all of it or most."""
    recent: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=PACKED))
    """What is different by now, in no order; size 0 where a level of `base` is gone."""

    @property
    def height(self) -> int:
        """How many levels there are, about."""
        return self.base.height + self.recent.height

    def all(self) -> pl.DataFrame:
        """Every level with its size, sorted."""
        return pl.concat([pl.DataFrame(schema=PACKED), *self.parts()]).rechunk()

    def parts(self) -> Iterator[pl.DataFrame]:
        """The same, some levels at a time."""
        return self.base.parts(self.recent.sort("level"))

    def heights(self, markets: pl.Series) -> npt.NDArray[np.int64]:
        """How many levels each of these markets (numbers) has."""
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
        """Those of `levels` that there are, and all levels of `markets` (numbers)."""
        level = pl.col("level")
        whole = market_of(level).is_in(markets.implode())
        others = pl.DataFrame({"level": levels}).filter(~whole)["level"].unique().sort()
        lowest = markets.unique().sort().to_numpy() * _OF_MARKET
        positions = [self.base.has(others.to_numpy()), _spans(self.base, lowest)]
        found = self.base.take(np.sort(np.concatenate(positions)))
        changed = self.recent.filter(level.is_in(others.implode()) | whole)
        return pl.concat(
            [
                found.filter(~level.is_in(changed["level"].implode())),
                changed.filter(pl.col("size") != 0),
            ]
        )

    def changed(self, levels: pl.DataFrame, renewed: pl.Series) -> Ladders:
        """With these sizes, 0 for what is gone; of the markets `renewed` there is nothing else."""
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
    """How many levels the markets have whose lowest possible levels these are, ascending."""
    return base.find(lowest + _OF_MARKET) - base.find(lowest)


def _spans(base: SortedLevels, lowest: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The positions of the levels of the markets whose lowest possible levels these are, ascending."""
    count = _widths(base, lowest)
    spans: npt.NDArray[np.int64] = np.repeat(base.find(lowest) - np.cumsum(count) + count, count)
    return spans + np.arange(len(spans))


@dataclass(frozen=True)
class BookState:
    """Everything that the rows of the next range depend on."""

    n: int = 0
    """The next journal record."""
    clock: ReceiveClock = field(default_factory=ReceiveClock)
    connections: dict[str, Connection] = field(default_factory=dict)
    books: dict[str, Book] = field(default_factory=dict)
    """By market ticker."""
    numbers: dict[str, int] = field(default_factory=dict)
    """Each of these markets as a number."""
    ladders: Ladders = field(default_factory=Ladders)
    partial: frozenset[str] = frozenset()
    """Open connections whose beginning was not seen: books of theirs may be missing here."""

    @classmethod
    def of(
        cls,
        n: int,
        clock: ReceiveClock,
        connections: dict[str, Connection],
        books: dict[str, Book],
        levels: pl.DataFrame,
    ) -> Self:
        """The state with these levels, as `levels` gives them."""
        market, numbers = numbered(levels["market_ticker"], {t: i for i, t in enumerate(books)})
        packed = levels.with_columns(market.alias("market")).select(
            level_number().alias("level"), "size"
        )
        return cls(
            n, clock, connections, books, numbers, Ladders(SortedLevels.of(packed.sort("level")))
        )

    @property
    def version(self) -> int:
        """Newest receive time so far, in ns; it never steps back, even where the clock did."""
        return self.clock.newest_ns

    def follows(self, book: Book) -> bool:
        """Whether a book's market is followed, and its connection open."""
        return not book.left and book.conn in self.connections

    def may_be_in(self, hour_ns: int, book: Book) -> bool:
        """Whether an hour that is entered again may have rows of a book: its connection is open (of a market
        that was left frames may still come), or it ended in that hour or later."""
        return book.conn in self.connections or book.ended_ns >= hour_ns

    @property
    def all_ended_ns(self) -> int | None:
        """When the last books ended, where no open connection has any: they are followed, and an outage lasts."""
        based = [book for book in self.books.values() if book.based]
        if any(book.conn in self.connections for book in based):
            return None
        ended = (book.ended_ns for book in based if not book.left)
        return max(ended, default=None)

    def trusts(self, book: Book) -> bool:
        """Whether a book is followed, verified, and its frames are known to be whole."""
        return (
            self.follows(book) and book.verified and self.connections[book.conn].believes(book.sid)
        )

    def seq_of(self, book: Book) -> int:
        """The last number of a book's subscription; 0 where its connection has ended."""
        connection = self.connections.get(book.conn)
        return connection.seqs.get(book.sid, 0) if connection else 0

    @property
    def doubts(self) -> Hashable:
        """What lost records leave open. Equal for states of one record that come to the same rows."""
        return (
            *sorted(self.partial),
            *(
                (conn, it.lost.since_ns, *it.lost.last.items(), *map(OpenGap.key, it.gaps.values()))
                for conn, it in sorted(self.connections.items())
                if it.lost is not None
            ),
        )

    def without_unbased(self) -> BookState:
        """The state where what came before it was not written: the first delta of a book that has no
        snapshot is told again, as it comes.
        """
        books = {ticker: book for ticker, book in self.books.items() if book.based}
        gone = [self.numbers[ticker] for ticker in self.books.keys() - books.keys()]
        levels = self.ladders.all().filter(
            ~market_of(pl.col("level")).is_in(pl.Series(gone, dtype=pl.Int64).implode())
        )
        partial = frozenset(self.connections)
        return replace(self, books=books, ladders=Ladders(SortedLevels.of(levels)), partial=partial)

    def pieces(self) -> Iterator[tuple[object, int]]:
        """What takes the memory, and how many bytes: states share what is the same object."""
        for frame in (self.ladders.recent, *self.ladders.base.leaves):
            yield frame, frame.height * PACKED_BYTES
        for by_ticker in (self.books, self.numbers):
            yield by_ticker, sys.getsizeof(by_ticker)

    @property
    def levels(self) -> pl.DataFrame:
        """Levels of the books, in words: the columns of LEVELS."""
        return in_words(self.ladders.all(), self.books, self.numbers).select(LEVELS.names())


def numbered(tickers: pl.Series, known: dict[str, int]) -> tuple[pl.Series, dict[str, int]]:
    """(the number of each, all numbers): `known` ones are kept, new ones are the next free."""
    encoded = tickers.to_arrow().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    free = itertools.count(max(known.values(), default=-1) + 1)
    numbers = known | {name: next(free) for name in names if name not in known}
    each = pl.Series([numbers[name] for name in names], dtype=pl.Int64)
    return each.gather(pl.Series(encoded.indices)), numbers


def level_number() -> pl.Expr:
    """`market` (its number), `side` and `price` as one integer; null where there is no side."""
    return (pl.col("market") * 2 + (pl.col("side") == "no").cast(pl.Int64)) * _PRICES + pl.col(
        "price"
    )


def on_ladder() -> pl.Expr:
    """The `level` of a `ladder` (its number) instead of that of a market."""
    return pl.col("ladder") * _OF_MARKET + pl.col("level") % _OF_MARKET


def market_of(level: pl.Expr) -> pl.Expr:
    """The market's number of a level."""
    return level // _OF_MARKET


def in_words(packed: pl.DataFrame, books: dict[str, Book], numbers: dict[str, int]) -> pl.DataFrame:
    """Add connection, market, side and price to rows that have a `level`; keeps their order."""
    head = pl.DataFrame(
        {
            "market": pl.Series([numbers[ticker] for ticker in books], dtype=pl.Int64),
            "market_ticker": pl.Series(list(books), dtype=pl.String),
            "conn": pl.Series([book.conn for book in books.values()], dtype=pl.String),
            "market_id": pl.Series([book.market_id for book in books.values()], dtype=pl.String),
        }
    )
    return unpacked(packed).join(head, on="market", how="left", maintain_order="left")


def unpacked(levels: pl.DataFrame) -> pl.DataFrame:
    """Add market (its number), side and price to rows that have a `level`."""
    level = pl.col("level")
    return levels.with_columns(
        market_of(level).alias("market"),
        pl.when(level // _PRICES % 2 == 1)
        .then(pl.lit("no"))
        .otherwise(pl.lit("yes"))
        .alias("side"),
        (level % _PRICES).alias("price"),
    )
