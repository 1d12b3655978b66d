"""The client: exact values, inserts that are stored once, and sentences for failures."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pytest

from kalshi_platform.clickhouse.client import (
    MINIMUM_VERSION,
    TRANSIENT,
    connect,
    insert_arrow,
    server_version,
    translated,
)
from kalshi_platform.errors import StoreError, StoreRefused, StoreUnavailable
from kalshi_platform.schema import ORDERBOOK_EVENTS
from kalshi_platform_tests.clickhouse.tables import arrow, migrated, one_row, settings_for, uuid

SECRET = "a-password-to-keep-secret"
AT = datetime(2026, 11, 22, 14, 3, 5, 123456, tzinfo=UTC)

ROWS = [
    {
        "type": "snapshot",
        "conn_id": uuid(1),
        "sid": 2,
        "seq": 2**63 + 7,
        "shard": 2**32 - 1,
        "record": 2**64 - 1,
        "clock": 2**64 - 1,
        "sent_ts": AT.replace(microsecond=123_000),
        "market_id": uuid(2),
        "market_ticker": "A-B",
        "side": "no",
        "price": Decimal("0.0001"),
        "qty": Decimal("9999999999999999.99"),
        "size": Decimal("9999999999999999.99"),
        "ts": None,
        "ingest_ts": AT,
    },
    {
        "type": "delta",
        "conn_id": uuid(1),
        "sid": 2,
        "seq": 3,
        "market_id": uuid(2),
        "market_ticker": "A-B",
        "side": "yes",
        "price": Decimal("0.9999"),
        "qty": Decimal("-0.01"),
        "size": Decimal("0.00"),
        "ts": AT,
        "ingest_ts": AT,
        "client_order_id": "mine",
    },
]


def test_every_value_comes_back_as_it_went_in(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    with migrated(clickhouse_url, clickhouse_database) as client:
        insert_arrow(client, "orderbook_events", arrow(ORDERBOOK_EVENTS, ROWS), "a")
        back = client.query("SELECT * FROM orderbook_events ORDER BY type")
    found = [dict(zip(back.column_names, row, strict=True)) for row in back.result_rows]
    for row, expected in zip(found, ROWS, strict=True):
        row["conn_id"], row["market_id"] = str(row["conn_id"]), str(row["market_id"])
        unset = dict.fromkeys(("shard", "record", "clock", "sent_ts"))
        assert row == {"client_order_id": "", **unset, **expected}


def test_a_second_insert_with_the_same_token_adds_nothing(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    rows = arrow(ORDERBOOK_EVENTS, ROWS)
    with migrated(clickhouse_url, clickhouse_database) as client:
        counts: list[int] = []
        for token in ("a", "a", "b", "a", "b"):
            insert_arrow(client, "orderbook_events", rows, token)
            counts += one_row(client, "SELECT count() FROM orderbook_events")
        insert_arrow(client, "orderbook_events", rows.slice(0, 0), "c")
    assert counts == [2, 2, 4, 4, 4]


def test_a_big_insert_in_chunks_is_one_block_for_each_day(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    small = arrow(ORDERBOOK_EVENTS, ROWS)
    next_day = arrow(
        ORDERBOOK_EVENTS, [{**ROWS[0], "ingest_ts": AT.replace(day=23), "side": "yes"}]
    )
    chunk = pa.concat_tables([small, next_day] * 50).combine_chunks()
    rows = pa.concat_tables([chunk] * 8_000)  # more than ClickHouse puts into a block by itself
    with migrated(clickhouse_url, clickhouse_database) as client:
        client.command("SYSTEM STOP MERGES")
        try:
            for _ in range(2):
                insert_arrow(client, "orderbook_events", rows, "big")
            parts = one_row(
                client,
                "SELECT sum(rows), count() FROM system.parts WHERE active"
                " AND database = currentDatabase() AND table = 'orderbook_events'",
            )
        finally:
            client.command("SYSTEM START MERGES")
    assert parts == (1_200_000, 2)


def test_the_log_comment_travels_with_every_query(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    settings = settings_for(clickhouse_url, clickhouse_database)
    with closing(connect(settings, log_comment="run 7")) as client:
        assert client.query("SELECT getSetting('log_comment')").first_row == ("run 7",)
        assert client.command("SELECT getSetting('log_comment')") == "run 7"


def test_threads_may_share_a_client(clickhouse_url: str, clickhouse_database: str) -> None:
    failures: list[BaseException] = []
    with closing(connect(settings_for(clickhouse_url, clickhouse_database))) as client:

        def ask() -> None:
            try:
                for _ in range(5):
                    assert client.query("SELECT 1").first_row == (1,)
            except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
                failures.append(error)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server_version(client) >= MINIMUM_VERSION
    assert failures == []


def test_a_missing_table_is_refused_with_its_code(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    with (
        closing(connect(settings_for(clickhouse_url, clickhouse_database))) as client,
        pytest.raises(StoreRefused, match=r"nowhere.*kalshi-platform migrate") as refused,
        translated(),
    ):
        client.query("SELECT * FROM nowhere")
    assert (refused.value.code, refused.value.name) == (60, "UNKNOWN_TABLE")


def test_bad_data_is_refused_for_good(clickhouse_url: str, clickhouse_database: str) -> None:
    rows = pa.table({"conn_id": ["not a uuid"]})
    with (
        migrated(clickhouse_url, clickhouse_database) as client,
        pytest.raises(StoreRefused) as refused,
    ):
        insert_arrow(client, "orderbook_events", rows, "bad")
    assert refused.value.code is not None


def test_transient_errors_are_unavailable(clickhouse_url: str, clickhouse_database: str) -> None:
    with (
        closing(connect(settings_for(clickhouse_url, clickhouse_database))) as client,
        pytest.raises(StoreUnavailable) as late,
        translated(),
    ):
        client.query(
            "SELECT throwIf(1, 'merges are behind', 252::Int16)",
            settings={"allow_custom_error_code_in_throwif": 1},
        )
    assert late.value.code == 252


def test_the_names_of_the_transient_codes_are_clickhouse_s_own(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    with closing(connect(settings_for(clickhouse_url, clickhouse_database))) as client:
        named = client.query(
            "SELECT code, errorCodeToName(code) FROM (SELECT arrayJoin({codes:Array(Int32)}) AS code)",
            parameters={"codes": list(TRANSIENT)},
        ).result_rows
    assert {code: name for code, name in named} == TRANSIENT  # noqa: C416 - typed so


def test_a_missing_database_says_how_to_create_it(clickhouse_url: str) -> None:
    with pytest.raises(StoreRefused, match=r"nowhere.*kalshi-platform migrate") as refused:
        connect(settings_for(clickhouse_url, "nowhere"))
    assert refused.value.name == "UNKNOWN_DATABASE"


def test_a_wrong_password_is_named_without_being_shown(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    settings = settings_for(
        clickhouse_url,
        clickhouse_database,
        clickhouse_user="unknown_user",
        clickhouse_password=SECRET,
    )
    with pytest.raises(StoreRefused, match="CLICKHOUSE_PASSWORD") as refused:
        connect(settings)
    assert "unknown_user" in str(refused.value)
    cause: BaseException | None = refused.value
    while cause is not None:
        assert SECRET not in repr(cause) + str(cause)
        cause = cause.__cause__ or cause.__context__
    assert SECRET not in repr(settings)


def test_an_unreachable_server_is_unavailable(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(
            StoreUnavailable, match=rf"{url} cannot be reached \(Connection refused\)"
        ):
            connect(settings_for(url, "kalshi"))
    # the sentence says it all; the driver would log a traceback beside it
    assert not [record for record in caplog.records if "clickhouse" in record.name]


def test_a_server_that_stays_silent_is_unavailable() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(StoreUnavailable, match="cannot be reached"):
            connect(settings_for(url, "kalshi"), receive_timeout_s=1)


def test_the_environments_proxy_is_not_used_for_loopback(
    clickhouse_url: str, clickhouse_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with closing(connect(settings_for(clickhouse_url, clickhouse_database))) as client:
        assert client.query("SELECT 1").first_row == (1,)


@pytest.mark.parametrize(("status", "kind"), [(404, StoreRefused), (502, StoreUnavailable)])
def test_a_server_that_is_not_clickhouse_is_named(status: int, kind: type[StoreError]) -> None:
    with _web_server(status) as url, pytest.raises(kind, match=f"HTTP {status}"):
        connect(settings_for(url, "kalshi"))


@contextmanager
def _web_server(status: int) -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_error(status)

        do_GET = do_POST = _answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
