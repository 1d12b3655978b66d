"""Rows that are there are found, whatever they say: one that is not would be stored twice."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta

import pyarrow as pa

from kalshi_platform.storage import arrival, clickhouse
from kalshi_platform.storage.schema import STREAM_EVENTS
from kalshi_platform_tests.storage.tables import migrated

TEXTS = [
    *("\\", "'", "\t", "\n", "\r", "\0", "a\0b", "\x01\x02", "\b\f\v\a", "\x7f", "\x1b[0m"),
    *("{a:String}", "%s %(x)s", "\\N", "\\n\\t", "\\0", "\\x41", "NULL", "", "  around  "),
    *("a'b\"c`d", "+ &=?#/%20", "\ufffd", "\u2028", "\ud7ff", "\U0010ffff"),
    *("😀" * 300, "e\u0301" * 150, "é" * 201, "x" * 199 + "\\'", "x" * 200 + "😀"),
]


def test_no_text_hides_a_row_that_is_there(clickhouse_url: str, clickhouse_database: str) -> None:
    with migrated(clickhouse_url, clickhouse_database) as client:
        _each_once(client)


def _each_once(client: clickhouse.Client) -> None:
    name, schema = STREAM_EVENTS.name, STREAM_EVENTS.arrow
    plain = pa.schema(
        [(f.name, pa.string() if pa.types.is_dictionary(f.type) else f.type) for f in schema]
    )
    began = datetime.now(UTC)
    rows = [(text[:40], "detail") for text in TEXTS] + [("TICKER", text) for text in TEXTS]
    for number, (ticker, detail) in enumerate(rows, 1):
        row = {
            "ingest_ts": began + timedelta(microseconds=number),
            "conn_id": str(uuid.uuid4()),
            "sid": 1,
            "seq": 0,
            "kind": "malformed",
            "market_ticker": ticker,
            "detail": detail,
        }
        table = pa.Table.from_pylist([row], schema=plain).cast(schema)
        for _ in range(2):
            arrival.insist(client, name, table, str(number), arrival.KEYS[name])
        there = client.query(f"SELECT count() FROM {name}").result_rows[0][0]
        assert there == number, (ticker, detail)
