"""Which markets to record: the market selection of the settings, kept current with the exchange's lists.

REST is read sparingly, however many markets there are: the whole selection every `RELIST_S`, and every
`REFRESH_S` only the markets of the exchange that have changed, which is usually one page. A list or file
that cannot be read changes nothing: it never means "no markets". When a market joins and leaves is
decided in `universe`; subscribing belongs in `capture`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kalshi_platform.errors import SettingsError
from kalshi_platform.exchange.answers import Market
from kalshi_platform.exchange.frames import LifecycleEvent
from kalshi_platform.exchange.items import ReportUnreadable, log_unreadable
from kalshi_platform.exchange.numbers import qty_units
from kalshi_platform.exchange.rest import RestClient
from kalshi_platform.printable import invisible_in, strip_invisible
from kalshi_platform.recorder.sharding import share
from kalshi_platform.recorder.universe import MarketSelection, Universe
from kalshi_platform.settings import Settings

log = logging.getLogger(__name__)

REFRESH_S = 15.0
"""Interval between queries for changed markets: the exchange caches a response for this long."""
RELIST_S = 300.0
"""Interval between queries for the whole selection: catches missed changes and updates volumes."""
UNKNOWN_MARKET_S = 1.0
"""Delay before a query after a lifecycle event of an unknown market."""
OVERLAP_S = 60
"""Overlap of consecutive queries: this machine's clock may be ahead, and responses are cached."""

NOTHING_SELECTED = (
    "There is nothing to record: set MARKET_SERIES (for example MARKET_SERIES=KXHIGHNY), MARKET_EVENTS,"
    " MARKET_TICKERS, MARKET_FILE or MARKET_ALL."
)


@dataclass(frozen=True)
class MarketQuery:
    """One query to REST. It holds no state, so it can run in another thread."""

    selection: MarketSelection
    tickers: tuple[str, ...]
    """Tickers to look up by name."""
    full: bool
    """Whether to read the whole selection; else only markets changed after `since_s`."""
    since_s: float
    now_s: float

    def fetch(self, rest: RestClient, report: ReportUnreadable = log_unreadable) -> list[Market]:
        """Fetch the markets that the exchange lists; `report` receives those that cannot be read.

        Raises: `ExchangeError` where the exchange does not answer.
        """
        markets = rest.markets(tickers=self.tickers, report=report) if self.tickers else []
        if not self.selection.follows_openings:
            return markets
        if not self.full:
            since = int(self.since_s) - OVERLAP_S
            return markets + rest.markets(min_updated_ts=since, mve_filter="exclude", report=report)
        not_closed = int(self.now_s) - OVERLAP_S
        for event in sorted(self.selection.events):
            in_event = rest.markets(event_ticker=event, report=report)
            markets += _warn_if_empty(in_event, f"MARKET_EVENTS: {event}")
        # A market may trade past its close time, so the open ones are read, too.
        if self.selection.everything:
            markets += rest.markets(min_close_ts=not_closed, mve_filter="exclude", report=report)
            markets += rest.markets(status="open", mve_filter="exclude", report=report)
        for series in self.selection.series:
            in_series = rest.markets(series_ticker=series, min_close_ts=not_closed, report=report)
            in_series += rest.markets(status="open", series_ticker=series, report=report)
            markets += _warn_if_empty(in_series, f"MARKET_SERIES: {series}")
        return markets


def _warn_if_empty(markets: list[Market], setting: str) -> list[Market]:
    if not markets:
        log.warning("%s has no market that is open or will open. Is the name right?", setting)
    return markets


def selection_of(settings: Settings) -> MarketSelection:
    """The market selection of the settings. Raises: `SettingsError` where it is empty."""
    file = _TickerFile(settings.market_file) if settings.market_file else None
    return _selection(settings, file.tickers if file else ())


def _selection(settings: Settings, from_file: Sequence[str]) -> MarketSelection:
    selection = MarketSelection(
        tuple(dict.fromkeys([*settings.market_tickers, *from_file])),
        settings.market_series,
        frozenset(settings.market_events),
        settings.every_market,
        qty_units(str(settings.market_min_volume)),
    )
    if not selection.tickers and not selection.follows_openings:
        raise SettingsError(NOTHING_SELECTED)
    return selection


