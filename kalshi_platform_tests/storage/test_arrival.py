"""Rows that are there are found, whatever they say: one that is not would be stored twice."""

from __future__ import annotations

from kalshi_platform.storage import arrival
from kalshi_platform.storage.schema import STREAM_EVENTS
from kalshi_platform_tests.storage.tables import arrow, migrated, one_row, uuid

TEXTS = [
    *("\\", "'", "\t", "\n", "\r", "\0", "a\0b", "\x01\x02", "\b\f\v\a", "\x7f", "\x1b[0m"),
    *("{a:String}", "%s %(x)s", "\\N", "\\n\\t", "\\0", "\\x41", "NULL", "", "  around  "),
    *("a'b\"c`d", "+ &=?#/%20", "\ufffd", "\u2028", "\ud7ff", "\U0010ffff"),
    *("😀" * 300, "e\u0301" * 150, "é" * 201, "x" * 199 + "\\'", "x" * 200 + "😀"),
]


def test_no_text_hides_a_row_that_is_there(clickhouse_url: str, clickhouse_database: str) -> None:
    name = STREAM_EVENTS.name
    said = [(text[:40], "detail") for text in TEXTS] + [("TICKER", text) for text in TEXTS]
    with migrated(clickhouse_url, clickhouse_database) as client:
        for number, (ticker, detail) in enumerate(said, 1):
            row = {
                "conn_id": uuid(number),
                "kind": "malformed",
                "market_ticker": ticker,
                "detail": detail,
            }
            table = arrow(STREAM_EVENTS, [row])
            for _ in range(2):
                arrival.insist(client, name, table, str(number), arrival.KEYS[name])
            there = one_row(client, f"SELECT count() FROM {name}")
            assert there == (number,), (ticker, detail)
