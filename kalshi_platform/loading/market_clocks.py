"""The exchange's clocks of the markets along a journal range: which clocks fell, and what a new snapshot proves.

Since October 2026 each snapshot and delta carries the `clock` of its market: a counter of its changes, the same on
every connection (protocol reference, section 11.1). For each market the book state keeps the clock of the last
change up to which its book is *complete*. While a book is stale that clock stands still, because changes
before a later one may have been missed. The next snapshot then proves one of two things:

- Its clock and its levels are those of the complete book: the market is *unchanged*, nothing was missed. (The
  changes of one action share a clock, so an equal clock alone does not show that the last action came whole.)
- Otherwise the market is *changed*: it changed after the last change before the gap. It may have missed nothing,
  but that cannot be shown.

Clocks are compared within one era only (`exchange.maintenance`), and never with a frame that has none; what cannot
be compared is neither unchanged nor changed. Which books are stale belongs in `rows`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt
import polars as pl

from kalshi_platform import typed_json
from kalshi_platform.exchange.maintenance import NOT_COMPARABLE, SCHEDULE, Maintenance

MARKER, LEVEL, DELTA = 0, 1, 2
"""Types of the events of a range: a snapshot, a level of a snapshot, a delta."""
_UNKNOWN = -1
_MOST = 1 << 62
"""Clocks from here on are not compared: codes have 63 bits."""
_LAST_RECORD = np.iinfo(np.int64).max

Ints = npt.NDArray[np.int64]


def _none() -> Ints:
    return np.empty(0, np.int64)


@dataclass(frozen=True)
class MarketClocks:
    """For each market, by its number, the last change up to which its book is complete.

    A clock is kept as a code: 2 · clock for a delta, 2 · clock + 1 for a snapshot. So the next delta of a
    market, which may share the clock of a delta but not that of a snapshot, has at least this code.
    """

    codes: Ints = field(default_factory=_none)
    """-1 where the clock is not known; markets beyond the end have none."""
    eras: Ints = field(default_factory=_none)
    maintenance: Maintenance = field(default_factory=Maintenance)
    tracked: bool = True
    """False after a state that an earlier version saved: clocks are known from the recorder's next start on."""

    @property
    def any_known(self) -> bool:
        """Whether the clock of any market is known."""
        return bool((self.codes >= 0).any())

    def of(self, number: int) -> tuple[int, int]:
        """The code and the era of a market."""
        if number >= len(self.codes):
            return _UNKNOWN, NOT_COMPARABLE
        return int(self.codes[number]), int(self.eras[number])


@dataclass(frozen=True)
class Judgement:
    """A snapshot's clock compared with the last change up to which the book was complete."""

    clock: int
    after: int
    """The clock of that change."""
    unchanged: bool

    @property
    def fell(self) -> bool:
        """Whether the snapshot is older than what was applied before it."""
        return self.clock < self.after