class Watchlist:
    """One shard's markets to follow. Call it in one thread (the event loop's), except `MarketQuery.fetch`."""

    def __init__(self, settings: Settings, clock: Callable[[], float], shard: int = 0) -> None:
        """`clock` returns Unix seconds. Raises: `SettingsError` where the selection is empty."""
        self._settings = settings
        self._clock = clock
        self._shard = shard
        self._file = _TickerFile(settings.market_file) if settings.market_file else None
        selection = _selection(settings, self._from_file)
        self._universe = Universe(selection)
        self._unchecked: tuple[str, ...] = selection.tickers
        self._whole_s = self._looked_s = float("-inf")

    @property
    def _from_file(self) -> Sequence[str]:
        return self._file.tickers if self._file else ()

    # -- changes from the exchange and the user ------------------------------------------------

    def apply_events(self, events: Iterable[LifecycleEvent]) -> None:
        """Apply lifecycle events."""
        for event in events:
            self._universe.apply_event(event, self._clock())

    def request_refresh(self) -> None:
        """Query REST soon, because lifecycle events were missed: it lists every change since the last query."""
        self._universe.refresh_needed = True

    def reload_file(self) -> None:
        """Read MARKET_FILE again where it has changed."""
        if self._file is None:
            return
        self._file.changed()
        named = tuple(dict.fromkeys([*self._settings.market_tickers, *self._from_file]))
        if named == self._universe.selection.tickers:
            return
        before = set(self._universe.selection.tickers)
        self._universe.set_tickers(named)
        self._unchecked += tuple(ticker for ticker in named if ticker not in before)
        log.info("MARKET_FILE names %d markets now.", len(self._from_file))

    # -- queries to REST -----------------------------------------------------------------------

    def due_query(self) -> MarketQuery | None:
        """The query that is due; None if none is."""
        now_s, selection = self._clock(), self._universe.selection
        full = now_s - self._whole_s >= RELIST_S
        pause_s = UNKNOWN_MARKET_S if self._universe.refresh_needed else REFRESH_S
        part = selection.follows_openings and now_s - self._looked_s >= pause_s
        if not (
            self._unchecked or part or (full and (selection.follows_openings or self._unknown))
        ):
            return None
        tickers = (*self._unchecked, *self._unknown) if full else self._unchecked
        return MarketQuery(selection, tuple(dict.fromkeys(tickers)), full, self._looked_s, now_s)

    @property
    def _unknown(self) -> Sequence[str]:
        return self._universe.unknown

    def apply(self, query: MarketQuery, markets: Sequence[Market]) -> None:
        """Apply the result of a query.

        Raises: `SettingsError` where the exchange knows none of the tickers and nothing else is selected.
        """
        self._universe.apply_list(markets, query.now_s)
        self._looked_s = query.now_s
        if query.selection.follows_openings:
            self._universe.as_of_s = query.now_s
        if query.full:
            self._whole_s = query.now_s
        self._universe.refresh_needed = False
        fresh = set(self._unchecked) & set(query.tickers)
        self._unchecked = tuple(t for t in self._unchecked if t not in query.tickers)
        unknown = [ticker for ticker in self._unknown if ticker in fresh]
        if not unknown:
            return
        names = ", ".join(sorted(unknown))
        if (
            len(self._unknown) == len(self._universe.selection.tickers)
            and not query.selection.follows_openings
        ):
            raise SettingsError(
                f"MARKET_TICKERS names no market that the exchange knows: {names}. Tickers are as in the"
                " address of a market's page, in capitals."
            )
        log.warning(
            "The exchange does not know the market %s: it is not recorded unless it is listed later. Check"
            " MARKET_TICKERS and MARKET_FILE.",
            names,
        )

    def invalidate(self) -> None:
        """Make the next `wanted` return a list: the last one was not applied."""
        self._universe.invalidate()

    # -- what to follow ------------------------------------------------------------------------

    def wanted(self) -> list[str] | None:
        """The tickers that this shard follows now; None where nothing can have changed since the last call."""
        now_s = self._clock()
        if not self._universe.is_due(now_s):
            return None
        return share(self._universe.wanted(now_s), self._shard, self._settings.stream_shards)


class _TickerFile:
    """MARKET_FILE: one ticker per line, `#` begins a comment."""

    def __init__(self, path: Path) -> None:
        self._path = path.expanduser()
        self._seen: tuple[int, int, int] | None = None
        self._trouble = ""
        self.tickers: tuple[str, ...] = ()
        try:
            self._seen = self._fingerprint()
            self.tickers = self._read()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"MARKET_FILE is {str(self._path)!r}, which cannot be read ({_reason(error)})."
            ) from None
        if not self.tickers:
            raise SettingsError(f"MARKET_FILE is {str(self._path)!r}, which names no market.")

    def changed(self) -> bool:
        """Reload the file; return whether its tickers changed. An unreadable file changes nothing."""
        try:
            seen = self._fingerprint()
            if seen == self._seen:
                return False
            tickers = self._read()
        except (OSError, UnicodeDecodeError, SettingsError) as error:
            self._warn(_reason(error))
            return False
        self._seen = seen
        if not tickers:
            self._warn("it names no market")
            return False
        self._trouble = ""
        before, self.tickers = self.tickers, tickers
        return tickers != before

    def _warn(self, reason: str) -> None:
        if reason != self._trouble:
            self._trouble = reason
            log.warning(
                "MARKET_FILE %s was not applied (%s): the markets stay as they were. Correct the file.",
                self._path,
                reason,
            )

    def _fingerprint(self) -> tuple[int, int, int]:
        stat = self._path.stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> tuple[str, ...]:
        tickers: dict[str, None] = {}
        for number, line in enumerate(self._path.read_text(encoding="utf-8-sig").splitlines(), 1):
            words = [strip_invisible(word) for word in line.partition("#")[0].split()]
            words = [word for word in words if word]
            if (hidden := invisible_in("".join(words))) is not None:
                raise SettingsError(
                    f"MARKET_FILE {str(self._path)!r}, line {number}: {' '.join(words)!a} contains"
                    f" {hidden}, which no editor shows. Type the ticker again."
                )
            if len(words) > 1:
                raise SettingsError(
                    f"MARKET_FILE {str(self._path)!r}, line {number}: {' '.join(words)!r} is more than"
                    " one word. Write one ticker per line."
                )
            tickers.update(dict.fromkeys(words))
        return tuple(tickers)


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is not UTF-8: save it again as UTF-8"
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
