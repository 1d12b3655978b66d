"""Any failure of a background task is reported and retried while recording goes on."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import polars as pl
import pytest

from kalshi_platform.commands import doctor
from kalshi_platform.exchange.auxiliary_channel import TRADES, MissedFrames
from kalshi_platform.exchange.errors import CredentialsError, ProtocolError
from kalshi_platform.exchange.frames import LifecycleEvent
from kalshi_platform.exchange.rest import RestClient
from kalshi_platform.health import health_report
from kalshi_platform.journal import reader
from kalshi_platform.quality import book_audit
from kalshi_platform.recorder import (
    background,
    market_selection,
    streamer,
    trade_backfill,
    universe,
    upkeep,
)
from kalshi_platform.recorder.background import Tasks
from kalshi_platform.recorder.capture import Capture, MissedSpan
from kalshi_platform.recorder.market_selection import MarketQuery, Watchlist, _TickerFile
from kalshi_platform.recorder.streamer import Streamer
from kalshi_platform.recorder.universe import MarketSelection, Universe
from kalshi_platform.recorder.upkeep import Upkeep
from kalshi_platform_tests.commands.test_doctor import checked
from kalshi_platform_tests.commands.test_doctor import report as doctor_report
from kalshi_platform_tests.recorder.test_streamer import (
    archived,
    proved,
    query,
    settings_for,
    streaming,
    wait_for,
)
from kalshi_platform_tests.simulator_fixtures import StartSimulator

__all__ = ["settings_for"]

SOUGHT = (
    (upkeep, (Upkeep,)),
    (market_selection, (Watchlist, MarketQuery, _TickerFile)),
    (universe, (Universe, MarketSelection)),
    (trade_backfill, ()),
    (book_audit, (book_audit.Recent,)),
)
"""Modules and classes whose every function is made to fail; `OTHERS` adds single functions."""
OTHERS: tuple[tuple[Any, str], ...] = (
    (RestClient, "markets"),
    (RestClient, "orderbooks"),
    (RestClient, "trades_as_sent"),
    (market_selection, "share"),
    (Capture, "follow"),
    (Capture, "record_backfill"),
    (Capture, "note"),
    (Streamer, "_compare_books"),
    (Streamer, "_caught_up"),
    (Streamer, "_report_comparison"),
    (Streamer, "_publish"),
    (Streamer, "_save_report"),
    (Streamer, "_prune"),
    (Streamer, "_prune_drained"),
    (reader, "prune"),
    (streamer, "prune_hour_states"),
)
LEFT_OUT = {
    # run only at the start; an empty selection is an error of the settings, the rest is tested below
    *("Upkeep.first_selection", "selection_of", "_selection", "load_history"),
    # bound at the start, so replacing them has no effect: every function that they call fails instead
    *("Upkeep.look_up", "Upkeep.apply_events", "Upkeep.handle_missed"),
    # where MARKET_FILE changes or cannot be read, or a ticker is not known
    *(
        "_TickerFile._warn",
        "_TickerFile._read",
        "_TickerFile._fingerprint",
        "_reason",
        "Universe.set_tickers",
    ),
    # called only for a channel that missed frames
    "Watchlist.request_refresh",
    # called only after a failure
    *("Watchlist.invalidate", "Universe.invalidate"),
}


class Panic(BaseException):
    """Like a panic of a native library: not an `Exception`."""


def functions() -> Iterator[tuple[Any, str]]:
    """Every function of the background tasks."""
    for module, classes in SOUGHT:
        yield from ((module, name) for name in _of(module))
        yield from ((one, name) for one in classes for name in _of(one))
    yield from OTHERS


def qualified(owner: Any, name: str) -> str:
    return name if isinstance(owner, ModuleType) else f"{owner.__name__}.{name}"


def _of(owner: ModuleType | type) -> list[str]:
    module = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__
    return [
        name
        for name, value in vars(owner).items()
        if isinstance(value, FunctionType)
        and value.__module__ == module
        and not name.startswith("__")
    ]


def failing(act: Callable[..., Any], error: BaseException, calls: list[str]) -> Callable[..., Any]:
    """A replacement of `act` of which every call raises."""

    def raising(*_: Any, **__: Any) -> Any:
        calls.append(threading.current_thread().name)
        raise error

    async def raising_later(*_: Any, **__: Any) -> Any:
        raising()

    return raising_later if inspect.iscoroutinefunction(act) else raising


def test_recording_survives_a_failure_in_any_task_call(
    start_simulator: StartSimulator,
    settings_for: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    for owner, name, value in (
        (upkeep, "INTERVAL_S", 0.005),
        (upkeep, "TIMETABLE_S", 0.02),
        (market_selection, "REFRESH_S", 0.02),
        (market_selection, "RELIST_S", 0.05),
        (trade_backfill, "DELAY_S", 0.0),
        (background, "RETRY_MIN_S", 0.02),
        (background, "RETRY_MAX_S", 0.05),
        (book_audit, "CACHE_S", 0.2),
        (streamer, "HEALTH_S", 0.02),
        (streamer, "PRUNE_S", 0.02),
        (upkeep, "BACKFILL_ATTEMPTS", 1_000_000),
    ):
        monkeypatch.setattr(owner, name, value)
    simulator = start_simulator(markets=4, rate=400.0)
    file = tmp_path / "markets.txt"
    file.write_text("\n".join(list(simulator.books())[:2]))
    settings = settings_for(
        simulator, market_series="KXFED", market_file=file, audit_interval_seconds=0.05
    )
    errors = (ValueError("odd"), OSError(5, "odd"), Panic("odd"), asyncio.CancelledError("odd"))
    named = list[BaseException]()
    name_it = Tasks.failed

    def failed_by(
        self: Tasks, name: str, error: BaseException, retry_s: float | None = None
    ) -> None:
        name_it(self, name, error, retry_s)
        named.append(error)

    monkeypatch.setattr(Tasks, "failed", failed_by)
    with streaming(settings) as it:
        wait_for(lambda: it.health().synced >= 2, "books")
        sought = [each for each in functions() if qualified(*each) not in LEFT_OUT]
        for number, (owner, name) in enumerate(sought):
            what, error, calls = qualified(owner, name), errors[number % 4], list[str]()
            named.clear()
            with monkeypatch.context() as patched:
                patched.setattr(owner, name, failing(getattr(owner, name), error, calls))
                wait_for(lambda c=calls: c or _provoke(it), f"a call of {what}")  # type: ignore[misc]
                wait_for(lambda e=error: e in named, f"the name of {what}")  # type: ignore[misc]
                assert it.failure() is None, what
            frames = it.health().frames
            wait_for(lambda f=frames: it.health().frames > f + 20, f"frames after {what}")  # type: ignore[misc]
            wait_for(lambda: not _failing(it), f"recovery from {what}")
        failed = set(it.health().tasks)
        assert it.health().state == "streaming"
    kept = {kind for (kind,) in query(settings, "SELECT DISTINCT kind FROM stream_events")}
    assert {"task_failed", "task_recovered"} <= kept
    assert {upkeep.LOOK_UP, upkeep.SELECTION, upkeep.BACKFILL, streamer.AUDIT} <= failed
    assert {streamer.REPORT, streamer.SAVED_REPORT, streamer.PRUNING, streamer.OBSERVER} <= failed
    proved(settings)


def _failing(it: Streamer) -> list[str]:
    return [name for name, each in it._tasks.states.items() if each.failing_since_ns]


def _provoke(it: Streamer) -> bool:
    """Cause rare events: a lifecycle event of an ended market, and missed trades."""
    keeper = it._capture
    assert keeper is not None
    assert keeper._session is not None
    now_ns = time.time_ns()
    lost = MissedFrames(TRADES, 2, 0.0, 0.0, "connection")
    loss = MissedSpan(lost, bytes(16), now_ns - 10**9, now_ns, frozenset(keeper._session.tickers))
    events = [
        LifecycleEvent("KXFED-00-OLD", "created", 1, 2, {"event_ticker": "KXFED-00"}),
        LifecycleEvent("KXNOT-00-OURS", "created", 1, 2, {"event_ticker": "KXNOT-00"}),
    ]
    for act, given in ((keeper._on_missed, loss), (keeper._on_lifecycle_events, events)):
        assert act is not None
        it._call_in_loop(act, given)
    return False


@pytest.mark.parametrize("error", [ValueError("odd"), OSError(5, "odd"), ProtocolError("odd")])
def test_the_first_market_list_is_retried_after_any_failure(
    error: Exception,
    start_simulator: StartSimulator,
    settings_for: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upkeep, "RETRY_S", 0.01)
    simulator = start_simulator(markets=2, rate=400.0)
    settings = settings_for(simulator, market_series="KXFED", use_clickhouse=False)
    calls = list[str]()
    with monkeypatch.context() as patched:
        patched.setattr(RestClient, "markets", failing(RestClient.markets, error, calls))
        patched.setattr(streamer, "load_history", failing(trade_backfill.load_history, error, []))
        it = Streamer(settings)
        it.start()
        wait_for(lambda: len(calls) > 3, "tries")
        assert it.failure() is None
        assert set(it.health().tasks) == {upkeep.LOOK_UP, streamer.MEMORY}
        assert "odd" in it.health().tasks[upkeep.LOOK_UP].reason
    wait_for(lambda: it.health().frames > 50, "frames")
    assert it.health().tasks[upkeep.LOOK_UP].failing_since_ns == 0
    assert it.stop(60.0)


def test_doctor_reports_a_failing_task_until_it_recovers(
    tmp_path: Path,
) -> None:
    notes: list[tuple[str, dict[str, object]]] = []
    of = Tasks(lambda kind, detail: notes.append((kind, dict(detail))))
    for _ in range(3):
        with of.guarded("market look-up"):
            raise ValueError("'12.3456' has more than 2 decimals")
    state = of.states["market look-up"]
    assert (state.failures, bool(state.failing_since_ns)) == (3, True)
    failing = {"market look-up": {"failing_since_ns": 1, "reason": state.reason}}
    doctor_report(tmp_path, tasks=failing)
    said = checked("streamer", tmp_path)
    assert said.mark is doctor.Mark.ODD
    assert "its market look-up has failed for" in said.text
    assert "ValueError: '12.3456'" in said.text
    with of.guarded("market look-up"):
        pass
    assert not of.states["market look-up"].failing_since_ns
    assert [kind for kind, _ in notes] == ["task_failed", "task_recovered"]


def test_a_failed_capture_drains_the_stores_and_reports_why(
    start_simulator: StartSimulator,
    settings_for: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The event loop is closed by then: the remaining work must not need it."""
    simulator = start_simulator(markets=2, rate=400.0)
    settings = settings_for(simulator, use_clickhouse=False)
    it = Streamer(settings)
    it.start()
    wait_for(lambda: it.health().synced == 2 and it.health().frames > 100, "frames")
    refused = CredentialsError("The exchange does not know PROD_KEYID.")

    async def refusing(*_: Any) -> Any:
        raise refused

    monkeypatch.setattr("kalshi_platform.recorder.capture.dial", refusing)
    simulator.inject("drop")
    wait_for(lambda: it.failure() is refused, "the end of the recording")
    wait_for(lambda: it._loop is not None and it._loop.is_closed(), "the end of its loop")
    assert it.stop(60.0)
    said = health_report.read(settings.journal_dir())
    assert said is not None
    assert (said["state"], said["trouble"]) == ("stopped", str(refused))
    assert said["stores"]["parquet"]["lag"] == 0
    events = archived(settings, "orderbook_events")
    assert events.filter(pl.col("type") == "delta").height == it.health().deltas