class RangeClocks:
    """The clocks of one range's frames and of the books before it."""

    def __init__(
        self,
        events: pl.DataFrame,
        books: pl.Series,
        books_before: Ints,
        before: MarketClocks,
        stream: pl.DataFrame,
    ) -> None:
        """`books`: the book of each event; `books_before`: that of each market number before the range, -1 for none."""
        self._before = before
        self._events = events
        notes = stream
        if not stream.is_empty():
            notes = stream.filter(pl.col("kind").is_in([SCHEDULE, "started"]))
        self._maintenances = [(0, before.maintenance), *_schedules(notes)]
        self._tracked_from = _tracked_from(before, notes)
        self.active = self._tracked_from is not None and (
            before.any_known or events["clock"].null_count() < events.height
        )
        """Whether any clock is known; otherwise the rows are those of frames without clocks."""
        if self.active:
            self._sort_frames(books, books_before)

    def _sort_frames(self, books: pl.Series, books_before: Ints) -> None:
        """Arrange the frames (snapshots and deltas) by market, and by record within each."""
        kind = self._events["type"].to_numpy()
        rows = np.flatnonzero(kind != LEVEL)
        market = self._events["market"].to_numpy()[rows]
        narrow = market.astype(np.uint16) if market.max(initial=0) < 1 << 16 else market
        order = np.argsort(narrow, kind="stable")
        self._rows = rows[order]
        self._market = market[order]
        self._is_marker = kind[self._rows] == MARKER
        self._n = self._events["n"].to_numpy()[self._rows].astype(np.int64)
        self._era = self._eras(self._events["recv_ns"].to_numpy()[self._rows])
        self._code = self._codes()
        self._book = books.to_numpy()[self._rows]
        self._books_before = books_before

    def _eras(self, recv_ns: Ints) -> Ints:
        eras = self._maintenances[0][1].eras(recv_ns)
        for n, maintenance in self._maintenances[1:]:
            after = self._n >= n
            eras[after] = maintenance.eras(recv_ns[after])
        return eras

    def _codes(self) -> Ints:
        clock = self._events["clock"]
        values = (clock.fill_null(_MOST) if clock.null_count() else clock).to_numpy()[self._rows]
        comparable = (
            (values < _MOST)
            & (self._era != NOT_COMPARABLE)
            & (self._n >= (self._tracked_from or 0))
        )
        return np.where(comparable, values.astype(np.int64) * 2 + self._is_marker, _UNKNOWN)

    def falls(self) -> pl.DataFrame:
        """The deltas whose clock is not above that of their snapshot, or is below that of the delta before.

        They have the clock before as column `after`. Only a synced book's matter, which is not judged here.
        """
        if not self.active:
            return self._events.clear().with_columns(after=pl.lit(0, pl.Int64))
        first = np.ones(len(self._market), np.bool_)
        first[1:] = self._market[1:] != self._market[:-1]
        code, era, book = (
            np.concatenate([[_UNKNOWN], values[:-1]])
            for values in (self._code, self._era, self._book)
        )
        at_first = self._market[first]
        code[first], era[first] = self._carried(at_first)
        book[first] = self._books_before[at_first]
        fell = (
            ~self._is_marker
            & (self._code >= 0)
            & (code >= 0)
            & (era == self._era)
            & (book == self._book)
            & (self._code < code)
        )
        found: pl.DataFrame = self._events[self._rows[fell]]
        return found.with_columns(after=pl.Series(code[fell] >> 1)).sort("n")

    def _carried(self, markets: Ints) -> tuple[Ints, Ints]:
        """The codes and eras of these markets before the range."""
        known = markets < len(self._before.codes)
        at = np.where(known, markets, 0)
        if not len(self._before.codes):
            return np.full(len(markets), _UNKNOWN), np.full(len(markets), NOT_COMPARABLE)
        return (
            np.where(known, self._before.codes[at], _UNKNOWN),
            np.where(known, self._before.eras[at], NOT_COMPARABLE),
        )

    def candidates(self) -> pl.DataFrame:
        """The snapshots (`n`, `market`) whose clock may be that of the book before them."""
        columns = {"n": pl.UInt64, "market": pl.Int64}
        if not self.active or not self._is_marker.any():
            return pl.DataFrame(schema=columns)
        at = np.flatnonzero(self._is_marker & (self._code >= 0))
        same = (at > 0) & (self._market[at - 1] == self._market[at])
        carried, _ = self._carried(self._market[at])
        before = np.where(same, self._code[at - 1], carried)
        at = at[(before >> 1 == self._code[at] >> 1) | (before == _UNKNOWN)]
        return pl.DataFrame({"n": self._n[at], "market": self._market[at]}, schema=columns)

    def judge(
        self, number: int, n: int, stale_n: int | None, same_levels: Container[int]
    ) -> Judgement | None:
        """Judge the snapshot of record `n` of a market, whose book is complete before record `stale_n`.

        `stale_n`: None where it was stale before the range already. `same_levels`: the records of snapshots that
        have the levels of the book before. None where the clocks cannot be compared.
        """
        if not self.active:
            return None
        begin, end = np.searchsorted(self._market, [number, number + 1])
        records = self._n[begin:end]
        at = int(begin + np.searchsorted(records, n))
        until = int(begin + np.searchsorted(records, stale_n if stale_n is not None else 0))
        code, era = (
            (int(self._code[until - 1]), int(self._era[until - 1]))
            if until > begin
            else self._before.of(number)
        )
        new_code, new_era = int(self._code[at]), int(self._era[at])
        if code < 0 or new_code < 0 or era != new_era:
            return None
        clock, after = new_code >> 1, code >> 1
        return Judgement(clock, after, clock == after and n in same_levels)

    def after(
        self,
        complete_until: Mapping[int, int],
        forgotten: Iterable[int],
        void: Iterable[int],
        markets: int,
    ) -> MarketClocks:
        """The clocks after the range.

        `complete_until`: by market, the record from which on its book is not complete; the other books are
        complete. `forgotten`, `void`: markets whose clocks are not known any more. `markets`: the highest
        market number + 1.
        """
        tracked = self._tracked_from is not None
        maintenance = self._maintenances[-1][1]
        if not self.active:
            return MarketClocks(maintenance=maintenance, tracked=tracked)
        codes, eras = np.full(markets, _UNKNOWN), np.full(markets, NOT_COMPARABLE)
        known = min(markets, len(self._before.codes))
        codes[:known], eras[:known] = self._before.codes[:known], self._before.eras[:known]
        until = np.full(int(self._market.max(initial=-1)) + 1, _LAST_RECORD)
        for number, n in complete_until.items():
            if number < len(until):
                until[number] = n
        at = np.flatnonzero(self._n < until[self._market])
        last = np.ones(len(at), np.bool_)
        last[:-1] = self._market[at][1:] != self._market[at][:-1]
        at = at[last]
        at = at[self._market[at] < markets]
        codes[self._market[at]], eras[self._market[at]] = self._code[at], self._era[at]
        gone = [number for number in (*forgotten, *void) if number < markets]
        codes[gone] = _UNKNOWN
        return MarketClocks(codes, eras, maintenance, tracked)


