"""Stored rows are found, whatever text they hold; missing and doubled rows are noticed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.clickhouse import verified_inserts
from kalshi_platform.clickhouse.client import Client
from kalshi_platform.clickhouse.verified_inserts import KEYS, Insert, ensure
from kalshi_platform.errors import StoreRefused
from kalshi_platform.inventory.rows import FILLS
from kalshi_platform.schema import (
    BOOK_CHECKPOINTS,
    DATASETS,
    LATEST_LEVELS,
    ORDERBOOK_EVENTS,
    STREAM_EVENTS,
    TRADES,
)
from kalshi_platform_tests.clickhouse.tables import arrow, migrated, one_row, uuid

TEXTS = [
    *("\\", "'", "\t", "\n", "\r", "\0", "a\0b", "\x01\x02", "\b\f\v\a", "\x7f", "\x1b[0m"),
    *("{a:String}", "%s %(x)s", "\\N", "\\n\\t", "\\0", "\\x41", "NULL", "", "  around  "),
    *("a'b\"c`d", "+ &=?#/%20", "\ufffd", "\u2028", "\ud7ff", "\U0010ffff"),
    *("😀" * 300, "e\u0301" * 150, "é" * 201, "x" * 199 + "\\'", "x" * 200 + "😀"),
]
AT = datetime(2026, 11, 22, 14, 3, 5, 123456, tzinfo=UTC)
OF_RECORDS = (ORDERBOOK_EVENTS, TRADES, BOOK_CHECKPOINTS, STREAM_EVENTS)


@pytest.fixture
def client(clickhouse_url: str, clickhouse_database: str) -> Iterator[Client]:
    with migrated(clickhouse_url, clickhouse_database) as client:
        yield client


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified_inserts, "SETTLE_S", ())


def rows_of(name: str, number: int, begin: datetime = AT) -> pa.Table:
    """Rows of every kind: nulls, both sides, two of one record."""
    rows: list[dict[str, Any]] = []
    for n in range(number):
        row = {
            "ingest_ts": begin + timedelta(seconds=n),
            "ts": begin + timedelta(seconds=n),
            "conn_id": uuid(1),
            "market_id": uuid(2),
            "price": Decimal(n) / 100,
            "type": "delta",
            "side": "yes" if n % 2 else None if name == BOOK_CHECKPOINTS.name else "no",
            "taker_outcome_side": "yes",
            "taker_book_side": "bid",
            "kind": "ok",
            "market_ticker": f"T-{n % 3}",
            "version": n + 1,
            "shard": 3,
            "record": 7 + n // 2,
        }
        rows.append({k: v for k, v in row.items() if k in DATASETS[name].arrow.names})
    return arrow(DATASETS[name], rows)


def sent(name: str, rows: pa.Table, token: str = "token") -> Insert:
    return Insert(name, rows, token, KEYS[name])


def put(client: Client, insert: Insert) -> Insert:
    clickhouse.insert_arrow(client, insert.name, insert.rows, insert.token)
    return insert


def count(client: Client, name: str) -> int:
    final = " FINAL" if name == LATEST_LEVELS.name else ""
    return int(one_row(client, f"SELECT count() FROM {name}{final}")[0])


def test_no_text_hides_a_stored_row(client: Client) -> None:
    tickers = [(text[:40], "id") for text in TEXTS] + [("TICKER", text) for text in TEXTS]
    for number, (ticker, text) in enumerate(tickers, 1):
        row = {"ts": AT, "decision_id": uuid(1), "market_ticker": ticker, "fill_id": text}
        blank = {f.name: 0.0 if pa.types.is_floating(f.type) else "" for f in FILLS.arrow}
        table = pa.Table.from_pylist([blank | row], schema=FILLS.arrow)
        for _ in range(2):
            verified_inserts.insert(client, Insert(FILLS.name, table, str(number), FILLS.key))
        assert count(client, FILLS.name) == number, (ticker, text)


@pytest.mark.parametrize("stored", [(), (1, 2, 5), range(9)], ids=["none", "some", "all but one"])
def test_only_missing_rows_are_sent_again(client: Client, stored: Sequence[int]) -> None:
    for name in (*(d.name for d in OF_RECORDS), LATEST_LEVELS.name):
        whole = sent(name, rows_of(name, 10))
        if stored:
            put(client, sent(name, whole.rows.take(pa.array(stored, pa.int64()))))
            put(client, whole)  # under a token that is taken
        else:
            put(client, whole)
            client.command(f"ALTER TABLE {name} DELETE WHERE true SETTINGS mutations_sync = 2")
        assert count(client, name) == len(stored), name
        for _ in range(2):
            ensure(client, [whole])
            assert count(client, name) == 10, name


def test_a_batch_that_is_there_takes_one_select(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [*(d.name for d in OF_RECORDS), LATEST_LEVELS.name]
    inserts = [put(client, sent(name, rows_of(name, 10))) for name in names]
    monkeypatch.setattr(verified_inserts, "_complete", lambda *_: pytest.fail("looked at rows"))
    ensure(client, inserts)


def test_rows_of_other_recorders_do_not_count(client: Client) -> None:
    mine = sent(STREAM_EVENTS.name, rows_of(STREAM_EVENTS.name, 10))
    other = mine.rows.set_column(
        mine.rows.column_names.index("shard"), "shard", pa.array([4] * 10, pa.uint32())
    )
    later = rows_of(STREAM_EVENTS.name, 10, AT + timedelta(microseconds=1))  # of the same numbers
    for token, rows in (("other", other), ("later", later)):
        put(client, sent(STREAM_EVENTS.name, rows, token))
    ensure(client, [mine])
    assert count(client, STREAM_EVENTS.name) == 30
    ensure(client, [mine])
    assert count(client, STREAM_EVENTS.name) == 30


def test_doubled_rows_are_refused_with_a_remedy(client: Client) -> None:
    for name in (d.name for d in OF_RECORDS):
        refused_and_repaired(client, name)


def refused_and_repaired(client: Client, name: str) -> None:
    insert = put(client, sent(name, rows_of(name, 10)))
    put(client, sent(name, insert.rows.slice(2, 3), "by another hand"))
    with pytest.raises(
        StoreRefused, match=r"has 3 rows of .* \(shard 3, records 7 to 11\) more"
    ) as met:
        ensure(client, [insert])
    remedy = str(met.value).partition('kalshi-platform sql "')[2].rstrip('"')
    client.command(remedy)
    assert count(client, name) == 0
    ensure(client, [insert])
    assert count(client, name) == 10


def test_a_level_that_a_later_row_has_replaced_is_not_missing(client: Client) -> None:
    levels = put(client, sent(LATEST_LEVELS.name, rows_of(LATEST_LEVELS.name, 10)))
    version = levels.rows.column_names.index("version")
    later = levels.rows.set_column(version, "version", pa.array([100] * 10, pa.uint64()))
    put(client, sent(LATEST_LEVELS.name, later, "later"))
    client.command(f"OPTIMIZE TABLE {LATEST_LEVELS.name} FINAL")
    ensure(client, [levels])
    assert one_row(client, f"SELECT min(version) FROM {LATEST_LEVELS.name}") == (100,)


def test_expired_rows_are_not_missing(clickhouse_url: str, clickhouse_database: str) -> None:
    """The journal of a month ago is loaded again: ClickHouse drops such expired rows at once."""
    with migrated(clickhouse_url, clickhouse_database, retention_days=7) as client:
        now = datetime.now(UTC)
        old = rows_of(STREAM_EVENTS.name, 10, now - timedelta(days=30))
        rows = pa.concat_tables([old, rows_of(STREAM_EVENTS.name, 10, now)])
        ensure(client, [sent(STREAM_EVENTS.name, old)])
        assert count(client, STREAM_EVENTS.name) == 0
        ensure(client, [sent(STREAM_EVENTS.name, rows)])
        assert one_row(
            client, "SELECT count() FROM stream_events WHERE ingest_ts > now() - 60"
        ) == (10,)


def test_a_server_that_never_stores_rows_is_refused(client: Client) -> None:
    client.command("DROP TABLE trades SYNC")
    columns = ", ".join(f"{c.name} {c.clickhouse}" for c in TRADES.columns)
    client.command(f"CREATE TABLE trades ({columns}) ENGINE = Null")
    trades = sent(TRADES.name, rows_of(TRADES.name, 10))
    with pytest.raises(StoreRefused, match=r"10 rows of trades .* 6 times, and 10 of them are not"):
        ensure(client, [trades])
