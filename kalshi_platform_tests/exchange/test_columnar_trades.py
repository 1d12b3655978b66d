"""Trade frames to rows: exactly the numbers of the wire, in every form ever sent, or kept raw."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.exchange.columnar import decode
from kalshi_platform.exchange.numbers import ONE_DOLLAR
from kalshi_platform.journal.kind import Kind
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.rows import build_rows
from kalshi_platform_tests import wire
from kalshi_platform_tests.properties import examples

SHARED_FRAMES = Path(__file__).resolve().parents[2].parent / "shared" / "frames"
CONN = wire.conn_id(1)


def rows(*frames: bytes) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Decode frames; return (trades, stream events but for the wire's drift) as the stores receive them."""
    records = [wire.connected(CONN, wire.NOON_NS)]
    records += [(wire.NOON_NS + n, CONN, Kind.TRADE, frame) for n, frame in enumerate(frames)]
    derived, _ = build_rows(decode(wire.blocks(records)), BookState())
    trades, stream = (derived.tables[name] for name in ("trades", "stream_events"))
    events = [row for row in stream.to_pylist()[1:] if row["kind"] != "unknown_field"]
    return trades.to_pylist(), events


def frame(seq: int | None = 1, **body: Any) -> bytes:
    numbered = {} if seq is None else {"seq": seq}
    return json.dumps({"type": "trade", "sid": 2, **numbered, "msg": body}).encode() + b"\n"


CURRENT: dict[str, Any] = {
    "trade_id": "d91bc706-ee49-470d-82d8-11418bda6fed",
    "market_ticker": "HIGHNY-22DEC23-B53.5",
    "yes_price_dollars": "0.3600",
    "no_price_dollars": "0.6400",
    "count_fp": "136.00",
    "taker_side": "no",
    "taker_outcome_side": "no",
    "taker_book_side": "ask",
    "is_block_trade": False,
    "ts": 1669149841,
    "ts_ms": 1669149841123,
}
ROW = {
    "conn_id": "00000000-0000-0000-0000-000000000001",
    "sid": 2,
    "seq": 1,
    "trade_id": "d91bc706-ee49-470d-82d8-11418bda6fed",
    "market_ticker": "HIGHNY-22DEC23-B53.5",
    "yes_price": Decimal("0.3600"),
    "no_price": Decimal("0.6400"),
    "qty": Decimal("136.00"),
    "taker_outcome_side": "no",
    "taker_book_side": "ask",
    "is_block_trade": False,
    "ts": datetime(2022, 11, 22, 20, 44, 1, 123_000, UTC),
    "ingest_ts": datetime.fromtimestamp(wire.NOON_NS // wire.SECOND, UTC),
    "shard": 0,
    "record": 1,
    "sent_ts": None,
}


def test_a_trade_row_has_the_numbers_of_the_wire() -> None:
    assert rows(frame(**CURRENT)) == ([ROW], [])


def test_a_trade_row_has_the_time_of_sending() -> None:
    sent = frame(**CURRENT).replace(b'"seq"', b'"sending_ts_ms": 1669149841125, "seq"')
    at = datetime(2022, 11, 22, 20, 44, 1, 125_000, UTC)
    assert rows(sent) == ([{**ROW, "sent_ts": at}], [])
    unusual = sent.replace(b'"0.3600"', b'"0.36"')  # the slow path
    assert unusual != sent
    assert rows(unusual) == rows(sent)


@pytest.mark.parametrize("value", [b'"soon"', b"-1", b"1.5", b"true", b"99999999999999", b"9" * 30])
def test_an_unreadable_time_of_sending_costs_only_itself(value: bytes) -> None:
    sent = frame(**CURRENT).replace(b'"seq"', b'"sending_ts_ms":' + value + b', "seq"')
    found, (odd,) = rows(sent)
    assert found == [ROW]
    assert (odd["kind"], odd["seq"]) == ("malformed_field", 0)
    assert json.loads(odd["detail"])["field"] == "sending_ts_ms"


def test_integer_cents_give_the_same_row() -> None:
    old = {k: CURRENT[k] for k in ("market_ticker", "taker_side", "ts")}
    legacy = frame(**old, yes_price=36, no_price=64, count=136)
    at = datetime(2022, 11, 22, 20, 44, 1, tzinfo=UTC)
    assert rows(legacy) == ([{**ROW, "trade_id": "", "ts": at}], [])
    dual = frame(**old, yes_price=36, yes_price_dollars="0.360", count=136, count_fp="136.00")
    assert rows(dual) == rows(legacy)


def test_a_backfilled_trade_gives_the_same_row_without_seq() -> None:
    rest_trade = {k: v for k, v in CURRENT.items() if k not in {"market_ticker", "ts", "ts_ms"}}
    rest_trade |= {
        "ticker": CURRENT["market_ticker"],
        "created_time": "2022-11-22T20:44:01.123987Z",
    }
    assert rows(frame(None, **rest_trade)) == ([{**ROW, "seq": 0}], [])


def test_both_paths_together_keep_record_order() -> None:
    unusual = {**CURRENT, "yes_price_dollars": "0.36", "no_price_dollars": "0.64"}
    found, stream = rows(frame(1, **CURRENT), frame(2, **unusual), frame(3, **CURRENT))
    assert [row["seq"] for row in found] == [1, 2, 3]
    assert {(row["yes_price"], row["qty"]) for row in found} == {(ROW["yes_price"], ROW["qty"])}
    assert stream == []


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"trade_id": 7}, "Expected `str"),
        ({"market_ticker": ""}, "no market_ticker"),
        ({"yes_price_dollars": "1.0001"}, "outside 0 to"),
        ({"yes_price_dollars": "0.36001"}, "more than 4 decimals"),
        ({"yes_price_dollars": None, "no_price_dollars": None}, "no price"),
        ({"count_fp": "0.00"}, "not above zero"),
        ({"count_fp": "-5.00"}, "not above zero"),
        ({"count_fp": None}, "no count"),
        ({"taker_outcome_side": "maybe"}, "neither yes nor no"),
        ({"taker_book_side": "left"}, "neither bid nor ask"),
        ({"ts": None, "ts_ms": None}, "no time"),
        ({"ts_ms": 1 << 60}, "no Unix time"),
        ({"ts_ms": "soon"}, "int"),
    ],
)
def test_an_unreadable_trade_is_kept_raw_and_its_number_counts(
    broken: dict[str, Any], says: str
) -> None:
    sent = frame(7, **{**CURRENT, **broken})
    found, stream = rows(frame(6, **CURRENT), sent, frame(8, **CURRENT))
    assert [row["seq"] for row in found] == [6, 8]
    (row,) = stream
    assert (row["kind"], row["sid"], row["seq"]) == ("malformed", 2, 7)
    detail = json.loads(row["detail"])
    assert says in detail["reason"]
    assert detail["frame"] == sent.decode().rstrip("\n")


