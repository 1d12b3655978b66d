"""Decoding: nearly valid frames mean the same on both paths, and stop nothing."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from kalshi_platform.exchange.columnar import KEPT_BYTES_OF_LARGE, Decoded, decode
from kalshi_platform.exchange.frames import SNAPSHOT_BYTES, DecodeError, decode_snapshot
from kalshi_platform.exchange.numbers import price_units
from kalshi_platform.exchange.session import Session
from kalshi_platform.journal.kind import Kind
from kalshi_platform_tests import wire
from kalshi_platform_tests.fuzz.targets import check_frames

DELTA = wire.delta("A-1", 2, "yes", 4_800, 500).decode().rstrip("\n")
SNAPSHOT = wire.snapshot("A-1", 1, {4_800: 500}, {5_000: 100}).decode().rstrip("\n")


def decoded(frame: bytes) -> Decoded:
    """Decode a recorded frame on both paths, compare the two, and return the rows."""
    check_frames([frame, DELTA.encode()])
    kind = Session().receive(frame, 0.0)
    return decode(wire.blocks([(wire.NOON_NS, wire.conn_id(1), int(kind), frame)]))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"0.4800"', "0.4800"),  # a number is not exact
        ('"0.4800"', "0.1234"),
        ('"5.00"', "12.25"),
        ('"0.4800"', '"1e999999999"'),  # would take a minute of arithmetic
        ('"5.00"', '"99999999999999999999.00"'),
        ('"5.00"', '"NaN"'),
        ('"5.00"', '"1_000.00"'),
        ('"A-1"', "5"),
        ('"yes"', "null"),
        ('"seq":2', '"seq":18446744073709551616'),
        ('"seq":2', '"seq":-1'),
        ('"sid":1', '"sid":4294967296'),
        ('"A-1"', '""'),
        ('"5.00"', '"0.005"'),
        ('"0.4800"', '"0.41005"'),
        ('"0.4800"', '"1.0001"'),
        ('"price_dollars":"0.4800","delta_fp":"5.00"', '"price":9999999999999999,"delta":1'),
    ],
)
def test_a_nearly_valid_delta_is_kept_as_malformed(before: str, after: str) -> None:
    frame = DELTA.replace(before, after)
    assert frame != DELTA
    result = decoded(frame.encode())
    assert result.deltas.is_empty()
    [row] = result.stream.to_dicts()
    assert row["kind"] == "malformed"
    assert json.loads(row["detail"])["frame"] == frame


TIMES = '"ts":"2026-08-07T06:46:28.97871Z","ts_ms":1786085188978'
ODD_NUMBERS = ["-1", "1.5", "1e3", "true", '"12"', "{}", "[1]", "1" * 20 + "9"]
ID = f'"market_id":"{wire.market_id("A-1")}"'


@pytest.mark.parametrize(
    ("before", "after", "field"),
    [
        ('"2026-08-07T06:46:28.97871Z"', '"2026-08-07"', "ts"),
        ('"2026-08-07T06:46:28.97871Z"', '"2026-08-07T06:46:28"', "ts"),
        ('"2026-08-07T06:46:28.97871Z"', '""', "ts"),
        ('"2026-08-07T06:46:28.97871Z"', "1786085188", "ts"),
        ('"2026-08-07T06:46:28.97871Z"', "{}", "ts"),
        (TIMES, '"ts_ms":999999999999999999', "ts"),
        (TIMES, '"ts_ms":"1786085188978"', "ts"),
        (TIMES, '"ts_ms":true', "ts"),
        (TIMES, '"ts":"0001-01-01T00:00:00+09:00","ts_ms":1786085188978', "ts"),
        (ID, '"market_id":7', "market_id"),
        (ID, '"market_id":"A-1"', "market_id"),
        (ID, '"market_id":["x"]', "market_id"),
        ('"ts_ms"', '"client_order_id":12,"ts_ms"', "client_order_id"),
        ('"ts_ms"', '"client_order_id":{},"ts_ms"', "client_order_id"),
        (TIMES, '"ts_ms":-1', "ts"),
        *(('"ts_ms"', f'"clock":{odd},"ts_ms"', "clock") for odd in ODD_NUMBERS),
        *(('"seq"', f'"sending_ts_ms":{odd},"seq"', "sending_ts_ms") for odd in ODD_NUMBERS),
        ('"seq"', '"sending_ts_ms":4102444800001,"seq"', "sending_ts_ms"),
    ],
)
def test_an_unreadable_optional_field_costs_only_itself(
    before: str, after: str, field: str
) -> None:
    frame = DELTA.replace(before, after)
    assert frame != DELTA
    result = decoded(frame.encode())
    [row] = result.deltas.to_dicts()
    assert (row["market_ticker"], row["price"], row["qty"]) == ("A-1", 4_800, 500)
    [odd] = result.stream.to_dicts()
    assert (odd["kind"], odd["market_ticker"], odd["seq"]) == ("malformed_field", "A-1", 0)
    assert json.loads(odd["detail"])["field"] == field
    assert json.loads(odd["detail"])["seq"] == 2


@pytest.mark.parametrize(
    ("before", "after", "field"),
    [
        (ID, '"market_id":7', "market_id"),
        *((ID, f'{ID},"clock":{odd}', "clock") for odd in ODD_NUMBERS),
        *(('"seq"', f'"sending_ts_ms":{odd},"seq"', "sending_ts_ms") for odd in ODD_NUMBERS),
        ('"seq"', '"sending_ts_ms":4102444800001,"seq"', "sending_ts_ms"),
    ],
)
def test_an_unreadable_optional_field_does_not_cost_its_snapshot(
    before: str, after: str, field: str
) -> None:
    result = decoded(SNAPSHOT.replace(before, after).encode())
    assert result.levels.height == 2
    [odd] = result.stream.to_dicts()
    assert (odd["kind"], odd["market_ticker"], odd["seq"]) == ("malformed_field", "A-1", 0)
    assert json.loads(odd["detail"])["field"] == field


SENT_MS = 1_795_970_363_244
SENT = datetime(2026, 11, 29, 16, 39, 23, 244_000, UTC)
SENT_FIELD = f'"sending_ts_ms":{SENT_MS},"seq"'


@pytest.mark.parametrize(
    ("times", "at"),
    [
        (
            '"ts":"2026-11-29T16:39:23.243Z","ts_ms":1795970363244',
            SENT.replace(microsecond=243_000),
        ),
        ('"ts":"2026-11-29T16:39:23.24317Z"', SENT.replace(microsecond=243_170)),
        ('"ts":"2026-11-29T16:39:23Z"', SENT.replace(microsecond=0)),
        ('"ts_ms":1795970363244', SENT),
        ('"ts":null,"ts_ms":1795970363244', SENT),
        ('"ts":null,"ts_ms":null', None),
        ('"side":"yes"', None),
    ],
)
def test_a_delta_has_its_clock_and_times_in_every_form(times: str, at: datetime | None) -> None:
    frame = DELTA.replace(TIMES, times).replace('"seq"', SENT_FIELD)
    frame = frame.replace(ID, f'{ID},"clock":18446744073709551615').replace(
        '"side":"yes","side":"yes"', '"side":"yes"'
    )
    for sent in (frame, frame.replace("0.4800", "0.48")):  # the latter takes the slow path
        result = decoded(sent.encode())
        assert result.stream.is_empty()
        [row] = result.deltas.to_dicts()
        assert (row["ts"], row["clock"], row["sent_ts"]) == (at, (1 << 64) - 1, SENT)


def test_every_level_of_a_snapshot_has_its_clock_and_time_of_sending() -> None:
    frame = SNAPSHOT.replace('"seq"', SENT_FIELD).replace(ID, f'{ID},"clock":0')
    for sent in (frame, frame.replace("0.4800", "0.48")):
        result = decoded(sent.encode())
        assert result.stream.is_empty()
        for part in (result.snapshots, result.levels):
            assert set(part.select("clock", "sent_ts").rows()) == {(0, SENT)}


def test_frames_without_the_fields_are_null_beside_frames_with_them() -> None:
    plain = [DELTA, SNAPSHOT, SNAPSHOT.replace('"seq":1', '"seq":3')]
    frames = [*plain, DELTA.replace('"seq"', SENT_FIELD).replace(ID, f'{ID},"clock":7')]
    records = [
        (wire.NOON_NS, wire.conn_id(1), int(Session().receive(f.encode(), 0.0)), f.encode())
        for f in frames
    ]
    result = decode(wire.blocks(records))
    assert result.deltas.select("clock", "sent_ts").rows() == [(None, None), (7, SENT)]
    assert set(result.levels.select("clock", "sent_ts").rows()) == {(None, None)}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"ts_ms"', '"client_order_id":null,"ts_ms"'),
        ('"2026-08-07T06:46:28.97871Z"', '"2026-08-07T08:46:28.97871+02:00"'),
        ('"A-1"', '"\\u0041-1"'),
        (":", " : "),
        ('"ts_ms":1786085188978', '"ts_ms":"1_000.00"'),  # `ts` takes precedence
    ],
)
def test_an_equivalent_spelling_of_a_delta_is_read(before: str, after: str) -> None:
    frame = DELTA.replace(before, after).replace("06 : 46 : 28", "06:46:28")
    plain = decoded(DELTA.encode()).deltas
    assert decoded(frame.encode()).deltas.equals(plain)


def test_a_market_without_an_id_is_read_with_a_null_too() -> None:
    frame: dict[str, Any] = json.loads(SNAPSHOT)
    frame["msg"]["market_id"] = None
    result = decoded(json.dumps(frame, separators=(",", ":")).encode())
    assert result.snapshots["market_ticker"].to_list() == ["A-1"]


@pytest.mark.parametrize(
    "levels",
    ["[[0.1234,12.25]]", '[["0.1000"]]', '[["0.1000","1.00","x"]]', '["0.1000"]', "[null]", "{}"],
)
def test_levels_that_are_not_pairs_of_strings_are_malformed(levels: str) -> None:
    frame = SNAPSHOT.replace('[["0.4800","5.00"]]', levels)
    assert frame != SNAPSHOT
    result = decoded(frame.encode())
    assert result.snapshots.is_empty()
    assert result.stream["kind"].to_list() == ["malformed"]


def test_a_duplicate_key_is_read_alike_by_capture_and_loader() -> None:
    for key, twice in (
        ("seq", '"seq":7,"seq":2'),
        ("delta_fp", '"delta_fp":"9.00","delta_fp":"5.00"'),
    ):
        first = '"seq":2' if key == "seq" else '"delta_fp":"5.00"'
        result = decoded(DELTA.replace(first, twice).encode())
        assert result.deltas.equals(decoded(DELTA.encode()).deltas)


def test_excessive_nesting_is_malformed() -> None:
    deep = b'{"type":"error","sid":1,"seq":3,"msg":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert Session().receive(deep, 0.0) is Kind.MALFORMED
    check_frames([deep])


@pytest.mark.parametrize("text", ["1e5", "١.٠٠", "0x1", "", ".5", "1.", "1" * 30, " 1.00"])  # noqa: RUF001
def test_only_plain_decimals_are_prices(text: str) -> None:
    with pytest.raises(ValueError, match="is not a decimal number"):
        price_units(text)


def test_a_snapshot_larger_than_any_book_is_not_decoded() -> None:
    """All of its levels are valid: decoding them would take the memory."""
    padded = SNAPSHOT.replace('"msg":{', '"msg":{' + " " * SNAPSHOT_BYTES)
    records = [
        (wire.NOON_NS, wire.conn_id(1), int(Kind.SNAPSHOT), frame.encode())
        for frame in (SNAPSHOT.replace("A-1", "B-2"), padded)
    ]
    result = decode(wire.blocks(records))
    assert result.snapshots["market_ticker"].to_list() == ["B-2"]
    assert result.stream.select("kind", "market_ticker", "seq").rows() == [("malformed", "A-1", 1)]
    detail = json.loads(result.stream["detail"][0])
    assert detail["of"] == "snapshot"
    assert "and no book has" in detail["reason"]
    assert detail["bytes"] == len(padded)
    assert len(detail["frame"]) == KEPT_BYTES_OF_LARGE
    with pytest.raises(DecodeError, match="and no book has"):  # capture refuses it alike
        decode_snapshot(padded.encode())
