"""`Archive`: the recorded archive as an API. What each table is made of belongs in the other modules of this room."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl

from kalshi_platform.analytics import replay as hour_books
from kalshi_platform.archive import Archive as Store
from kalshi_platform.archive import archive_at, table_of
from kalshi_platform.errors import RequestRefused
from kalshi_platform.exchange.auxiliary_channel import LIFECYCLE
from kalshi_platform.reading import event_stream
from kalshi_platform.reading.arguments import (
    MICROSECOND,
    instant,
    span,
    step,
    ticker_of,
    tickers_of,
)
from kalshi_platform.reading.bars import bars as make_bars
from kalshi_platform.reading.change_tables import changes, marked, sampled
from kalshi_platform.reading.covered import (
    Period,
    RecordedHour,
    conditions,
    recorded_hours,
    require,
)
from kalshi_platform.reading.events import Event
from kalshi_platform.reading.market_book import MarketBook
from kalshi_platform.reading.rows import KNOWN, TICKER, frame, read
from kalshi_platform.schema import (
    DEPTH,
    IMBALANCE,
    MARKET_CATALOG,
    ORDERBOOK_EVENTS,
    PLACE,
    SPREADS,
    STREAM_EVENTS,
    TRADES,
)

CATALOG_FILE = "markets.parquet"
Tickers = str | Sequence[str]
Step = str | timedelta
_US = pl.Datetime("us", "UTC")
_A_SECOND = timedelta(seconds=1)


class Archive:
    """A recorded archive, to read from.

    Every table is a Polars frame; `.to_pandas()` and `.to_arrow()` convert it. Prices are dollars and sizes contracts, in
    exact decimals unless `exact=False` asks for floats. A span is from `start`, included, to `end`, excluded, in receive
    time: a row belongs to the span in which it became known (`known_at`), and nothing at an instant uses a record that was
    received after it. A span in which a market's book is not synced throughout is refused, unless `allow_gaps=True`; then
    rows of a book that is not synced have `verified` false. `verified` alone is judged with hindsight: the silence before
    a connection's end counts as not synced.

    Every method takes one ticker or several where it says `tickers`.

    Raises:
        RequestRefused: Of every method: an argument has the wrong type, or names what is not there.
        NotCovered: Of every method with a span or an instant: the book was not recorded or not synced there.
        StoreError: Of every method: the archive cannot be read; the sentence says why.
    """

    def __init__(self, location: str | Path | Store) -> None:
        """Open an archive. Nothing is read yet.

        Args:
            location: A folder, s3://bucket/prefix of the object store of the settings, or what `archive_at` opens.

        Raises:
            RequestRefused: `location` is none of these.
            SettingsError: The URL is not one of an object store.
        """
        if isinstance(location, Store):
            self._store = location
        elif str(location) and isinstance(location, str | Path):
            self._store = archive_at(location)
        else:
            raise RequestRefused(
                f"{location!r} is no archive. Give its folder, such as 'data/parquet', or s3://bucket/prefix."
            )

    def __repr__(self) -> str:
        return f"Archive({str(self._store)!r})"

    # -- what there is -------------------------------------------------------------------------

    def markets(self, prefix: str = "", *, at: datetime | None = None) -> pl.DataFrame:
        """List markets with their terms.

        The archive keeps the newest reading of each market's terms. One that was read again after `at` is left out,
        because it may say what was not known then.

        Args:
            prefix: What the tickers begin with.
            at: An instant; only terms that had been read by then. None: the newest.

        Returns:
            The columns of `market_catalog`, by ticker; `as_of` says when the terms were read.
        """
        if not isinstance(prefix, str):
            raise RequestRefused(
                f"{prefix!r} is no beginning of a ticker. Give text, such as 'KXFED', or nothing for all."
            )
        file = self._store.whole(MARKET_CATALOG.name, CATALOG_FILE)
        schema = MARKET_CATALOG.arrow
        rows = frame([] if file is None else [table_of(file, schema)], schema)
        rows = rows.filter(pl.col(TICKER).str.starts_with(prefix)).sort(TICKER)
        return rows if at is None else rows.filter(pl.col("as_of") <= instant("at", at))

    def coverage(self, tickers: Tickers, start: datetime, end: datetime) -> pl.DataFrame:
        """Say when the books of markets were synced: look here first.

        Args:
            tickers: The markets.
            start: The first instant.
            end: The instant after the last.

        Returns:
            Columns `market_ticker`, `start`, `end`, `condition` (synced, stale, missing) and `seconds`: the span of each
            market, without a hole.
        """
        wanted, (first, last) = tickers_of(tickers), span(start, end)
        found = conditions(
            self._store, recorded_hours(self._store, first, last), wanted, first, last
        )
        rows = pl.DataFrame(
            [
                (ticker, period.start, period.end, period.condition.value)
                for ticker in sorted(found)
                for period in found[ticker]
            ],
            schema={TICKER: pl.String, "start": _US, "end": _US, "condition": pl.String},
            orient="row",
        )
        lasts = (pl.col("end") - pl.col("start")).dt.total_seconds(fractional=True)
        return rows.with_columns(lasts.alias("seconds"))

    # -- the book ------------------------------------------------------------------------------

    def book(
        self, ticker: str, at: datetime, *, allow_gaps: bool = False, exact: bool = True
    ) -> MarketBook:
        """Rebuild the whole book of a market as it was known at an instant.

        Args:
            ticker: The market.
            at: The instant; a record received at that very microsecond counts.
            allow_gaps: Whether a book that is not synced is given, with `verified` false.
            exact: Whether numbers are decimals.

        Returns:
            The book: all levels of both sides, and its last event.
        """
        name, when = ticker_of(ticker), instant("at", at)
        until = when + MICROSECOND
        there, found = self._covered([name], when, until, allow_gaps=allow_gaps)
        stream = event_stream.replay(
            self._store, there, found, when, until, trades=False, exact=exact
        )
        book = MarketBook(name, exact=exact)
        for _, book in stream:  # noqa: B007 - the last one is the book
            pass
        return book

    def top(
        self,
        tickers: Tickers,
        start: datetime,
        end: datetime,
        *,
        every: Step | None = None,
        allow_gaps: bool = False,
        exact: bool = True,
    ) -> pl.DataFrame:
        """Read the top of the book: best prices and sizes, spread, mid, microprice.

        Args:
            tickers: The markets.
            start: The first instant.
            end: The instant after the last.
            every: The distance of instants, such as "1s"; None: every change.
            allow_gaps: Whether spans that are not synced are given, with `verified` false.
            exact: Whether prices and sizes are decimals.

        Returns:
            The columns of `spreads`. Without `every` a row for each change, after one for the state at `start`; with it a
            row for each instant `at`, from `start` on.
        """
        rows = self._changes(SPREADS.name, tickers, start, end, every, allow_gaps=allow_gaps)
        return rows if exact else _floats(rows)

    def depth(
        self,
        tickers: Tickers,
        start: datetime,
        end: datetime,
        *,
        every: Step | None = None,
        allow_gaps: bool = False,
        exact: bool = True,
    ) -> pl.DataFrame:
        """Read the resting sizes near the best prices, second by second; a second is known at its end.

        Args:
            tickers: The markets.
            start: The first instant.
            end: The instant after the last.
            every: The distance of instants, such as "1m"; None: every second with a change.
            allow_gaps: Whether spans that are not synced are given, with `verified` false.
            exact: Whether prices and sizes are decimals.

        Returns:
            The columns of `depth`; rows as of `top`.
        """
        rows = self._changes(DEPTH.name, tickers, start, end, every, allow_gaps=allow_gaps)
        return rows if exact else _floats(rows)

    def imbalance(
        self,
        tickers: Tickers,
        start: datetime,
        end: datetime,
        *,
        every: Step | None = None,
        allow_gaps: bool = False,
        exact: bool = True,
    ) -> pl.DataFrame:
        """Read the imbalance of the resting sizes and the order flow, second by second; a second is known at its end.

        Args:
            tickers: The markets.
            start: The first instant.
            end: The instant after the last.
            every: The distance of instants, such as "1m"; None: every second with a change.
            allow_gaps: Whether spans that are not synced are given, with `verified` false.
            exact: Whether the order flow is in decimals.

        Returns:
            The columns of `imbalance`; rows as of `top`. With `every`, `ofi` is the sum over the seconds that became known
            since the instant before.
        """
        rows = self._changes(IMBALANCE.name, tickers, start, end, every, allow_gaps=allow_gaps)
        return rows if exact else _floats(rows)

    def ladder(
        self,
        tickers: Tickers,
        start: datetime,
        end: datetime,
        *,
        levels: int = 5,
        allow_gaps: bool = False,
        exact: bool = True,
    ) -> pl.DataFrame:
        """Read the best levels of both sides after every event.

        Args:
            tickers: The markets.
            start: The first instant.
            end: The instant after the last.
            levels: How many levels of each side, 1 to 99.
            allow_gaps: Whether spans that are not synced are given, with `verified` false.
            exact: Whether prices and sizes are decimals.

        Returns:
            The columns of `analytics.replay.after_events`, by ticker and in the order of events.
        """
        wanted, (first, last) = tickers_of(tickers), span(start, end)
        there, found = self._covered(wanted, first, last, allow_gaps=allow_gaps)
        parts = []
        for one in there:
            books = hour_books.read(self._store, one.hour, wanted)
            table = hour_books.after_events(books, levels)
            rows = frame([table], table.schema)
            parts.append(rows.filter(pl.col(KNOWN).is_between(first, last, closed="left")))
        rows = pl.concat(parts).sort(TICKER, KNOWN, maintain_order=True)
        rows = marked(rows, found)
        return rows if exact else _floats(rows)

    # -- what happened -------------------------------------------------------------------------

    def trades(
        self,
        tickers: Tickers,
        start: datetime,
        end: datetime,
        *,
        allow_gaps: bool = False,
        exact: bool = True,
    ) -> pl.DataFrame:
        """Read the public trades, in the order in which they became known.

        A trade that was missed and fetched later became known later; `ts` is the exchange's time of it.

        Args:
            tickers: The markets.
            start: The first instant.
            end: The instant after the last.
            allow_gaps: Whether spans are given in which the book is not synced.
            exact: Whether prices and sizes are decimals.

        Returns:
            The columns of `trades` and `known_at`.
        """
        return self._recorded(TRADES.name, tickers, start, end, allow_gaps=allow_gaps, exact=exact)

    def events(
        self,
        tickers: Tickers,
        start: datetime,
        end: datetime,
        *,
        allow_gaps: bool = False,
        exact: bool = True,
    ) -> pl.DataFrame:
        """Read the recorded rows of the order books, as they are: every level of a snapshot and every delta.

        Args:
            tickers: The markets.
            start: The first instant.
            end: The instant after the last.
            allow_gaps: Whether spans are given in which the book is not synced.
            exact: Whether prices and sizes are decimals.

        Returns:
            The columns of `orderbook_events` and `known_at`, by `shard, record`.
        """
        name = ORDERBOOK_EVENTS.name
        return self._recorded(name, tickers, start, end, allow_gaps=allow_gaps, exact=exact)

    def lifecycle(
        self,
        tickers: Tickers,
        start: datetime,
        end: datetime,
        *,
        allow_gaps: bool = False,
    ) -> pl.DataFrame:
        """Read what the exchange said of markets' lives: activated, deactivated, determined, settled and others.

        Args:
            tickers: The markets.
            start: The first instant.
            end: The instant after the last.
            allow_gaps: Whether spans are given in which the book is not synced.

        Returns:
            Columns `market_ticker`, `known_at`, `event_type`, `detail` (the frame), `shard` and `record`, in their order.
        """
        name = STREAM_EVENTS.name
        rows = self._recorded(name, tickers, start, end, allow_gaps=allow_gaps, exact=True)
        rows = rows.filter(pl.col("kind") == LIFECYCLE)
        kind = pl.coalesce(
            pl.col("detail").str.json_path_match(f"$.{path}event_type") for path in ("msg.", "")
        )
        return rows.select(TICKER, KNOWN, kind.alias("event_type"), "detail", *PLACE)

    def bars(
        self,
        tickers: Tickers,
        start: datetime,
        end: datetime,
        *,
        every: Step = "1m",
        allow_gaps: bool = False,
        exact: bool = True,
    ) -> pl.DataFrame:
        """Make bars of mid and trades. A bar is labelled with its end, `at`, and holds what was known before it.

        Args:
            tickers: The markets.
            start: The first instant.
            end: The instant after the last.
            every: The length of a bar, such as "1m".
            allow_gaps: Whether spans that are not synced are left out of the bars: `verified_s` says what is in them.
            exact: Whether prices and volumes are decimals; spread and imbalance are means, and always floats.

        Returns:
            Columns `market_ticker`, `at`; `open`, `high`, `low`, `close` of the mid; `spread` and `imbalance`, weighted by
            time; `verified_s`; `trade_open`, `trade_high`, `trade_low`, `trade_close` of the trades' YES price; `volume`,
            `trades`. Null where there was no state or no trade.
        """
        wanted, (first, last) = tickers_of(tickers), span(start, end)
        length = step(every, first, last)
        there, found = self._covered(wanted, first, last, allow_gaps=allow_gaps)
        top = marked(
            changes(self._store, SPREADS.name, there, wanted, start=first, end=last), found
        )
        trades = self._rows(TRADES.name, there, wanted, first, last)
        rows = make_bars(top, trades, wanted, start=first, end=last, every=length)
        return rows if exact else _floats(rows)

    def replay(
        self,
        tickers: Tickers,
        start: datetime,
        end: datetime,
        *,
        trades: bool = True,
        allow_gaps: bool = False,
        exact: bool = True,
    ) -> Iterator[tuple[Event, MarketBook]]:
        """Replay markets: every event in one order, with its market's book after it.

        The first events are the books at `start`. Events of a shard are in the order of their journal records.

        Args:
            tickers: The markets.
            start: The first instant.
            end: The instant after the last.
            trades: Whether trades are among the events.
            allow_gaps: Whether spans that are not synced are replayed; a book has `verified` false there.
            exact: Whether the books' numbers are decimals. Events have integers, and decimals as properties.

        Returns:
            An iterator of event and book. There is one book for each market, which later events change: copy what you keep.
        """
        wanted, (first, last) = tickers_of(tickers), span(start, end)
        there, found = self._covered(wanted, first, last, allow_gaps=allow_gaps)
        return event_stream.replay(
            self._store, there, found, first, last, trades=trades, exact=exact
        )

    # -- inside --------------------------------------------------------------------------------

    def _covered(
        self, tickers: Sequence[str], start: datetime, end: datetime, *, allow_gaps: bool
    ) -> tuple[list[RecordedHour], dict[str, list[Period]]]:
        """Find the span's hours and the books' conditions. Raises: `NotCovered`."""
        there = recorded_hours(self._store, start, end)
        found = conditions(self._store, there, tickers, start, end)
        require(self._store, there, found, allow_gaps=allow_gaps)
        return there, found

    def _changes(
        self,
        dataset: str,
        tickers: Tickers,
        start: datetime,
        end: datetime,
        every: Step | None,
        *,
        allow_gaps: bool,
    ) -> pl.DataFrame:
        wanted, (first, last) = tickers_of(tickers), span(start, end)
        length = None if every is None else step(every, first, last)
        there, found = self._covered(wanted, first, last, allow_gaps=allow_gaps)
        before = first
        if dataset != SPREADS.name:  # the second before the span is known at its beginning
            before = first - _A_SECOND
            earlier = recorded_hours(self._store, before, first)
            there = [*(one for one in earlier if one.hour < there[0].hour), *there]
        rows = changes(self._store, dataset, there, wanted, start=first, end=last)
        rows = marked(rows, found)
        if length is None:
            return rows
        instants = pl.datetime_range(
            first, last, length, closed="left", eager=True, time_unit="us"
        ).alias("at")
        at = sampled(rows, wanted, instants)
        return at if dataset != IMBALANCE.name else _with_flow(at, rows, instants)

    def _recorded(
        self,
        dataset: str,
        tickers: Tickers,
        start: datetime,
        end: datetime,
        *,
        allow_gaps: bool,
        exact: bool,
    ) -> pl.DataFrame:
        wanted, (first, last) = tickers_of(tickers), span(start, end)
        there, _ = self._covered(wanted, first, last, allow_gaps=allow_gaps)
        rows = self._rows(dataset, there, wanted, first, last)
        return rows if exact else _floats(rows)

    def _rows(
        self,
        dataset: str,
        there: Sequence[RecordedHour],
        tickers: Sequence[str],
        start: datetime,
        end: datetime,
    ) -> pl.DataFrame:
        listed = self._store.listing(dataset, there[0].hour, there[-1].hour)
        rows = read(self._store, dataset, listed, tickers)
        rows = rows.sort(*PLACE, "ingest_ts", "seq", maintain_order=True)
        known = pl.col("ingest_ts").cum_max().over(TICKER, "shard")
        rows = rows.with_columns(known.alias(KNOWN))
        return rows.filter(pl.col(KNOWN).is_between(start, end, closed="left"))


def _with_flow(at: pl.DataFrame, rows: pl.DataFrame, instants: pl.Series) -> pl.DataFrame:
    """Replace `ofi` by its sum over the rows that became known since the instant before."""
    flow = rows.select(TICKER, KNOWN, "ofi").sort(KNOWN)
    flow = flow.join_asof(
        pl.DataFrame({"at": instants}),
        left_on=KNOWN,
        right_on="at",
        strategy="forward",
        check_sortedness=False,
    )
    total = flow.group_by(TICKER, "at").agg(pl.col("ofi").sum())
    first = instants[0]
    flowed = at.drop("ofi").join(total, on=[TICKER, "at"], how="left")
    zero = pl.when(pl.col("at") > first).then(pl.col("ofi").fill_null(0)).alias("ofi")
    return flowed.with_columns(zero).select(at.columns)


def _floats(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.with_columns(pl.col(pl.Decimal).cast(pl.Float64))
