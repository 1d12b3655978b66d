"""The books so far: what the derivation carries from one range of the journal to the next.

Thousands of markets have hundreds of thousands of levels, of which a range touches few. So a level is
one integer and its size another, and a market is a small number; `State.levels` says it in words.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Self

import msgspec
import polars as pl

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
PACKED = pl.Schema({"level": pl.Int64, "size": pl.Int64})
_PRICES = 1 << 14
"""More than ONE_DOLLAR: prices as digits of a composite key."""


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


class Lost(msgspec.Struct, frozen=True):
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
    lost: Lost | None = None
    gaps: dict[int, OpenGap] = {}
    """By sid, those that came to light by lost records; capture closes its own."""

    def believes(self, sid: int) -> bool:
        """Whether the frames of a sid are known to be whole."""
        return self.lost is None or sid not in self.lost.last


@dataclass(frozen=True)
class State:
    """Everything that the rows of the next range depend on."""

    n: int = 0
    """The next journal record."""
    version: int = 0
    """Newest receive time so far, in ns; it never steps back, even where the clock did."""
    connections: dict[str, Connection] = field(default_factory=dict)
    books: dict[str, Book] = field(default_factory=dict)
    """By market ticker."""
    numbers: dict[str, int] = field(default_factory=dict)
    """Each of these markets as a number."""
    packed: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=PACKED))
    """Levels of the books, sizes other than 0; `level` as `level_number` has it."""

    @classmethod
    def of(
        cls,
        n: int,
        version: int,
        connections: dict[str, Connection],
        books: dict[str, Book],
        levels: pl.DataFrame,
    ) -> Self:
        """The state with these levels, as `levels` gives them."""
        market, numbers = numbered(levels["market_ticker"], {t: i for i, t in enumerate(books)})
        packed = levels.with_columns(market.alias("market")).select(
            level_number().alias("level"), "size"
        )
        return cls(n, version, connections, books, numbers, packed)

    @property
    def doubts(self) -> Hashable:
        """What lost records leave open. Equal for states of one record that come to the same rows."""
        return tuple(
            (conn, it.lost.since_ns, *it.lost.last.items(), *map(OpenGap.key, it.gaps.values()))
            for conn, it in sorted(self.connections.items())
            if it.lost is not None
        )

    @property
    def levels(self) -> pl.DataFrame:
        """Levels of the books, in words: the columns of LEVELS."""
        return in_words(self.packed, self.books, self.numbers).select(LEVELS.names())


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
    return pl.col("ladder") * (2 * _PRICES) + pl.col("level") % (2 * _PRICES)


def market_of(level: pl.Expr) -> pl.Expr:
    """The market's number of a level."""
    return level // (2 * _PRICES)


def in_words(packed: pl.DataFrame, books: dict[str, Book], numbers: dict[str, int]) -> pl.DataFrame:
    """Add connection, market, side and price to rows that have a `level`; keeps their order."""
    level = pl.col("level")
    head = pl.DataFrame(
        {
            "market": pl.Series([numbers[ticker] for ticker in books], dtype=pl.Int64),
            "market_ticker": pl.Series(list(books), dtype=pl.String),
            "conn": pl.Series([book.conn for book in books.values()], dtype=pl.String),
            "market_id": pl.Series([book.market_id for book in books.values()], dtype=pl.String),
        }
    )
    return packed.with_columns(
        market_of(level).alias("market"),
        pl.when(level // _PRICES % 2 == 1)
        .then(pl.lit("no"))
        .otherwise(pl.lit("yes"))
        .alias("side"),
        (level % _PRICES).alias("price"),
    ).join(head, on="market", how="left", maintain_order="left")
