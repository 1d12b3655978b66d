"""Trade backfill: delivered trades are excluded, and a span beyond a limit is reported, not fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kalshi_platform.exchange.answers import Trade
from kalshi_platform.exchange.auxiliary_channel import TRADES, MissedFrames
from kalshi_platform.exchange.frames import decode_trade
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.writer import Writer
from kalshi_platform.recorder import trade_backfill
from kalshi_platform.recorder.capture import RECENT_TRADES, MissedSpan
from kalshi_platform.recorder.trade_backfill import History, fetch, load_history, select_missed
from kalshi_platform_tests import wire

SINCE = wire.NOON_NS


def missed_span(seconds: float = 5.0, *tickers: str) -> MissedSpan:
    missed = MissedFrames(TRADES, 3, 0.0, seconds, "sequence", 2)
    until = SINCE + int(seconds * wire.SECOND)
    return MissedSpan(missed, wire.conn_id(1), SINCE, until, frozenset(tickers or ("A-1",)))


class Rest:
    """REST's trades, newest first."""

    def __init__(self, *numbered: tuple[int, str]) -> None:
        self._numbered = numbered
        self.span: dict[str, Any] = {}

    def trades_as_sent(self, **span: Any) -> Iterator[tuple[Trade, bytes]]:
        self.span = span
        for number, ticker in self._numbered:
            sent: dict[str, Any] = {
                "trade_id": wire.trade_id(number),
                "ticker": ticker,
                "count_fp": "1.00",
                "yes_price_dollars": "0.4000",
                "no_price_dollars": "0.6000",
                "created_time": f"2026-09-21T14:13:{number:02d}Z",
                "taker_outcome_side": "yes",
                "taker_book_side": "bid",
            }
            yield msgspec.json.decode(json.dumps(sent), type=Trade), json.dumps(sent).encode()


def find(rest: Rest, span: MissedSpan, recent: list[tuple[int, bytes]]) -> trade_backfill.Backfill:
    return select_missed(fetch(rest, span), span, recent)  # type: ignore[arg-type]


def test_only_missed_trades_are_selected_oldest_first() -> None:
    rest = Rest((4, "A-1"), (3, "OTHER"), (2, "A-1"), (1, "A-1"), (1, "A-1"))
    found = find(rest, missed_span(), [(SINCE, wire.trade("A-1", 9, 4_000, 100, number=2))])
    ids = [decode_trade(frame).trade_id for frame in found.frames]
    assert ids == [wire.trade_id(1), wire.trade_id(4)]
    assert found.reason == ""
    noon = wire.NOON_NS // wire.SECOND
    assert rest.span == {
        "ticker": "A-1",
        "min_ts": noon - trade_backfill.MARGIN_S,
        "max_ts": noon + 6 + trade_backfill.MARGIN_S,
    }


def test_many_markets_are_queried_together() -> None:
    many = [f"T-{n}" for n in range(trade_backfill.SINGLE_REQUESTS_MAX + 1)]
    rest = Rest((1, "T-1"), (2, "OTHER"))
    assert len(find(rest, missed_span(5.0, *many), []).frames) == 1
    assert rest.span["ticker"] is None


def test_a_span_that_is_too_long_is_only_reported() -> None:
    rest = Rest((1, "A-1"))
    found = find(rest, missed_span(trade_backfill.MAX_SPAN_S + 1.0), [])
    assert found.frames == ()
    assert "3601 s" in found.reason
    assert rest.span == {}


def test_without_enough_history_nothing_is_backfilled() -> None:
    """A trade that the stream delivered could be stored twice."""
    recent = [(SINCE, wire.trade("A-1", n, 4_000, 100)) for n in (1, 2)] * (RECENT_TRADES // 2)
    found = find(Rest((7, "A-1")), missed_span(), recent)
    assert found.frames == ()
    assert "than are kept" in found.reason


def test_too_many_trades_are_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trade_backfill, "MAX_TRADES", 2)
    found = find(Rest(*((n, "A-1") for n in range(9))), missed_span(), [])
    assert found.frames == ()
    assert "more than 2" in found.reason


def test_history_has_the_last_trades_and_the_end_time(tmp_path: Path) -> None:
    conn = wire.conn_id(1)
    old, new = wire.trade("A-1", 1, 4_000, 100), wire.trade("A-1", 2, 4_000, 100)
    for records in (
        [(SINCE, conn, Kind.TRADE, old)],
        [
            (SINCE + 100 * wire.SECOND, conn, Kind.TRADE, new),
            (SINCE + 101 * wire.SECOND, conn, Kind.CONTROL, wire.ok(3)),
        ],
    ):
        writer = Writer(tmp_path)
        for record in records:
            writer.append(*record)
        writer.close()
    writer = Writer(tmp_path)
    began = writer.next_n
    writer.append(SINCE + 500 * wire.SECOND, conn, Kind.TRADE, new)
    writer.close()
    memory = load_history(tmp_path, began)
    assert memory == History(SINCE + 101 * wire.SECOND, [(SINCE + 100 * wire.SECOND, new)])
    assert memory.last_received(SINCE + 103 * wire.SECOND, 50.0) == 48.0


def test_a_new_journal_has_no_history(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    memory = load_history(tmp_path, writer.next_n)
    writer.close()
    assert memory == History(0, ())
    assert memory.last_received(SINCE, 50.0) is None
