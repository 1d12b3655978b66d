"""The wire's texts, letter by letter."""

from __future__ import annotations

import json

import pytest

from kalshi_platform.simulator.book import NO, YES, Book
from kalshi_platform.simulator.frames import (
    Delta,
    Trade,
    envelope,
    error,
    reply,
    rfc3339,
    snapshot,
    unknown_market,
)
from kalshi_platform.simulator.grid import grid
from kalshi_platform.simulator.market import Listing, Market
from kalshi_platform.simulator.wire import Wire

LISTING = Listing(
    ticker="KXA-26-T1",
    event_ticker="KXA-26",
    series_ticker="KXA",
    title="A",
    subtitle="a",
    grid=grid("linear_cent"),
    created_ns=0,
    open_ns=0,
    close_ns=1,
    weight=1.0,
)
AT = 1_786_085_188_416_250
HEAD = '{"market_ticker":"KXA-26-T1","market_id":"some-id"'


@pytest.fixture
def market() -> Market:
    return Market(LISTING, "some-id", Book(LISTING.grid))


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (1_669_149_841_000_000, "2022-11-22T20:44:01Z"),
        (1_669_149_841_500_000, "2022-11-22T20:44:01.5Z"),
        (1_669_149_841_000_010, "2022-11-22T20:44:01.00001Z"),
        (1_669_149_841_123_456, "2022-11-22T20:44:01.123456Z"),
        (1_669_149_850_000_000, "2022-11-22T20:44:10Z"),
    ],
)
def test_trailing_zeros_of_a_time_are_trimmed(us: int, text: str) -> None:
    assert rfc3339(us) == text


@pytest.mark.parametrize(
    ("wire", "clock", "ts"),
    [
        (Wire.OCTOBER, ',"clock":3980945', "2026-08-07T06:46:28.410Z"),
        (Wire.AUGUST, "", "2026-08-07T06:46:28.41025Z"),
    ],
)
def test_a_delta_reads_as_that_wires_do(market: Market, wire: Wire, clock: str, ts: str) -> None:
    def msg(use_yes_price: bool) -> str:
        return Delta(market, NO, 36, -7835, ts_us=AT - 6_000, clock=3_980_945).msg(
            use_yes_price, wire
        )

    rest = f'"delta_fp":"-78.35","side":"no","ts":"{ts}","ts_ms":1786085188410}}'
    assert msg(use_yes_price=False) == f'{HEAD}{clock},"price_dollars":"0.3700",{rest}'
    assert msg(use_yes_price=True) == f'{HEAD}{clock},"price_dollars":"0.6300",{rest}'


def test_an_envelope_carries_the_time_of_sending() -> None:
    assert envelope("ticker", 2, None, "{}", command_id=7, sent_ms=5) == (
        b'{"type":"ticker","id":7,"sid":2,"sending_ts_ms":5,"msg":{}}\n'
    )
    assert envelope("orderbook_delta", 1, 219, "{}") == (
        b'{"type":"orderbook_delta","sid":1,"seq":219,"msg":{}}\n'
    )


def test_a_snapshot_ascends_and_leaves_an_empty_side_out(market: Market) -> None:
    def text(use_yes_price: bool) -> str:
        return snapshot(market, use_yes_price, Wire.AUGUST)

    assert text(use_yes_price=False) == HEAD + "}"
    assert snapshot(market, False, Wire.OCTOBER) == HEAD + ',"clock":0}'
    market.book.change(NO, 47, 300)
    market.book.change(NO, 7, 30_092)
    levels = '[["0.0800","300.92"],["0.4800","3.00"]]'
    assert text(use_yes_price=False) == f'{HEAD},"no_dollars_fp":{levels}}}'
    mirrored = '[["0.9200","300.92"],["0.5200","3.00"]]'
    assert text(use_yes_price=True) == f'{HEAD},"no_dollars_fp":{mirrored}}}'


def test_a_ticker_that_would_break_json_is_quoted() -> None:
    assert json.loads(unknown_market('A"B', Wire.OCTOBER)) == {
        "market_ticker": 'A"B',
        "market_id": "",
        "clock": 0,
    }


def test_a_trade_has_the_takers_side(market: Market) -> None:
    trade = Trade(market, taker=YES, yes_price=3600, qty=13_600, ts_us=AT, trade_id="t")
    wire, rest = json.loads(trade.wire()), trade.rest()
    assert (wire["yes_price_dollars"], wire["no_price_dollars"]) == ("0.3600", "0.6400")
    assert (wire["taker_outcome_side"], wire["taker_book_side"]) == ("yes", "bid")
    assert (wire["count_fp"], wire["ts"], wire["ts_ms"]) == ("136.00", 1786085188, 1786085188416)
    assert rest["created_time"] == "2026-08-07T06:46:28.41625Z"


def test_replies_leave_out_what_they_do_not_have() -> None:
    assert reply("unsubscribed", 102, None, sid=2, seq=7) == (
        b'{"type":"unsubscribed","id":102,"sid":2,"seq":7}\n'
    )
    assert error(8, command_id=124) == (
        b'{"type":"error","id":124,"msg":{"code":8,"msg":"Unknown channel name"}}\n'
    )
