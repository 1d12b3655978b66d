"""With many clients, none waits for another's query to end."""

from __future__ import annotations

import concurrent.futures
import http.client
import time
import uuid
from urllib.parse import urlsplit

import httpx
import pytest

from kalshi_platform_tests.embedded_clickhouse.conftest import (
    FOR_EVER,
    PATIENCE_S,
    Ask,
    running_now,
    wait_until_running,
)


def test_inserts_queries_and_ping_go_on_under_a_long_query(ask: Ask, clickhouse_url: str) -> None:
    ask("CREATE TABLE t (a UInt64) ENGINE = MergeTree ORDER BY a").raise_for_status()
    mark = uuid.uuid4().hex
    with concurrent.futures.ThreadPoolExecutor() as pool:
        long = pool.submit(ask, f"{FOR_EVER}, log_comment = '{mark}'")
        wait_until_running(ask, mark, 1)
        for number in range(20):
            ask("INSERT INTO t FORMAT CSV", b"%d\n" % number).raise_for_status()
        assert ask("SELECT count() FROM t").text == "20\n"
        assert httpx.get(f"{clickhouse_url}/ping", timeout=PATIENCE_S).text == "Ok.\n"
        assert not long.done()
        killed = ask(f"KILL QUERY WHERE Settings['log_comment'] = '{mark}' SYNC")
        killed.raise_for_status()
        assert long.result().headers["X-ClickHouse-Exception-Code"] == "394"


def test_concurrent_inserts_lose_nothing(ask: Ask) -> None:
    ask("CREATE TABLE t (a UInt64) ENGINE = MergeTree ORDER BY a").raise_for_status()

    def insert(number: int) -> int:
        return ask("INSERT INTO t FORMAT CSV", b"%d\n" % number * 100).status_code

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert set(pool.map(insert, range(60))) == {200}
    assert ask("SELECT count(), uniqExact(a) FROM t").text == "6000\t60\n"


def test_max_execution_time_is_kept(ask: Ask) -> None:
    answer = ask(FOR_EVER, max_execution_time="1")
    assert (answer.status_code, answer.headers["X-ClickHouse-Exception-Code"]) == (408, "159")


@pytest.mark.parametrize("columns", ["sum(cityHash64(number))", "number"])
def test_a_query_ends_when_its_client_goes_away(
    ask: Ask, clickhouse_url: str, columns: str
) -> None:
    """Test both before the answer has begun and in the middle of it."""
    mark = uuid.uuid4().hex
    address = urlsplit(clickhouse_url)
    body = FOR_EVER.replace("sum(cityHash64(number))", columns) + f", log_comment = '{mark}'"
    client = http.client.HTTPConnection(str(address.hostname), address.port)
    client.request("POST", "/", body)
    wait_until_running(ask, mark, 1)
    client.close()
    wait_until_running(ask, mark, 0)


def test_queries_end_whose_clients_were_gone_before_they_began(
    ask: Ask, clickhouse_url: str
) -> None:
    mark = uuid.uuid4().hex
    address = urlsplit(clickhouse_url)
    for _ in range(150):  # more than are answered at a time, so that some wait
        client = http.client.HTTPConnection(str(address.hostname), address.port)
        client.request("POST", "/", f"{FOR_EVER}, log_comment = '{mark}'")
        client.close()
    time.sleep(2)  # they may not have begun yet
    wait_until_running(ask, mark, 0)


def test_an_answer_that_is_not_read_is_abandoned(ask: Ask, clickhouse_url: str) -> None:
    mark = uuid.uuid4().hex
    query = "SELECT number, randomString(1000) FROM numbers(1000000000) FORMAT RowBinary"
    body = f"{query} SETTINGS log_comment = '{mark}'"
    with httpx.stream("POST", clickhouse_url, content=body, timeout=PATIENCE_S) as answer:
        pieces = answer.iter_raw()
        assert sum(len(next(pieces)) for _ in range(200)) > 0
        assert running_now(ask, mark) == 1
    wait_until_running(ask, mark, 0)
