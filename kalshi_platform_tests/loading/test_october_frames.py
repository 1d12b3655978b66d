"""The wire of October 2026: made recordings of two connections land with every field, and as the truth has it."""

from __future__ import annotations

import json
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from kalshi_platform.exchange.columnar import decode
from kalshi_platform.exchange.frames import kind_of
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.rows import Rows, build_rows
from kalshi_platform.schema import ORDERBOOK_EVENTS
from kalshi_platform_tests import wire

FRAMES = Path(__file__).resolve().parents[3] / "shared" / "frames"
TRUTH = FRAMES / "ws_made_2026-10.truth.jsonl"
COLUMNS = ("record", "type", "clock", "sent_ts", "ts", "side", "price", "qty")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def recorded(name: str) -> tuple[list[dict[str, Any]], list[wire.Record]]:
    """A made recording: its frames, and its journal records with a note where a connection begins."""
    if not TRUTH.exists():
        pytest.skip("the made frames are not beside this checkout")
    lines = (FRAMES / f"{name}.jsonl").read_bytes().splitlines()
    times = [int(text) for text in (FRAMES / f"{name}.recv_ns.txt").read_text().split()]
    frames: list[dict[str, Any]] = []
    records: list[wire.Record] = []
    conn = 0
    for line, at_ns in zip(lines, times, strict=True):
        frame = json.loads(line)
        if frame["type"] == "subscribed":
            conn += 1
            records.append(wire.connected(wire.conn_id(conn), at_ns))
            frames.append({"type": "connected"})
        records.append((at_ns, wire.conn_id(conn), int(kind_of(line)), line))
        frames.append(frame)
    return frames, records


def built(records: list[wire.Record]) -> tuple[Rows, BookState]:
    return build_rows(decode(wire.blocks(records)), BookState())


def milliseconds(value: int) -> datetime:
    return EPOCH + timedelta(milliseconds=value)


@pytest.mark.parametrize("name", ["ws_made_2026-10_a", "ws_made_2026-10_b"])
def test_every_event_has_each_field_of_its_frame(name: str) -> None:
    frames, records = recorded(name)
    rows, _ = built(records)
    expected: list[tuple[Any, ...]] = []
    for n, frame in enumerate(frames):
        body = frame.get("msg", {})
        if frame["type"] == "orderbook_snapshot":
            expected += [
                (n, "snapshot", body["clock"], frame["sending_ts_ms"], None, side, price, qty)
                for side in ("yes", "no")
                for price, qty in body.get(f"{side}_dollars_fp", ())
            ]
        elif frame["type"] == "orderbook_delta":
            at = datetime.fromisoformat(body["ts"])
            level = (body["side"], body["price_dollars"], body["delta_fp"])
            expected.append((n, "delta", body["clock"], frame["sending_ts_ms"], at, *level))
    found = [
        tuple(row[name] for name in COLUMNS)
        for row in rows.tables[ORDERBOOK_EVENTS.name].to_pylist()
    ]
    assert found == [
        (n, kind, clock, milliseconds(sent), at, side, Decimal(price), Decimal(qty))
        for n, kind, clock, sent, at, side, price, qty in expected
    ]


@pytest.mark.parametrize(("name", "lost"), [("ws_made_2026-10_a", 2), ("ws_made_2026-10_b", 0)])
def test_the_clocks_give_each_market_the_actions_of_the_exchange_in_order(
    name: str, lost: int
) -> None:
    """`lost`: the deltas whose numbers a gap skips."""
    _, records = recorded(name)
    actions = defaultdict(list)
    for line in TRUTH.read_text().splitlines():
        action = json.loads(line)
        for side, price, qty in action.get("deltas", ()):
            level = (side, Decimal(price), Decimal(qty))
            actions[action["ticker"]].append((action["clock"], *level))
    rows, _ = built(records)
    connections = defaultdict(list)
    for row in rows.tables[ORDERBOOK_EVENTS.name].to_pylist():
        connections[row["conn_id"], row["market_ticker"]].append(row)
    left_out = 0
    for (_, ticker), events in connections.items():
        since = {row["clock"] for row in events if row["type"] == "snapshot"}
        deltas = [
            (row["clock"], row["side"], row["price"], row["qty"])
            for row in events
            if row["type"] == "delta"
        ]
        (begun,), ended = since, deltas[-1][0]
        sent = [action for action in actions[ticker] if begun < action[0] <= ended]
        skipped = {clock for clock, *_ in sent} - {clock for clock, *_ in deltas}
        assert deltas == [action for action in sent if action[0] not in skipped]
        left_out += len(sent) - len(deltas)
    assert left_out == lost