def _schedules(notes: pl.DataFrame) -> list[tuple[int, Maintenance]]:
    """(record, windows from there on) of each note of the schedule."""
    if notes.is_empty():
        return []
    schedules = notes.filter(pl.col("kind") == SCHEDULE)
    return [
        (n, typed_json.decode(detail, Maintenance))
        for n, detail in schedules.select("n", "detail").iter_rows()
    ]


def _tracked_from(before: MarketClocks, notes: pl.DataFrame) -> int | None:
    """The record from which on clocks are known; None where none is in the range."""
    if before.tracked:
        return 0
    started = notes.filter(pl.col("kind") == "started")
    return None if started.is_empty() else int(started["n"][0])


def same_levels(
    sized: pl.DataFrame, events: pl.DataFrame, candidates: pl.DataFrame, width: int
) -> set[int]:
    """The records of those snapshots that have exactly the levels of their market's book before.

    `sized`: the working table of `rows`; `width`: the number of connections, by which books are numbered.
    """
    if candidates.is_empty():
        return set()
    numbers = candidates["market"].unique()
    rows = sized.with_columns((pl.col("book") // width).alias("market")).filter(
        pl.col("market").is_in(numbers.implode())
    )
    begins = (pl.col("type") == MARKER) | (pl.col("book") != pl.col("book").shift(1).over("market"))
    rows = rows.with_columns(
        begins.fill_null(value=False).cast(pl.Int64).cum_sum().over("market").alias("segment")
    )
    book = ["market", "segment"]
    levels = rows.filter(pl.col("type") != MARKER)
    ends = (
        levels.unique(subset=[*book, "level"], keep="last")
        .filter(pl.col("size") != 0)
        .select("market", pl.col("segment") + 1, "level", "size")
    )
    starts = levels.filter(pl.col("type") == LEVEL).select(
        *book, "level", pl.col("qty").alias("size")
    )
    common = starts.join(ends, on=[*book, "level", "size"])
    counts = [
        part.group_by(book).agg(pl.len().alias(name))
        for name, part in (("before", ends), ("new", starts), ("common", common))
    ]
    markers = rows.filter(pl.col("type") == MARKER)
    markers = markers.select(*book, events["n"].gather(markers["row"]).alias("n"))
    for count in counts:
        markers = markers.join(count, on=book, how="left")
    equal = markers.fill_null(0).filter(
        (pl.col("before") == pl.col("new")) & (pl.col("new") == pl.col("common"))
    )
    return set(equal["n"].to_list())


class SavedClocks(msgspec.Struct, frozen=True):
    """The form of `MarketClocks` in a state file."""

    codes: list[int]
    eras: list[int]
    maintenance: Maintenance

    @classmethod
    def of(cls, clocks: MarketClocks) -> SavedClocks | None:
        """None where clocks are not tracked."""
        if not clocks.tracked:
            return None
        return cls(clocks.codes.tolist(), clocks.eras.tolist(), clocks.maintenance)


def restored(saved: SavedClocks | None) -> MarketClocks:
    """The clocks of a state file; None: an earlier version wrote it."""
    if saved is None:
        return MarketClocks(tracked=False)
    return MarketClocks(
        np.array(saved.codes, np.int64), np.array(saved.eras, np.int64), saved.maintenance
    )