def test_the_documented_example_is_read() -> None:
    path = SHARED_FRAMES / "docs_examples_current.jsonl"
    if not path.exists():
        pytest.skip("the documented frames are not beside this checkout")
    lines = [line for line in path.read_bytes().splitlines() if b'"type":"trade"' in line]
    found, stream = rows(*lines)
    assert [(row["market_ticker"], row["yes_price"], row["qty"]) for row in found] == [
        ("HIGHNY-22DEC23-B53.5", Decimal("0.3600"), Decimal("136.00"))
    ]
    assert stream == []


def test_a_trade_in_an_old_journal_stays_a_stream_event() -> None:
    """Before trades had a kind they were recorded as CONTROL; their rows must not change."""
    records = [
        wire.connected(CONN, wire.NOON_NS),
        (wire.NOON_NS, CONN, Kind.CONTROL, frame(**CURRENT)),
    ]
    derived, _ = build_rows(decode(wire.blocks(records)), BookState())
    assert derived.tables["trades"].num_rows == 0
    assert derived.tables["stream_events"].to_pylist()[1]["kind"] == "trade"


ODD: dict[str, list[Any]] = {
    "trade_id": [None, "", 7, "x"],
    "market_ticker": [None, "", "Ü", 5],
    "ticker": [None, "A-1", 5],
    "yes_price_dollars": [None, "0.36", "1.0000", "-0.1000", "1e3", 0.36],
    "no_price_dollars": [None, "0.6400", "0.64", "x"],
    "yes_price": [None, 36, "36", 10**30],
    "count_fp": [None, "136", "0.00", "1" * 30, "-1.00", 5],
    "count": [None, 136, 1.5, 10**20],
    "taker_outcome_side": [None, "", "yes", "maybe"],
    "taker_book_side": [None, "", "bid", "left"],
    "taker_side": [None, "yes", 5],
    "is_block_trade": [None, True, "no"],
    "ts": [None, 5, "soon", 10**18],
    "ts_ms": [None, 5, -5, 1.0, 10**15, 10**30],
    "created_time": [None, "2022-11-22T20:44:01Z", "2022-11-22", 5],
}


@given(st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in ODD.items()}))
@examples(300)
def test_both_decoding_paths_agree(unusual: dict[str, Any]) -> None:
    sent = frame(7, **{**CURRENT, **unusual})
    alone = rows(sent)
    beside = rows(sent, frame(8, **{**CURRENT, "ts_ms": "this sends all to the slow path"}))
    assert beside[0] == alone[0]
    assert beside[1][: len(alone[1])] == alone[1]
    assert len(alone[0]) + len(alone[1]) == 1


FORMS: dict[str, Callable[[int, int, int], bytes]] = {
    "current": lambda seq, yes, qty: wire.trade("A-1", seq, yes, qty),
    "cents": lambda seq, yes, qty: frame(
        seq,
        trade_id=wire.trade_id(seq),
        market_ticker="A-1",
        yes_price=yes // 100,
        count=qty // 100,
        taker_side="no",
        ts=1786085188,
    ),
    "garbage": lambda seq, _yes, _qty: frame(seq, trade_id="x"),
}


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(FORMS)), st.integers(0, 100), st.integers(1, 10**6)),
        max_size=30,
    ),
    st.lists(st.integers(1, 30), max_size=3),
)
@examples(60)
def test_each_trade_is_one_row_for_any_split_of_the_range(
    sent: list[tuple[str, int, int]], cuts: list[int]
) -> None:
    frames = [
        FORMS[form](n, cents * 100, qty * 100) for n, (form, cents, qty) in enumerate(sent, 1)
    ]
    records = [wire.connected(CONN, wire.NOON_NS)]
    records += [(wire.NOON_NS + n, CONN, Kind.TRADE, frame) for n, frame in enumerate(frames)]
    state, found, malformed = BookState(), [], []
    for block in wire.blocks(records, cuts):
        derived, state = build_rows(decode([block]), state)
        found += derived.tables["trades"].to_pylist()
        malformed += [
            row["seq"]
            for row in derived.tables["stream_events"].to_pylist()
            if row["kind"] == "malformed"
        ]
    expected = [
        (n, Decimal(cents * 100).scaleb(-4), Decimal(ONE_DOLLAR - cents * 100).scaleb(-4), qty)
        for n, (form, cents, qty) in enumerate(sent, 1)
        if form != "garbage"
    ]
    assert [(r["seq"], r["yes_price"], r["no_price"], int(r["qty"])) for r in found] == expected
    assert malformed == [n for n, (form, _, _) in enumerate(sent, 1) if form == "garbage"]
