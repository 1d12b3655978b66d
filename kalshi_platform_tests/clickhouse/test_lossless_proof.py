"""The lossless proof finds missing and doubled rows, and nothing else."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from kalshi_platform.clickhouse import migrations
from kalshi_platform.clickhouse.client import Client
from kalshi_platform.schema import ORDERBOOK_EVENTS, STREAM_EVENTS, TRADES
from kalshi_platform_tests.clickhouse.tables import insert, migrated, settings_for, uuid

PROOF = Path(__file__).resolve().parents[2] / "infra" / "queries" / "lossless_proof.sql"
AT = datetime(2026, 11, 22, 14, tzinfo=UTC)
WHOLE = {
    "holes": 0,
    "named_holes": 0,
    "unexplained_holes": 0,
    "missing_levels": 0,
    "doubled": 0,
    "repeated": 0,
}


@pytest.fixture
def client(clickhouse_url: str, clickhouse_database: str) -> Iterator[Client]:
    """A client of a migrated database."""
    with migrated(clickhouse_url, clickhouse_database) as client:
        yield client


class Subscription:
    """Frames of one sid, kept as the tables keep them.

    `recorded`: each with the number of its journal record, as versions that know it keep them.
    """

    def __init__(self, conn: int = 1, sid: int = 1, *, recorded: bool = False) -> None:
        self._of = {"conn_id": uuid(conn), "sid": sid, "ingest_ts": AT}
        self._records = itertools.count(100) if recorded else None
        self._events: list[dict[str, Any]] = []
        self._stream: list[dict[str, Any]] = []
        self._trades: list[dict[str, Any]] = []
        self.happened("subscribed")

    def delta(self, seq: int) -> None:
        self._level("delta", seq, "0.5")

    def trade(self, seq: int) -> None:
        row = {"seq": seq, "trade_id": f"t{len(self._trades)}", "market_ticker": "A"}
        sides = {"taker_outcome_side": "yes", "taker_book_side": "bid"}
        self._trades.append({**self._of, **row, **sides, **self._next()})

    def snapshot(self, seq: int, levels: int = 3) -> None:
        record = self._next()
        for level in range(levels):
            self._level("snapshot", seq, f"0.{level + 1}", record)
        self._stream.append(self._row("snapshot", seq, {"levels": levels}) | record)

    def happened(self, kind: str, seq: int = 0, **detail: Any) -> None:
        self._stream.append(self._row(kind, seq, detail) | self._next())

    def again(self) -> None:
        """Store every row once more."""
        for rows in (self._events, self._stream, self._trades):
            rows.extend(list(rows))

    def at(self, moment: datetime) -> None:
        """Set the receive time of the rows that follow."""
        self._of["ingest_ts"] = moment

    def _row(self, kind: str, seq: int, detail: dict[str, Any]) -> dict[str, Any]:
        return {**self._of, "kind": kind, "seq": seq, "detail": json.dumps(detail)}

    def _next(self) -> dict[str, Any]:
        return {} if self._records is None else {"shard": 0, "record": next(self._records)}

    def _level(self, kind: str, seq: int, price: str, record: dict[str, Any] | None = None) -> None:
        row = {"type": kind, "seq": seq, "market_id": uuid(9), "market_ticker": "A", "side": "yes"}
        place = self._next() if record is None else record
        self._events.append({**self._of, **row, "price": Decimal(price), **place})

    def keep(self, client: Client) -> None:
        """Insert everything."""
        insert(client, ORDERBOOK_EVENTS, self._events)
        insert(client, STREAM_EVENTS, self._stream)
        insert(client, TRADES, self._trades)


def proof(client: Client) -> list[dict[str, Any]]:
    """The query's answer."""
    answer = client.query(PROOF.read_text(encoding="utf-8"))
    return [dict(zip(answer.column_names, row, strict=True)) for row in answer.result_rows]


def judged(client: Client) -> dict[str, Any]:
    """The result of the only subscription."""
    (row,) = proof(client)
    return {name: row[name] for name in WHOLE}


def test_every_kind_of_numbered_frame_counts_once(client: Client) -> None:
    one = Subscription()
    one.happened("connected")
    one.happened("ok", 1)
    one.snapshot(2)
    one.snapshot(3, levels=0)
    one.delta(4)
    one.happened("error", 5)
    one.happened("malformed", 6)
    one.delta(7)
    one.keep(client)
    (row,) = proof(client)
    assert row == {
        "conn_id": row["conn_id"], "sid": 1, "min_seq": 1, "max_seq": 7, "first_seq": 1, "frames": 7,
        **WHOLE,
    }  # fmt: skip


