"""A request leaves no state for the next one, except in a session."""

from __future__ import annotations

import concurrent.futures
import contextlib
import uuid

import httpx
import pytest

from kalshi_platform_tests.embedded_clickhouse.conftest import FOR_EVER, Ask, wait_until_running


def test_settings_do_not_leak_between_requests(ask: Ask) -> None:
    usual = ask("SELECT getSetting('max_block_size')").text
    for _ in range(3):
        assert ask("SELECT getSetting('max_block_size')", max_block_size="77").text == "77\n"
        ask("SET max_block_size = 78").raise_for_status()
        assert ask("SELECT getSetting('max_block_size')").text == usual


def test_settings_do_not_leak_between_concurrent_requests(ask: Ask) -> None:
    def read(number: int) -> tuple[str, str]:
        answer = ask(
            "SELECT getSetting('max_block_size'), currentDatabase(), sleep(0.02) FORMAT TSV",
            max_block_size=str(number),
            database="system" if number % 2 else "default",
        )
        block, database, _ = answer.text.split("\t")
        return block, database

    numbers = range(1, 41)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(read, numbers))
    assert answers == [(str(n), "system" if n % 2 else "default") for n in numbers]


def test_a_session_keeps_settings_database_and_temporary_tables(ask: Ask) -> None:
    session = uuid.uuid4().hex
    usual = ask("SELECT getSetting('max_block_size')").text
    ask("SET max_block_size = 99", session_id=session).raise_for_status()
    ask("CREATE TEMPORARY TABLE kept (a UInt8)", session_id=session).raise_for_status()
    ask("INSERT INTO kept VALUES (1), (2)", session_id=session).raise_for_status()
    assert ask("SELECT count() FROM kept", session_id=session).text == "2\n"
    assert ask("SELECT getSetting('max_block_size')", session_id=session).text == "99\n"
    assert ask("SELECT getSetting('max_block_size')").text == usual
    assert ask("SELECT count() FROM kept").headers["X-ClickHouse-Exception-Code"] == "60"
    ask("USE system", session_id=session).raise_for_status()
    assert ask("SELECT currentDatabase()", session_id=session, database="").text == "system\n"


def test_a_requests_own_settings_do_not_stay_in_its_session(ask: Ask) -> None:
    session = uuid.uuid4().hex
    ask("SET max_block_size = 99", session_id=session).raise_for_status()
    own = {"session_id": session, "max_block_size": "5", "max_threads": "1", "database": "system"}
    assert (
        ask("SELECT getSetting('max_block_size'), currentDatabase()", **own).text == "5\tsystem\n"
    )
    usual = ask("SELECT getSetting('max_threads')").text
    read = "SELECT getSetting('max_block_size'), getSetting('max_threads'), currentDatabase()"
    assert ask(read, session_id=session, database="").text == f"99\t{usual.strip()}\tdefault\n"


def test_a_session_that_was_never_opened_is_not_found(ask: Ask) -> None:
    answer = ask("SELECT 1", session_id=uuid.uuid4().hex, session_check="1")
    assert answer.headers["X-ClickHouse-Exception-Code"] == "372"


@pytest.mark.parametrize("state", ["SELECT 1", "SET max_block_size = 99"])
def test_a_session_serves_one_request_at_a_time(ask: Ask, state: str) -> None:
    session = uuid.uuid4().hex
    ask(state, session_id=session).raise_for_status()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(ask, f"{FOR_EVER}, log_comment = '{session}'", session_id=session)
        wait_until_running(ask, session, 1)
        second = ask("SELECT 1", session_id=session)
        assert second.headers["X-ClickHouse-Exception-Code"] == "373"
        assert "SESSION_IS_LOCKED" in second.text
        ask(f"KILL QUERY WHERE Settings['log_comment'] = '{session}' SYNC").raise_for_status()
        assert first.result().headers["X-ClickHouse-Exception-Code"] == "394"
    assert ask("SELECT 1", session_id=session).text == "1\n"


def test_a_session_is_free_once_its_answer_has_been_read(ask: Ask) -> None:
    session = uuid.uuid4().hex
    for _ in range(10):
        for query in (
            "SELECT number FROM numbers(200000)",
            "SELECT throwIf(number = 100000) FROM numbers(100001)",
            "SELECT * FROM nowhere",
        ):
            with contextlib.suppress(httpx.RemoteProtocolError):
                code = ask(query, session_id=session).headers.get("X-ClickHouse-Exception-Code")
                assert code != "373"


@pytest.mark.parametrize("timeout", ["x", "-1", "3601"])
def test_a_bad_session_timeout_is_refused(ask: Ask, timeout: str) -> None:
    answer = ask("SELECT 1", session_id="s", session_timeout=timeout)
    assert answer.headers["X-ClickHouse-Exception-Code"] == "374"
