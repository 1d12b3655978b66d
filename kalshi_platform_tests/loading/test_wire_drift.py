"""Drift of the wire: what is noticed, where, how often, and what it must not cost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalshi_platform.exchange import drift
from kalshi_platform.exchange.columnar import decode
from kalshi_platform.exchange.frames import kind_of
from kalshi_platform.journal.kind import Kind
from kalshi_platform.loading import state_files
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.rows import Rows, build_rows
from kalshi_platform_tests import wire

CONN = wire.conn_id(1)
NOON_NS = 1_796_040_000 * wire.SECOND
FRAMES = Path(__file__).resolve().parents[3] / "shared" / "frames"


def with_fields(frame: bytes, message: dict[str, Any] | None = None, **top: Any) -> bytes:
    """A frame with other fields in its `msg`, or beside it; null removes one."""
    changed = json.loads(frame)
    for fields, into in ((message or {}, changed["msg"]), (top, changed)):
        for name, value in fields.items():
            into[name] = value
            if value is None:
                del into[name]
    return json.dumps(changed, separators=(",", ":")).encode() + b"\n"


def delta(seq: int, **message: Any) -> bytes:
    return with_fields(wire.delta("A-1", seq, "yes", 1000, 5, clock=seq), message, sending_ts_ms=1)


def snapshot(seq: int, **message: Any) -> bytes:
    frame = wire.snapshot("A-1", seq, {1000: 5}, {2000: 7}, clock=seq)
    return with_fields(frame, message, sending_ts_ms=1)


def trade(seq: int, **message: Any) -> bytes:
    return with_fields(wire.trade("A-1", seq, 1000, 5, sid=1), message, sending_ts_ms=1)


FRAME_OF = {"orderbook_delta": delta, "orderbook_snapshot": snapshot, "trade": trade}


def recorded(frames: Iterable[bytes], at_ns: int = NOON_NS, step_ns: int = 1) -> list[wire.Record]:
    return [
        (at_ns + i * step_ns, CONN, int(kind_of(frame)), frame) for i, frame in enumerate(frames)
    ]


def built(
    records: Sequence[wire.Record], cuts: Iterable[int] = (), state: BookState | None = None
) -> tuple[list[Rows], BookState]:
    after, rows = state or BookState(), []
    for block in wire.blocks(records, cuts):
        more, after = build_rows(decode([block]), after)
        rows.append(more)
    return rows, after


def found(rows: Iterable[Rows]) -> list[tuple[Any, ...]]:
    """(record, what, type, path) of each row."""
    return [
        (row["record"], *(detail[name] for name in ("what", "type", "path")))
        for part in rows
        for row in part.tables["stream_events"].to_pylist()
        if row["kind"] == "unknown_field" and (detail := json.loads(row["detail"]))
    ]


def counted(rows: Iterable[Rows]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in rows:
        for key, count in part.drift.items():
            total[key] = total.get(key, 0) + count
    return total


@pytest.mark.parametrize("name", FRAME_OF)
@pytest.mark.parametrize("value", [5, "text", 1.5, True, {"a": 1}, [1], [["0.1", "2"]]])
def test_an_unknown_field_is_noticed_and_costs_no_known_value(name: str, value: Any) -> None:
    frame = FRAME_OF[name]
    plain = [frame(seq) for seq in range(1, 6)]
    strange = [*plain[:2], frame(3, invented=value), *plain[3:]]
    rows, _ = built(recorded(strange))
    assert found(rows) == [(2, "unknown field", name, "msg.invented")]
    expected, _ = built(recorded(plain))
    assert found(expected) == []
    for dataset in ("orderbook_events", "trades"):
        assert rows[0].tables[dataset].equals(expected[0].tables[dataset])


@pytest.mark.parametrize("name", FRAME_OF)
def test_an_unknown_field_beside_the_message_is_noticed(name: str) -> None:
    frames = [FRAME_OF[name](1), with_fields(FRAME_OF[name](2), route="x")]
    rows, _ = built(recorded(frames))
    assert found(rows) == [(1, "unknown field", name, "route")]


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("orderbook_delta", "market_id", 5),
        ("orderbook_delta", "ts_ms", "1"),
        ("orderbook_delta", "clock", "1"),
        ("orderbook_delta", "clock", 1.5),
        ("orderbook_delta", "price_dollars", 0.5),
        ("orderbook_snapshot", "clock", "1"),
        ("orderbook_snapshot", "market_id", 5),
        ("orderbook_snapshot", "yes_dollars_fp", {"0.1000": "5.00"}),
        ("trade", "count_fp", 5),
        ("trade", "is_block_trade", "no"),
    ],
)
def test_a_changed_type_is_noticed(name: str, field: str, value: Any) -> None:
    frames = [FRAME_OF[name](1), FRAME_OF[name](2, **{field: value}), FRAME_OF[name](3)]
    for cuts in ([], [1], [1, 2]):
        rows, _ = built(recorded(frames), cuts)
        assert found(rows) == [(1, "changed type", name, f"msg.{field}")]


@pytest.mark.parametrize("cuts", [[], [1], [2], [3]])
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("orderbook_delta", "clock"),
        ("orderbook_delta", "ts"),
        ("orderbook_snapshot", "clock"),
        ("trade", "taker_side"),
    ],
)
def test_a_field_that_is_missing_after_it_was_there_is_noticed(
    name: str, field: str, cuts: list[int]
) -> None:
    frame = FRAME_OF[name]
    frames = [frame(1, **{field: None}), frame(2), frame(3, **{field: None}), frame(4)]
    rows, _ = built(recorded(frames), cuts)
    assert found(rows) == [(2, "missing field", name, f"msg.{field}")]


def test_an_unknown_type_is_noticed() -> None:
    frames = [delta(1), b'{"type":"weather","sid":1,"msg":{}}', b'{"type":"ok","sid":1,"seq":2}']
    rows, _ = built(recorded(frames))
    assert found(rows) == [(1, "unknown type", "weather", "")]


def test_frames_of_control_types_are_examined() -> None:
    frame = b'{"type":"market_lifecycle_v2","sid":1,"seq":1,"msg":{"market_ticker":"A","event_type":"x","mood":1}}'
    rows, _ = built(recorded([frame]))
    assert found(rows) == [(0, "unknown field", "market_lifecycle_v2", "msg.mood")]


def test_each_finding_has_one_row_a_day_and_every_frame_is_counted() -> None:
    day = 86_400 * wire.SECOND
    frames = [delta(seq, invented=seq) for seq in range(1, 41)]
    records = recorded(frames, NOON_NS, day // 10)
    cuts = [n for n in range(1, 40) if records[n][0] // 3_600_000_000_000]
    rows, _ = built(records, cuts)
    days = {records[n][0] // day for n in range(40)}
    assert len(found(rows)) == len(days)
    assert counted(rows) == {"unknown field|orderbook_delta|msg.invented": 40}


def test_an_adversary_who_invents_a_name_per_frame_is_bounded() -> None:
    frames = [delta(seq, **{f"f{seq}" * 40: "x" * 500}) for seq in range(1, 301)]
    frames += [b'{"type":"t%d"}' % n for n in range(300)]
    for cuts in ([], [7, 150, 450]):
        rows, state = built(recorded(frames), cuts)
        names = found(rows)
        assert len(names) <= drift.MOST_FINDINGS + 4
        assert all(len(path) <= 70 for _, _, _, path in names)
        assert sum(counted(rows).values()) == 600
        assert len(state.wire.reported if state.wire else ()) <= drift.MOST_FINDINGS + 4
    assert found(built(recorded(frames))[0]) == found(built(recorded(frames), [100, 200, 333])[0])


MESSAGE = st.dictionaries(
    st.sampled_from(["invented", "other", "clock", "ts", "market_id"]),
    st.sampled_from([None, 1, "x", {"y": 1}]),
    max_size=2,
)


@given(
    st.lists(st.tuples(st.sampled_from(list(FRAME_OF)), MESSAGE), min_size=1, max_size=12),
    st.lists(st.integers(1, 11), max_size=3),
)
@settings(max_examples=25, deadline=None)
def test_what_is_found_does_not_depend_on_how_the_journal_is_cut(
    frames: list[tuple[str, dict[str, Any]]], cuts: list[int]
) -> None:
    records = recorded(
        [FRAME_OF[name](seq, **message) for seq, (name, message) in enumerate(frames, 1)]
    )
    whole, state = built(records)
    parts, after = built(records, cuts)
    assert found(parts) == found(whole)
    assert after.wire == state.wire
    expected = {
        (name, f"msg.{field}")
        for name, message in frames
        for field, value in message.items()
        if field in {"invented", "other"} and value is not None
    }
    invented = {row[2:] for row in found(whole) if row[3] in {"msg.invented", "msg.other"}}
    assert invented == expected


def test_private_values_are_not_shown() -> None:
    frames = [
        delta(1, client_order_id="mine", invented="private"),
        delta(2, api_key="secret"),
        delta(3, depth=7),
    ]
    rows, _ = built(recorded(frames))
    text = "".join(row["detail"] for row in rows[0].tables["stream_events"].to_pylist())
    assert '"example":"7"' in text
    assert "private" not in text
    assert "secret" not in text


def test_the_findings_of_the_day_survive_a_restart(tmp_path: Path) -> None:
    records = recorded([delta(1, invented=1), delta(2, invented=1, clock=None)])
    _, state = built(records[:1])
    state_files.save(state, tmp_path / "x.state")
    again = state_files.load(tmp_path / "x.state")
    rows, _ = build_rows(decode(wire.blocks(records, [1])[1:]), again)
    assert found([rows]) == [(1, "missing field", "orderbook_delta", "msg.clock")]


def test_trades_that_were_fetched_by_rest_are_no_drift() -> None:
    fetched = b'{"type":"trade","sid":1,"msg":{"trade_id":"x","ticker":"A-1","price":0.5}}'
    records = [*recorded([trade(1), trade(2)]), (NOON_NS + 9, CONN, int(Kind.TRADE), fetched)]
    for cuts in ([], [2]):
        assert found(built(records, cuts)[0]) == []


@pytest.mark.parametrize(
    "name",
    [
        "docs_examples_current.jsonl",
        "ws_orderbook_12_markets_prod_2026-08-07.jsonl",
        "ws_orderbook_trade_demo_2026-06-11.jsonl",
        "ws_made_2026-10_a.jsonl",
        "ws_made_2026-10_b.jsonl",
    ],
)
def test_what_the_exchange_really_sends_is_known(name: str) -> None:
    path = FRAMES / name
    if not path.exists():
        pytest.skip("the captured frames are not beside this checkout")
    frames = [line for line in path.read_bytes().splitlines() if b'"cmd":' not in line]
    rows, _ = built(recorded(frames))
    assert [row for row in found(rows) if row[1] != "missing field"] == []