def test_subscriptions_are_checked_separately(client: Client) -> None:
    for conn, sid in ((1, 1), (1, 2), (2, 1)):
        one = Subscription(conn, sid)
        one.delta(1)
        one.delta(2)
        one.keep(client)
    ticker = Subscription(1, 3)
    ticker.happened("ticker")
    ticker.keep(client)
    rows = proof(client)
    assert [(str(r["conn_id"]), r["sid"]) for r in rows] == [
        (uuid(1), 1),
        (uuid(1), 2),
        (uuid(2), 1),
    ]
    assert all(r["unexplained_holes"] == r["doubled"] == 0 for r in rows)


def test_a_trade_subscription_is_proved_like_the_books(client: Client) -> None:
    one = Subscription(1, 2)
    one.happened("ok", 1)
    for seq in (2, 3, 6, 7, 9, 9):
        one.trade(seq)
    one.happened("gap", expected=4, got=6, channel="trade")
    one.trade(0)  # fetched after the gap
    one.trade(0)
    one.keep(client)
    assert judged(client) == {
        **WHOLE,
        "holes": 3,
        "named_holes": 2,
        "unexplained_holes": 1,
        "doubled": 1,
    }


def test_missing_numbers_without_a_gap_row_are_unexplained(client: Client) -> None:
    one = Subscription()
    for seq in (1, 2, 5, 6):
        one.delta(seq)
    one.keep(client)
    assert judged(client) == {**WHOLE, "holes": 2, "unexplained_holes": 2}


def test_a_gap_row_explains_exactly_the_numbers_it_names(client: Client) -> None:
    one = Subscription()
    for seq in (1, 2, 5, 6, 9):
        one.delta(seq)
    one.happened("gap", expected=3, got=5)
    one.happened("resynced", expected=3, got=5)
    one.keep(client)
    assert judged(client) == {**WHOLE, "holes": 4, "named_holes": 2, "unexplained_holes": 2}


def test_numbers_lost_at_the_very_beginning_are_missed(client: Client) -> None:
    one = Subscription()
    one.delta(4)
    one.keep(client)
    assert judged(client)["unexplained_holes"] == 3


@pytest.mark.parametrize("row", ["connected", "subscribed"])
def test_a_recording_without_its_first_row_has_a_gap(client: Client, row: str) -> None:
    """After rows are deleted, the proof must not begin at the first remaining one."""
    one = Subscription()
    one.happened("connected")
    for seq in range(1, 41):
        one.delta(seq)
    one.keep(client)
    client.command("DELETE FROM orderbook_events WHERE seq <= 20")
    if row == "subscribed":
        client.command("DELETE FROM stream_events WHERE kind = 'connected'")
    client.command(f"DELETE FROM stream_events WHERE kind = '{row}'")
    assert judged(client) == {**WHOLE, "holes": 20, "unexplained_holes": 20}


def begun_long_ago(client: Client) -> None:
    """A subscription that goes on: of its 40 numbers the first 20 are 40 days old, and so is its beginning."""
    now = datetime.now(UTC)
    one = Subscription()
    one._stream.clear()
    one.at(now - timedelta(days=40))
    one.happened("connected")
    one.happened("subscribed")
    for seq in range(1, 21):
        one.delta(seq)
    one.at(now - timedelta(days=29, hours=20))
    for seq in range(21, 41):
        one.delta(seq)
    one.keep(client)


def keep_days(client: Client, url: str, days: int) -> None:
    """Apply the retention and force the merges that delete expired rows."""
    migrations.update_retention(
        client, settings_for(url, str(client.database), hot_retention_days=days)
    )
    for table in ("orderbook_events", "stream_events"):
        client.command(f"OPTIMIZE TABLE {table} FINAL")


def test_rows_that_retention_deleted_are_not_missing(client: Client, clickhouse_url: str) -> None:
    begun_long_ago(client)
    assert judged(client) == WHOLE
    keep_days(client, clickhouse_url, 30)
    assert client.query("SELECT min(seq) FROM orderbook_events").first_row == (21,)
    assert judged(client) == WHOLE
    client.command("DELETE FROM orderbook_events WHERE seq = 30")
    assert judged(client) == {**WHOLE, "holes": 1, "unexplained_holes": 1}


def test_rows_of_a_former_shorter_retention_are_not_missing(
    client: Client, clickhouse_url: str
) -> None:
    begun_long_ago(client)
    keep_days(client, clickhouse_url, 30)
    keep_days(client, clickhouse_url, 400)
    assert judged(client) == WHOLE
    client.command("TRUNCATE TABLE retention_changes")  # nothing shows it any more
    assert judged(client) == {**WHOLE, "holes": 20, "unexplained_holes": 20}


def test_rows_that_retention_is_deleting_are_not_checked(client: Client) -> None:
    """Parts are deleted one by one, in no order, so the remaining rows have gaps."""
    begun_long_ago(client)
    client.command("DELETE FROM orderbook_events WHERE seq IN (3, 4, 20)")
    assert judged(client)["unexplained_holes"] == 3
    client.command(
        "INSERT INTO retention_changes (taken_before) SELECT now64(6) - toIntervalDay(30)"
    )
    assert judged(client) == WHOLE


