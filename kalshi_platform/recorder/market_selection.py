"""Which markets to record: the settings' wish, kept current with what the exchange lists.

REST is read sparingly, however many markets there are: all of a wish now and then, and in between what
has changed on the whole exchange, which is mostly a page. A list that could not be had changes
nothing: no answer, and no file, ever mean "no markets".
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
"""Between two looks at what has changed: so long the exchange's own cache keeps an answer."""
RELIST_S = 300.0
"""Between two readings of everything that is wished for: the net below, and when volumes are learnt."""
UNSURE_S = 1.0
"""Before REST is asked about a market that the exchange told of and that is not known."""
OVERLAP_S = 60
"""Looks overlap by so much: our clock may be ahead, and answers are cached."""

NOTHING = (
    "There is nothing to record: set MARKET_SERIES (for example MARKET_SERIES=KXHIGHNY), MARKET_EVENTS,"
    " MARKET_TICKERS, MARKET_FILE or MARKET_ALL."
)


@dataclass(frozen=True)
class Look:
    """One look at REST, to be taken in a thread of its own: it knows no state."""

    wish: MarketSelection
    tickers: tuple[str, ...]
    """To be looked up by name."""
    whole: bool
    """All of the wish, or what has changed since then."""
    since_s: float
    now_s: float

    def take(self, rest: RestClient, tell: ReportUnreadable = log_unreadable) -> list[Market]:
        """What the exchange lists, as far as it can be read; `tell` is given what cannot.

        Raises `ExchangeError` where it does not answer.
        """
        found = rest.markets(tickers=self.tickers, report=tell) if self.tickers else []
        if not self.wish.follows_openings:
            return found
        if not self.whole:
            since = int(self.since_s) - OVERLAP_S
            return found + rest.markets(min_updated_ts=since, mve_filter="exclude", report=tell)
        not_closed = int(self.now_s) - OVERLAP_S
        for event in sorted(self.wish.events):
            of_event = rest.markets(event_ticker=event, report=tell)
            found += _insist(of_event, f"MARKET_EVENTS: {event}")
        # A market may trade past its close time: those that are open are read, too.
        if self.wish.everything:
            found += rest.markets(min_close_ts=not_closed, mve_filter="exclude", report=tell)
            found += rest.markets(status="open", mve_filter="exclude", report=tell)
        for series in self.wish.series:
            of_series = rest.markets(series_ticker=series, min_close_ts=not_closed, report=tell)
            of_series += rest.markets(status="open", series_ticker=series, report=tell)
            found += _insist(of_series, f"MARKET_SERIES: {series}")
        return found


def _insist(found: list[Market], what: str) -> list[Market]:
    if not found:
        log.warning("%s has no market that is open or to open. Is the name right?", what)
    return found


def wish_of(settings: Settings) -> MarketSelection:
    """What the settings want recorded. Raises `SettingsError` where that is nothing."""
    file = _TickerFile(settings.market_file) if settings.market_file else None
    return _wish(settings, file.tickers if file else ())


def _wish(settings: Settings, from_file: Sequence[str]) -> MarketSelection:
    wish = MarketSelection(
        tuple(dict.fromkeys([*settings.market_tickers, *from_file])),
        settings.market_series,
        frozenset(settings.market_events),
        settings.every_market,
        qty_units(str(settings.market_min_volume)),
    )
    if not wish.tickers and not wish.follows_openings:
        raise SettingsError(NOTHING)
    return wish


