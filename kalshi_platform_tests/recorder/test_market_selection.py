"""When markets are followed: by the clock and by lifecycle events, never for lack of a response."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kalshi_platform import settings as platform_settings
from kalshi_platform.errors import SettingsError
from kalshi_platform.exchange.answers import Market
from kalshi_platform.exchange.errors import Unreachable
from kalshi_platform.exchange.frames import LifecycleEvent
from kalshi_platform.exchange.items import ReportUnreadable, log_unreadable
from kalshi_platform.recorder import market_catalog
from kalshi_platform.recorder import universe as rules
from kalshi_platform.recorder.market_selection import REFRESH_S, RELIST_S, Watchlist
from kalshi_platform.recorder.universe import (
    JOIN_BEFORE_S,
    LEAVE_AFTER_S,
    MarketSelection,
    Universe,
)

NOW = 1_790_000_000.0
HOUR = 3_600.0


def market(
    ticker: str,
    opens: float = NOW - HOUR,
    closes: float = NOW + HOUR,
    status: str = "active",
    volume: str = "0.00",
) -> Market:
    event = ticker.rpartition("-")[0] or ticker
    at = [datetime.fromtimestamp(t, UTC) for t in (opens, closes)]
    return Market(
        ticker=ticker,
        event_ticker=event,
        status=status,
        open_time=at[0],
        close_time=at[1],
        volume_fp=volume,
    )


def lifecycle_event(ticker: str, event_type: str, **more: Any) -> LifecycleEvent:
    return LifecycleEvent(market_ticker=ticker, event_type=event_type, **more)


def created(ticker: str, opens: float, closes: float) -> LifecycleEvent:
    more = {"event_ticker": ticker.rpartition("-")[0]}
    return lifecycle_event(
        ticker, "created", open_ts=int(opens), close_ts=int(closes), additional_metadata=more
    )


def universe(*markets: Market, **selection: Any) -> Universe:
    made = Universe(MarketSelection(**(selection or {"series": ("KXA",)})))
    made.apply_list(markets, NOW)
    made.as_of_s = NOW
    return made


# -- the clock -----------------------------------------------------------------------------------


def test_a_market_joins_before_its_open_and_leaves_after_close() -> None:
    opens, closes = NOW + 100, NOW + 1_000
    one = universe(market("KXA-1-T0", opens, closes, status="initialized"))
    assert one.wanted(NOW) == []
    assert not one.is_due(opens - JOIN_BEFORE_S - 0.1)
    assert one.is_due(opens - JOIN_BEFORE_S)
    assert one.wanted(opens - JOIN_BEFORE_S) == ["KXA-1-T0"]
    assert not one.is_due(closes + LEAVE_AFTER_S - 0.1)
    one.as_of_s = closes + LEAVE_AFTER_S
    assert one.is_due(closes + LEAVE_AFTER_S)
    assert one.wanted(closes + LEAVE_AFTER_S) == []


def test_a_list_from_before_the_close_does_not_end_a_market() -> None:
    """REST was unreachable since: the close may have been moved."""
    one = universe(market("KXA-1-T0", closes=NOW + 10))
    assert one.wanted(NOW + HOUR) == ["KXA-1-T0"]
    one.apply_list([market("KXA-1-T0", closes=NOW + 3 * HOUR)], NOW + HOUR)
    one.as_of_s = NOW + HOUR
    assert one.wanted(NOW + HOUR + 60) == ["KXA-1-T0"]


def test_a_market_missing_from_a_list_stays() -> None:
    one = universe(market("KXA-1-T0"), market("KXA-1-T1"))
    one.apply_list([market("KXA-1-T1")], NOW + 60)
    one.apply_list([], NOW + 120)
    assert one.wanted(NOW + 120) == ["KXA-1-T0", "KXA-1-T1"]


def test_lifecycle_events_create_extend_and_end_markets() -> None:
    one = universe()
    one.apply_event(created("KXA-1-T0", NOW + 50, NOW + 100), NOW)
    one.apply_event(created("KXB-1-T0", NOW + 50, NOW + 100), NOW)
    assert one.wanted(NOW) == []
    assert one.wanted(NOW + 50) == ["KXA-1-T0"]
    one.apply_event(
        lifecycle_event("KXA-1-T0", "close_date_updated", close_ts=int(NOW + 900)), NOW + 60
    )
    one.as_of_s = NOW + 800
    assert one.is_due(NOW + 61)
    assert one.wanted(NOW + 800) == ["KXA-1-T0"]
    one.apply_event(lifecycle_event("KXA-1-T0", "deactivated"), NOW + 800)
    assert one.wanted(NOW + 800) == ["KXA-1-T0"]
    one.apply_event(lifecycle_event("KXA-1-T0", "determined"), NOW + 810)
    assert one.wanted(NOW + 811) == ["KXA-1-T0"]
    assert one.wanted(NOW + 810 + LEAVE_AFTER_S) == []


def test_an_early_activation_overrides_the_open_time() -> None:
    one = universe(market("KXA-1-T0", NOW + HOUR, NOW + 2 * HOUR, status="initialized"))
    one.apply_event(lifecycle_event("KXA-1-T0", "activated"), NOW)
    assert one.wanted(NOW) == ["KXA-1-T0"]


def test_an_event_of_an_unknown_market_requests_a_refresh() -> None:
    one = universe()
    one.apply_event(lifecycle_event("KXB-1-T0", "activated"), NOW)
    assert not one.refresh_needed
    one.apply_event(lifecycle_event("KXA-1-T0", "activated"), NOW)
    assert one.refresh_needed


def test_a_series_does_not_match_a_longer_name() -> None:
    one = universe(market("KXA-1-T0"), market("KXAB-1-T0"), series=("KXA",))
    assert one.wanted(NOW) == ["KXA-1-T0"]


def test_markets_below_the_minimum_volume_are_not_followed() -> None:
    quiet, busy = market("KXA-1-T0", volume="99.99"), market("KXB-1-T0", volume="100.00")
    one = universe(quiet, busy, everything=True, min_volume=100_00)
    assert one.wanted(NOW) == ["KXB-1-T0"]
    one.apply_list([market("KXA-1-T0", volume="100.50")], NOW)
    assert set(one.wanted(NOW)) == {"KXA-1-T0", "KXB-1-T0"}


def test_a_named_market_is_followed_while_it_is_named() -> None:
    one = universe(market("KXA-1-T0", closes=NOW - HOUR, status="closed"), tickers=("KXA-1-T0",))
    assert one.wanted(NOW) == ["KXA-1-T0"]
    one.set_tickers(["KXB-1-T0"])
    assert one.unknown == ["KXB-1-T0"]
    assert one.wanted(NOW) == []
    one.apply_event(created("KXB-1-T0", NOW, NOW + HOUR), NOW)
    assert one.wanted(NOW) == ["KXB-1-T0"]


LIVES = st.lists(
    st.tuples(st.integers(-500, 500), st.integers(1, 500)), min_size=1, max_size=8, unique=True
)


@given(LIVES, st.lists(st.integers(1, 60), max_size=40))
@hypothesis_settings(max_examples=150, deadline=None)
def test_wanted_when_due_equals_wanted_always(
    lives: list[tuple[int, int]], steps: list[int]
) -> None:
    markets = [
        market(f"KXA-1-T{n}", NOW + opens, NOW + opens + span, status="initialized")
        for n, (opens, span) in enumerate(lives)
    ]
    one = universe(*markets)
    now, answer = NOW, one.wanted(NOW)
    for step in steps:
        now += step
        one.as_of_s = now + 2 * rules.CACHED_S
        if one.is_due(now):
            answer = one.wanted(now)
        expected = [
            m.ticker
            for m in markets
            if m.open_time is not None
            and m.close_time is not None
            and m.open_time.timestamp() - JOIN_BEFORE_S
            <= now
            < m.close_time.timestamp() + LEAVE_AFTER_S
        ]
        assert answer == expected


# -- the settings and REST -------------------------------------------------------------------------


class Rest:
    """A fake REST client: a list of markets and the queries received."""

    def __init__(self, *markets: Market) -> None:
        self.listed = list(markets)
        self.asked: list[dict[str, Any]] = []
        self.away = False

    def markets(
        self, *, report: ReportUnreadable = log_unreadable, **question: Any
    ) -> list[Market]:
        """Every item can be read, so nothing is reported."""
        if self.away:
            raise Unreachable("away")
        question = {name: value for name, value in question.items() if value is not None}
        self.asked.append(question)
        return [m for m in self.listed if _answers(m, **question)]


def _answers(
    market: Market,
    *,
    tickers: Iterable[str] | None = None,
    series_ticker: str = "",
    event_ticker: str | None = None,
    min_close_ts: int = 0,
    status: str = "",
    **_: object,
) -> bool:
    closes = market.close_time.timestamp() if market.close_time else float("inf")
    return (
        (tickers is None or market.ticker in set(tickers))
        and (not series_ticker or market.ticker.startswith(series_ticker + "-"))
        and (event_ticker is None or market.event_ticker == event_ticker)
        and closes >= min_close_ts
        and (status != "open" or market.status == "active")
    )


class Watching:
    """A watchlist on a test clock."""

    def __init__(self, rest: Rest, **settings: Any) -> None:
        self.now = NOW
        self.rest = rest
        made = platform_settings.load(
            _env_file=None, prod_keyid="k", prod_keyfile="key.pem", **settings
        )
        self.watchlist = Watchlist(made, lambda: self.now)

    def turn(self) -> Iterable[str] | None:
        self.watchlist.reload_file()
        query = self.watchlist.due_query()
        if query is not None:
            self.watchlist.apply(query, query.fetch(self.rest))  # type: ignore[arg-type]
        return self.watchlist.wanted()


def test_the_first_query_is_full_and_later_ones_incremental() -> None:
    rest = Rest(market("KXA-1-T0"), market("KXB-1-T0"), market("KXC-1-T0"))
    watching = Watching(rest, market_series="KXA", market_events="KXB-1")
    assert set(watching.turn() or ()) == {"KXA-1-T0", "KXB-1-T0"}
    not_closed = int(NOW) - 60
    assert rest.asked == [
        {"event_ticker": "KXB-1"},
        {"series_ticker": "KXA", "min_close_ts": not_closed},
        {"series_ticker": "KXA", "status": "open"},
    ]
    rest.asked.clear()
    for _ in range(int(RELIST_S)):  # one turn per second
        watching.now += 1
        watching.turn()
    changed = [question for question in rest.asked if "min_updated_ts" in question]
    assert len(changed) == RELIST_S // REFRESH_S - 1
    assert all(question.keys() == {"min_updated_ts", "mve_filter"} for question in changed)
    assert len(rest.asked) == len(changed) + 3  # and one full query


def test_named_markets_are_not_polled() -> None:
    rest = Rest(market("KXA-1-T0"))
    watching = Watching(rest, market_tickers="KXA-1-T0")
    assert watching.turn() == ["KXA-1-T0"]
    for _ in range(1_000):
        watching.now += 1
        watching.turn()
    assert rest.asked == [{"tickers": ("KXA-1-T0",)}]


def test_market_all_excludes_multivariate_markets() -> None:
    rest = Rest(market("KXA-1-T0", volume="3.00"), market("KXB-1-T0", volume="7.00"))
    watching = Watching(rest, market_all=True, market_min_volume=5)
    assert watching.turn() == ["KXB-1-T0"]
    assert rest.asked == [
        {"min_close_ts": int(NOW) - 60, "mve_filter": "exclude"},
        {"status": "open", "mve_filter": "exclude"},
    ]


def test_a_market_trading_past_its_close_is_followed() -> None:
    late = market("KXA-1-T0", NOW - HOUR, NOW - 600)
    rest = Rest(late)
    watching = Watching(rest, market_series="KXA")
    assert watching.turn() == ["KXA-1-T0"]
    watching.now += RELIST_S
    watching.turn()
    assert watching.watchlist.wanted() in (None, ["KXA-1-T0"])
    rest.listed = [market("KXA-1-T0", NOW - HOUR, NOW - 600, "closed")]
    watching.now += RELIST_S
    watching.turn()
    watching.now += LEAVE_AFTER_S + REFRESH_S
    assert watching.turn() == []


@pytest.mark.parametrize("wish", [{"market_series": "KXA"}, {"market_all": True}])
def test_a_market_that_trades_past_its_close_time_is_in_the_catalogue(
    wish: dict[str, Any], tmp_path: Path
) -> None:
    now = time.time()
    rest = Rest(
        market("KXA-1-T0", now - 9 * HOUR, now - 8 * HOUR), market("KXA-1-T1", now, now + 9)
    )
    made = platform_settings.load(_env_file=None, kalshi_data_dir=tmp_path, **wish)
    catalogue = market_catalog.take(made, rest)  # type: ignore[arg-type]
    assert set(catalogue.read["market_ticker"].to_pylist()) == {"KXA-1-T0", "KXA-1-T1"}


@pytest.mark.parametrize(
    ("content", "tickers"),
    [
        (b"\xef\xbb\xbfKXA-1-T0\nKXA-1-T1\n", ["KXA-1-T0", "KXA-1-T1"]),
        ("KXA-1-T0\u200b\r\n\u00a0KXA-1-T1\u2060\n\u200b\n".encode(), ["KXA-1-T0", "KXA-1-T1"]),
    ],
)
def test_invisible_characters_in_market_file_are_removed(
    tmp_path: Path, content: bytes, tickers: list[str]
) -> None:
    file = tmp_path / "tickers.txt"
    file.write_bytes(content)
    watching = Watching(Rest(market("KXA-1-T0"), market("KXA-1-T1")), market_file=file)
    assert watching.turn() == tickers


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("KXA-1-T0\n".encode("utf-16"), "save it again as UTF-8"),
        ("KX\u200bA-1-T0\n".encode(), "line 1.*which no editor shows"),
        ("KXÄ-1-T0\n".encode("latin-1"), "save it again as UTF-8"),
    ],
)
def test_a_suspicious_market_file_is_an_error(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "tickers.txt"
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=reason) as error:
        Watching(Rest(), market_file=file)
    assert "MARKET_FILE" in str(error.value)


def test_a_failed_query_changes_nothing() -> None:
    opens = NOW + 40
    rest = Rest(market("KXA-1-T0"), market("KXA-1-T1", opens, NOW + HOUR, "initialized"))
    watching = Watching(rest, market_series="KXA")
    assert watching.turn() == ["KXA-1-T0"]
    rest.away = True
    watching.now = opens
    with pytest.raises(Unreachable):
        watching.turn()
    assert watching.watchlist.wanted() == ["KXA-1-T0", "KXA-1-T1"]
    rest.away, rest.listed = False, []
    watching.now += REFRESH_S
    assert watching.turn() == ["KXA-1-T0", "KXA-1-T1"]


def test_missed_lifecycle_events_trigger_a_query() -> None:
    rest = Rest(market("KXA-1-T0"))
    watching = Watching(rest, market_series="KXA")
    watching.turn()
    rest.listed.append(market("KXA-1-T1"))
    watching.now += 1
    watching.watchlist.request_refresh()
    assert watching.turn() == ["KXA-1-T0", "KXA-1-T1"]


def test_market_file_is_reloaded_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "tickers.txt"
    file.write_text("# my markets\nKXA-1-T0  # the first\n\nKXA-1-T0\n")
    rest = Rest(market("KXA-1-T0"), market("KXA-1-T1"), market("KXA-1-T2"))
    watching = Watching(rest, market_file=file, market_tickers="KXA-1-T2")
    assert set(watching.turn() or ()) == {"KXA-1-T2", "KXA-1-T0"}
    write(file, "KXA-1-T1\nNOPE\n")
    watching.now += 1
    assert set(watching.turn() or ()) == {"KXA-1-T2", "KXA-1-T1"}


@pytest.mark.parametrize("spoil", ["gone", "empty", "not text", "two words"])
def test_an_unreadable_market_file_changes_nothing(
    tmp_path: Path, spoil: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "tickers.txt"
    file.write_text("KXA-1-T0\n")
    watching = Watching(Rest(market("KXA-1-T0"), market("KXA-1-T1")), market_file=file)
    assert watching.turn() == ["KXA-1-T0"]
    spoils: dict[str, Callable[[], object]] = {
        "gone": file.unlink,
        "empty": lambda: write(file, "# nothing\n"),
        "not text": lambda: file.write_bytes(b"\xff\xfe\xff"),
        "two words": lambda: write(file, "KXA-1-T0 KXA-1-T1\n"),
    }
    spoils[spoil]()
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            watching.now += REFRESH_S
            watching.turn()
    assert watching.watchlist.wanted() in (None, ["KXA-1-T0"])
    warned = [r.getMessage() for r in caplog.records if "MARKET_FILE" in r.getMessage()]
    assert len(warned) == 1
    assert "stay as they were" in warned[0]
    write(file, "KXA-1-T1\n")
    watching.now += 1
    assert watching.turn() == ["KXA-1-T1"]


def write(file: Path, text: str) -> None:
    """Write the file with a changed mtime, even on a file system with coarse times."""
    file.write_text(text)
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "nothing to record"),
        ({"market_file": "/nonexistent/tickers.txt"}, "MARKET_FILE"),
        ({"market_min_volume": 5, "market_series": "KXA"}, "MARKET_ALL"),
        ({"market_min_volume": -1, "market_all": True}, "MARKET_MIN_VOLUME"),
    ],
)
def test_an_invalid_market_selection_is_an_error(given: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        Watching(Rest(), **given)


def test_all_unknown_tickers_are_an_error_some_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(SettingsError, match="NOPE-1, NOPE-2"):
        Watching(Rest(), market_tickers="NOPE-1,NOPE-2").turn()
    watching = Watching(Rest(market("KXA-1-T0")), market_tickers="KXA-1-T0,NOPE-1")
    with caplog.at_level(logging.WARNING):
        assert watching.turn() == ["KXA-1-T0"]
    assert "the market NOPE-1" in caplog.text
    watching.rest.listed.append(market("NOPE-1"))
    watching.now += RELIST_S
    assert watching.turn() == ["KXA-1-T0", "NOPE-1"]