def test_a_repeated_number_differs_from_a_doubled_row(
    client: Client,
) -> None:
    one = Subscription(recorded=True)
    for seq in (1, 2, 3, 3, 4, 2):
        one.delta(seq)
    one.happened("ok", 4)
    one.snapshot(5)
    one.snapshot(5)
    one.keep(client)
    assert judged(client) == {**WHOLE, "repeated": 4}
    client.command("INSERT INTO orderbook_events SELECT * FROM orderbook_events WHERE seq = 3")
    assert judged(client) == {**WHOLE, "repeated": 4, "doubled": 2}


def test_rows_of_earlier_versions_beside_those_with_records(client: Client) -> None:
    """A number with and without its record number was loaded by two versions."""
    old, new = Subscription(), Subscription(recorded=True)
    for seq in (1, 2, 3):
        old.delta(seq)
    for seq in (3, 4):
        new.delta(seq)
    old.keep(client)
    new.keep(client)
    assert judged(client) == {**WHOLE, "doubled": 1}


def test_all_rows_stored_twice_are_doubled_not_repeated(client: Client) -> None:
    one = Subscription(recorded=True)
    one.happened("ok", 1)
    one.snapshot(2, levels=3)
    one.delta(3)
    one.trade(4)
    one.again()
    one.keep(client)
    assert judged(client) == {**WHOLE, "doubled": 4 + 3}


def test_missing_levels_of_a_snapshot_are_found(client: Client) -> None:
    one = Subscription(recorded=True)
    one.snapshot(1, levels=5)
    one.snapshot(2, levels=5)
    one.keep(client)
    client.command("DELETE FROM orderbook_events WHERE seq = 1 AND price > 0.3")
    client.command("DELETE FROM orderbook_events WHERE seq = 2")
    assert judged(client) == {**WHOLE, "missing_levels": 2 + 5}


def test_levels_without_their_snapshots_row_are_a_gap(client: Client) -> None:
    one = Subscription()
    one.snapshot(1)
    one.delta(2)
    one.keep(client)
    client.command("DELETE FROM stream_events WHERE kind = 'snapshot'")
    assert judged(client) == {**WHOLE, "holes": 1, "unexplained_holes": 1}


def test_a_gap_row_explains_no_other_gap(client: Client) -> None:
    """Overlapping gap rows, and rows that name stored numbers, explain no further number."""
    one = Subscription()
    for seq in (1, 2, 5, 6, 9, 12):
        one.delta(seq)
    one.happened("gap", expected=3, got=5)
    one.happened("gap", expected=2, got=6)
    one.happened("gap", expected=4, got=5)
    one.happened("gap", expected=6, got=2, cause="repeated")
    one.happened("gap", cause="negative level")
    one.happened("gap", expected=11, got=400)
    one.keep(client)
    assert judged(client) == {**WHOLE, "holes": 6, "named_holes": 3, "unexplained_holes": 3}


@pytest.mark.parametrize(
    ("part", "doubled"),
    [("delta", 1), ("ok", 1), ("snapshot row", 1), ("levels", 3), ("delta for ok", 1)],
)
def test_what_is_stored_twice_is_doubled(client: Client, part: str, doubled: int) -> None:
    one = Subscription()
    one.happened("ok", 1)
    one.snapshot(2, levels=3)
    one.delta(3)
    match part:
        case "delta":
            one.delta(3)
        case "ok":
            one.happened("ok", 1)
        case "snapshot row":
            one.happened("snapshot", 2, levels=3)
        case "levels":
            for level in range(3):
                one._level("snapshot", 2, f"0.{level + 1}")
        case _:
            one.delta(1)
    one.keep(client)
    assert judged(client) == {**WHOLE, "doubled": doubled}


@pytest.mark.parametrize("seed", range(3))
def test_random_losses_are_counted_as_in_python(client: Client, seed: int) -> None:
    rng = random.Random(seed)
    one = Subscription()
    last = 400
    lost = {seq for seq in range(1, last) if rng.random() < 0.1}
    named: set[int] = set()
    expected = 1
    for seq in range(1, last + 1):
        if seq in lost:
            continue
        if seq != expected and rng.random() < 0.7:
            one.happened("gap", expected=expected, got=seq)
            named |= set(range(expected, seq))
        expected = seq + 1
        if rng.random() < 0.1:
            one.snapshot(seq, levels=rng.randint(0, 3))
        else:
            one.delta(seq)
    one.keep(client)
    assert judged(client) == {
        **WHOLE,
        "holes": len(lost),
        "named_holes": len(named),
        "unexplained_holes": len(lost - named),
    }