class Watchlist:
    """One shard's markets to follow. All but `Look.take` belongs to one thread: the event loop's."""

    def __init__(self, settings: Settings, clock: Callable[[], float], shard: int = 0) -> None:
        """`clock` gives Unix seconds. Raises `SettingsError` where nothing is wished for."""
        self._settings = settings
        self._clock = clock
        self._shard = shard
        self._file = _TickerFile(settings.market_file) if settings.market_file else None
        wish = _wish(settings, self._from_file)
        self._roster = Universe(wish)
        self._unchecked: tuple[str, ...] = wish.tickers
        self._whole_s = self._looked_s = float("-inf")

    @property
    def _from_file(self) -> Sequence[str]:
        return self._file.tickers if self._file else ()

    # -- what the exchange and the user say ----------------------------------------------------

    def heed(self, events: Iterable[LifecycleEvent]) -> None:
        """What the exchange tells of markets' lives."""
        for event in events:
            self._roster.heed(event, self._clock())

    def unsettle(self) -> None:
        """Life events were missed: ask REST soon, which tells of every change since the last look."""
        self._roster.unsure = True

    def reread(self) -> None:
        """Read MARKET_FILE again if it has changed."""
        if self._file is None:
            return
        self._file.changed()
        named = tuple(dict.fromkeys([*self._settings.market_tickers, *self._from_file]))
        if named == self._roster.wish.tickers:
            return
        before = set(self._roster.wish.tickers)
        self._roster.rename(named)
        self._unchecked += tuple(ticker for ticker in named if ticker not in before)
        log.info("MARKET_FILE names %d markets now.", len(self._from_file))

    # -- looking at REST -----------------------------------------------------------------------

    def look(self) -> Look | None:
        """The look at REST that is due, if one is."""
        now_s, wish = self._clock(), self._roster.wish
        whole = now_s - self._whole_s >= RELIST_S
        pause_s = UNSURE_S if self._roster.unsure else REFRESH_S
        part = wish.follows_openings and now_s - self._looked_s >= pause_s
        if not (self._unchecked or part or (whole and (wish.follows_openings or self._unknown))):
            return None
        tickers = (*self._unchecked, *self._unknown) if whole else self._unchecked
        return Look(wish, tuple(dict.fromkeys(tickers)), whole, self._looked_s, now_s)

    @property
    def _unknown(self) -> Sequence[str]:
        return self._roster.unknown

    def take(self, look: Look, markets: Sequence[Market]) -> None:
        """What a look has found.

        Raises `SettingsError` where the wish comes to nothing: no ticker is known, and nothing else
        is wished for.
        """
        self._roster.listed(markets, look.now_s)
        self._looked_s = look.now_s
        if look.wish.follows_openings:
            self._roster.as_of_s = look.now_s
        if look.whole:
            self._whole_s = look.now_s
        self._roster.unsure = False
        fresh = set(self._unchecked) & set(look.tickers)
        self._unchecked = tuple(t for t in self._unchecked if t not in look.tickers)
        unknown = [ticker for ticker in self._unknown if ticker in fresh]
        if not unknown:
            return
        names = ", ".join(sorted(unknown))
        if len(self._unknown) == len(self._roster.wish.tickers) and not look.wish.follows_openings:
            raise SettingsError(
                f"MARKET_TICKERS names no market that the exchange knows: {names}. Tickers are as in the"
                " address of a market's page, in capitals."
            )
        log.warning(
            "The exchange knows no market %s: not recorded, unless it is listed later. Check"
            " MARKET_TICKERS and MARKET_FILE.",
            names,
        )

    def ask_again(self) -> None:
        """The last answer of `wanted` was not taken: give another."""
        self._roster.ask_again()

    # -- what to follow ------------------------------------------------------------------------

    def wanted(self) -> list[str] | None:
        """The tickers that this shard follows now; None where nothing can have changed since the last
        call.
        """
        now_s = self._clock()
        if not self._roster.is_due(now_s):
            return None
        return share(self._roster.wanted(now_s), self._shard, self._settings.stream_shards)


class _TickerFile:
    """MARKET_FILE: one ticker a line, `#` begins a comment."""

    def __init__(self, path: Path) -> None:
        self._path = path.expanduser()
        self._seen: tuple[int, int, int] | None = None
        self._trouble = ""
        self.tickers: tuple[str, ...] = ()
        try:
            self._seen = self._look()
            self.tickers = self._read()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"MARKET_FILE is {str(self._path)!r}, which cannot be read ({_reason(error)})."
            ) from None
        if not self.tickers:
            raise SettingsError(f"MARKET_FILE is {str(self._path)!r}, which names no market.")

    def changed(self) -> bool:
        """Whether the file names other markets than before. One that cannot be read changes nothing."""
        try:
            seen = self._look()
            if seen == self._seen:
                return False
            tickers = self._read()
        except (OSError, UnicodeDecodeError, SettingsError) as error:
            self._complain(_reason(error))
            return False
        self._seen = seen
        if not tickers:
            self._complain("it names no market")
            return False
        self._trouble = ""
        before, self.tickers = self.tickers, tickers
        return tickers != before

    def _complain(self, reason: str) -> None:
        if reason != self._trouble:
            self._trouble = reason
            log.warning(
                "MARKET_FILE %s was not taken over (%s): the markets stay as they were. Mend the file.",
                self._path,
                reason,
            )

    def _look(self) -> tuple[int, int, int]:
        stat = self._path.stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> tuple[str, ...]:
        found: dict[str, None] = {}
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
                    " one word. Give one ticker a line."
                )
            found.update(dict.fromkeys(words))
        return tuple(found)


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is not UTF-8: save it again as UTF-8"
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
