"""A long query's progress comes in headers while it runs, and the rest of its answer is right."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any
from urllib.parse import urlencode, urlsplit

import clickhouse_connect
import httpx
import pytest

from kalshi_platform_tests.embedded_clickhouse.conftest import PATIENCE_S, Ask

SLOW = "SELECT sum(sleepEachRow(0.05)) + 7 FROM numbers(20) SETTINGS max_block_size = 1"
ON = {"send_progress_in_http_headers": "1", "http_headers_progress_interval_ms": "50"}


def _progress(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(value) for value in answer.headers.get_list("X-ClickHouse-Progress")]


@pytest.mark.parametrize("own", [{}, {"wait_end_of_query": "1"}])
def test_progress_only_grows_and_the_summary_is_right(ask: Ask, own: dict[str, str]) -> None:
    answer = ask(SLOW, **ON, **own)
    assert (answer.status_code, answer.text) == (200, "7\n")
    reports = _progress(answer)
    assert len(reports) >= 2
    for name in ("read_rows", "elapsed_ns"):
        values = [int(report[name]) for report in reports]
        assert values == sorted(values)
    assert all(isinstance(value, str) for report in reports for value in report.values())
    assert json.loads(answer.headers["X-ClickHouse-Summary"])["read_rows"] == "20"
    assert len(answer.headers.get_list("X-ClickHouse-Summary")) == 1


def test_the_first_header_comes_while_the_query_runs(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    at = urlsplit(clickhouse_url)
    query = "SELECT sleepEachRow(0.1) FROM numbers(30) SETTINGS max_block_size = 1 FORMAT Null"
    options = urlencode({"query": query, "database": clickhouse_database, **ON})
    with socket.create_connection((str(at.hostname), at.port or 0), timeout=PATIENCE_S) as client:
        client.sendall(f"POST /?{options} HTTP/1.1\r\nHost: {at.netloc}\r\n\r\n".encode())
        received = b""
        while b"X-ClickHouse-Progress" not in received:
            received += client.recv(65536)
        assert received.startswith(b"HTTP/1.1 200 OK\r\nX-ClickHouse-Progress: {")
        assert b"X-ClickHouse-Summary" not in received
        assert b"\r\n\r\n" not in received
        client.sendall(b"")  # the connection is open
        while b"\r\n\r\n" not in received:
            received += client.recv(65536)
        assert received.count(b"HTTP/1.1 ") == 1
        client.sendall(f"GET /ping HTTP/1.1\r\nHost: {at.netloc}\r\n\r\n".encode())
        following = client.recv(65536)
        assert following.startswith(b"HTTP/1.1 200 OK\r\n")


def test_an_error_after_progress_is_in_the_header_of_its_code(ask: Ask) -> None:
    query = "SELECT sleepEachRow(0.05), throwIf(number = 15) FROM numbers(20) SETTINGS max_block_size = 1"
    answer = ask(f"{query} FORMAT JSON", **ON)
    assert answer.status_code == 200
    assert answer.headers["X-ClickHouse-Exception-Code"] == "395"
    assert answer.text.startswith("Code: 395. ")
    assert _progress(answer)


def test_an_insert_reports_what_it_wrote(ask: Ask) -> None:
    ask("CREATE TABLE t (a UInt8) ENGINE = Memory").raise_for_status()
    query = "INSERT INTO t SELECT sleepEachRow(0.05) FROM numbers(20) SETTINGS max_block_size = 1"
    answer = ask(query, **ON)
    assert answer.status_code == 200
    assert _progress(answer)
    assert json.loads(answer.headers["X-ClickHouse-Summary"])["written_rows"] == "20"


def test_a_request_that_wants_none_and_a_short_one_get_none(ask: Ask) -> None:
    assert not _progress(ask("SELECT sleep(0.3)"))
    assert not _progress(ask("SELECT sleep(0.3)", send_progress_in_http_headers="0"))
    assert not _progress(ask("SELECT 1", send_progress_in_http_headers="1"))


def test_clickhouse_connect_reads_an_answer_behind_progress(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    at = urlsplit(clickhouse_url)
    with clickhouse_connect.get_client(
        host=at.hostname, port=at.port, database=clickhouse_database
    ) as client:
        rows = client.query(
            "SELECT sleepEachRow(0.05), number FROM numbers(10)",
            settings={**ON, "max_block_size": 1, "wait_end_of_query": 1},
        ).result_rows
        assert [number for _, number in rows] == list(range(10))


def test_queries_at_the_same_time_report_their_own_progress(ask: Ask) -> None:
    ends = dict[int, int]()

    def run(rows: int) -> None:
        query = f"SELECT sum(sleepEachRow(0.05)) FROM numbers({rows}) SETTINGS max_block_size = 1"
        reports = _progress(ask(query, **ON))
        ends[rows] = max(int(report["read_rows"]) for report in reports)

    threads = [threading.Thread(target=run, args=(rows,)) for rows in (10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < ends[10] <= 10 < ends[20] <= 20
