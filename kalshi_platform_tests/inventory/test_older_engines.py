"""Engines that write otherwise than the library does: each works, or a note says what to change.

They insert by HTTP, as CSV, with what they know as columns; some made their tables themselves, with the types
that the older system gave them.
"""

from __future__ import annotations

import csv
import io
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse.client import Client, connect
from kalshi_platform.commands.main import main
from kalshi_platform.inventory.kinds import Kind
from kalshi_platform_tests.clickhouse.tables import prepare, settings_for
from kalshi_platform_tests.conftest import DATABASE_TIMEOUT_S

TICKER = "KXOLDER-26NOV22"
TIME, TEXT, SHORT, NUMBER = "DateTime64(3, 'UTC')", "String", "LowCardinality(String)", "Float64"
OLDER: Mapping[str, Mapping[str, str]] = {
    "mm_decisions": {
        "ts": TIME,
        "decision_id": "UUID",
        **dict.fromkeys(("engine_instance_id", "engine_version", "market_ticker"), TEXT),
        **dict.fromkeys(("bb_px", "ba_px", "mid", "spread", "fair", "target_bid_px"), NUMBER),
        **dict.fromkeys(("target_ask_px", "target_bid_sz", "target_ask_sz"), NUMBER),
        **dict.fromkeys(("inv_before", "inv_after_est"), NUMBER),
        "reason_codes": "Array(String)",
        "params_json": TEXT,
    },
    "mm_order_actions": {
        "ts": TIME,
        **dict.fromkeys(("action_id", "decision_id"), "UUID"),
        **dict.fromkeys(("engine_instance_id", "engine_version", "market_ticker"), TEXT),
        "client_order_id": TEXT,
        **dict.fromkeys(("action_type", "side", "api_side"), SHORT),
        "price": NUMBER,
        "price_cents": "UInt16",
        "size": NUMBER,
        **dict.fromkeys(("replace_of_client_order_id", "request_json"), TEXT),
    },
    "mm_order_responses": {
        "ts": TIME,
        "action_id": "UUID",
        **dict.fromkeys(("engine_instance_id", "engine_version", "market_ticker"), TEXT),
        "client_order_id": TEXT,
        "status": SHORT,
        **dict.fromkeys(("exchange_order_id", "reject_reason"), TEXT),
        "latency_ms": "UInt32",
        "response_json": TEXT,
    },
    "mm_fills": {
        "ts": TIME,
        **dict.fromkeys(("engine_instance_id", "engine_version", "market_ticker"), TEXT),
        **dict.fromkeys(("exchange_order_id", "client_order_id"), TEXT),
        "side": SHORT,
        "price": NUMBER,
        "price_cents": "UInt16",
        **dict.fromkeys(("size", "fee"), NUMBER),
        "decision_id": "UUID",
        **dict.fromkeys(("fill_id", "raw_json"), TEXT),
    },
    "mm_positions": {"ts": TIME, "market_ticker": TEXT, "position": NUMBER},
}
"""The tables of the older system's engine, with its types."""


class Engine:
    """An engine that inserts by HTTP, and the command line beside it."""

    def __init__(self, url: str, client: Client) -> None:
        self.url = url
        self.client = client
        answer = client.query("SELECT now64(3, 'UTC')").first_row
        assert answer is not None
        self.now: datetime = answer[0]

    def create(self, tables: Mapping[str, Mapping[str, str]]) -> None:
        for name, columns in tables.items():
            described = ", ".join(f"{column} {kind}" for column, kind in columns.items())
            self.client.command(
                f"CREATE TABLE {name} ({described}) ENGINE = MergeTree PARTITION BY toDate(ts)"
                " ORDER BY (market_ticker, ts)"
            )

    def insert(self, table: str, row: Mapping[str, object]) -> None:
        """One row, as the older system's engine sends it: what is not known is an empty field."""
        text = io.StringIO()
        lines = csv.DictWriter(text, list(row))
        lines.writeheader()
        lines.writerow({name: "" if value is None else value for name, value in row.items()})
        httpx.post(
            self.url,
            params={"database": str(self.client.database), "user": "default"},
            content=f"INSERT INTO {table} FORMAT CSVWithNames\n{text.getvalue()}".encode(),
            timeout=DATABASE_TIMEOUT_S,
        ).raise_for_status()

    def decision(
        self, seconds: float, others: Mapping[str, object] | None = None, *, whole: bool = True
    ) -> None:
        at = self.now - timedelta(seconds=seconds)
        self.insert(
            "mm_decisions",
            {
                "ts": f"{at:%Y-%m-%d %H:%M:%S}"
                + ("" if whole else f".{at.microsecond // 1000:03}"),
                "decision_id": uuid.uuid4(),
                "engine_instance_id": "older-1",
                "market_ticker": TICKER,
                "bb_px": None,
                "inv_before": 0,
                "inv_after_est": 0,
                "params_json": "{}",
                **(others or {}),
            },
        )

    def prepare(self) -> None:
        """The platform's own tables, where none are there yet."""
        prepare(settings_for(self.url, str(self.client.database), hot_retention_days=36_500))

    def platform(self, *args: str) -> Result:
        platform_settings.current.cache_clear()
        return CliRunner().invoke(main, args)


@pytest.fixture
def engine(
    clickhouse_url: str, clickhouse_database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Engine]:
    """An empty database, for an engine and the command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLICKHOUSE_URL", clickhouse_url)
    monkeypatch.setenv("CLICKHOUSE_DATABASE", clickhouse_database)
    with closing(connect(settings_for(clickhouse_url, clickhouse_database))) as client:
        yield Engine(clickhouse_url, client)
    platform_settings.current.cache_clear()


def remedy(output: str, pattern: str) -> str:
    found = re.search(pattern, output)
    assert found is not None, output
    return found[0]


def judged(**others: object) -> dict[str, object]:
    """The position columns, as the older system's engine fills them."""
    return {
        "pos_filled": 0,
        "pos_open_exposure": 0,
        "pos_total_est": 0,
        "block_codes": "['max_long']",
        "inv_convention": "BUY_YES_POSITIVE",
        "open_orders_count": 0,
        **others,
    }


def test_the_older_systems_tables_work_once_they_are_migrated(engine: Engine) -> None:
    engine.create(OLDER)
    engine.decision(60, {"reason_codes": "['a']"})
    older = engine.platform("qa")
    assert older.exit_code == 1
    assert "mm_decisions is older than the checks, it lacks pos_filled," in str(older.exception)
    assert engine.platform("migrate").exit_code == 0
    unknown = engine.platform("qa", "--all", "--explain")
    assert unknown.exit_code == 0, unknown.output
    assert "1 of 1 decision have no position" in unknown.output

    action = {
        "ts": f"{engine.now - timedelta(seconds=31):%Y-%m-%d %H:%M:%S}",
        "action_id": uuid.uuid4(),
    }
    order = {"engine_instance_id": "older-1", "market_ticker": TICKER, "client_order_id": "o-1"}
    engine.insert(
        "mm_order_actions",
        {**action, **order, "action_type": "place", "side": "bid", "api_side": "yes", "size": 5,
         "decision_id": uuid.uuid4(), "price": 0.4, "price_cents": 40, "request_json": "{}"},
    )  # fmt: skip
    engine.insert("mm_order_responses", {**action, **order, "status": "resting", "latency_ms": 12})
    engine.insert(
        "mm_position_snapshots",
        {
            "ts": f"{engine.now - timedelta(seconds=90):%Y-%m-%d %H:%M:%S}",
            "market_ticker": TICKER,
            "pos_filled": 0,
        },
    )
    resting = judged(pos_open_exposure=5, pos_total_est=5, open_orders_count=1, open_yes_bid_size=5)
    engine.decision(40, judged())
    engine.decision(30, resting)
    healthy = engine.platform("qa", "--all", "--explain")
    assert healthy.exit_code == 0, f"{healthy.output}{healthy.exception or ''}"
    engine.decision(20, resting | {"open_orders_count": 0})
    wrong = engine.platform("qa", "--all", "--explain")
    assert wrong.exit_code == 2, f"{wrong.output}{wrong.exception or ''}"
    assert "Check B: Open Exposure Mismatch: 1 row" in wrong.output


def test_the_older_systems_convention_name_is_accepted(engine: Engine) -> None:
    engine.prepare()
    engine.insert(
        "mm_position_snapshots",
        {
            "ts": f"{engine.now - timedelta(seconds=90):%Y-%m-%d %H:%M:%S}",
            "market_ticker": TICKER,
            "pos_filled": 9,
        },
    )
    engine.decision(30, judged(pos_filled=4, pos_total_est=4, inv_before=4))
    result = engine.platform("qa", "--explain")
    assert result.exit_code == 2, f"{result.output}{result.exception or ''}"
    assert Kind.WRONG_CONVENTION not in result.output.lower()


def test_a_table_that_takes_no_position_for_a_flat_one_is_named(engine: Engine) -> None:
    """The older system's 010 gave the position columns DEFAULT 0; its engine may be older still."""
    position = dict.fromkeys(
        ("pos_filled", "pos_open_exposure", "pos_total_est"), "Float64 DEFAULT 0"
    )
    engine.create({**OLDER, "mm_decisions": {**OLDER["mm_decisions"], **position}})
    assert engine.platform("migrate").exit_code == 0
    engine.decision(30)
    answer = engine.platform("qa")
    assert (
        "note: engine older-1 writes no position, and mm_decisions takes zero for it"
        in answer.output
    )
    engine.client.command(remedy(answer.output, r"ALTER TABLE [^.]+\.mm_decisions [^.\n]+"))
    engine.client.command("TRUNCATE TABLE mm_decisions")
    engine.decision(20)
    unknown = engine.platform("qa", "--max-age", "600")
    assert unknown.exit_code == 2
    assert "1 of 1 decision have no position" in unknown.output
    assert "takes zero for it" not in unknown.output


def test_an_engine_without_open_orders_count_gets_a_note(engine: Engine) -> None:
    engine.prepare()
    without = {name: value for name, value in judged().items() if name != "open_orders_count"}
    engine.decision(30, without | {"pos_open_exposure": 5, "pos_total_est": 5})
    answer = engine.platform("qa")
    assert (
        "engine older-1 counts exposure from open orders and never an open order." in answer.output
    )
    assert "insert the number of its open orders with every decision" in answer.output
    engine.client.command("TRUNCATE TABLE mm_decisions")
    engine.decision(
        30, judged(pos_open_exposure=5, pos_total_est=5, open_orders_count=1, open_yes_bid_size=5)
    )
    assert "never an open order" not in engine.platform("qa").output


def test_ts_as_datetime_is_read_and_named_with_how_to_change_it(engine: Engine) -> None:
    tables = {name: {**columns, "ts": "DateTime"} for name, columns in OLDER.items()}
    engine.create(tables)
    assert engine.platform("migrate").exit_code == 0
    engine.decision(40, judged(pos_filled=3, pos_total_est=3, inv_before=3))
    engine.decision(30, judged(pos_filled=3, pos_total_est=3, inv_before=3, pos_open_exposure=4))
    for strict in ((), ("--strict-runbook",)):
        read = engine.platform("qa", "--all", "--explain", *strict)
        assert read.exit_code == 2, f"{read.output}{read.exception or ''}"
        assert "Check B: Open Exposure Mismatch: 1 row" in read.output
    coarse = [line for line in read.output.splitlines() if " is DateTime, whole seconds" in line]
    assert [line.split()[1] for line in coarse] == [
        "mm_decisions.ts", "mm_fills.ts", "mm_order_actions.ts", "mm_order_responses.ts",
    ]  # fmt: skip
    for line in coarse:
        engine.client.command(remedy(line, r"RENAME TABLE \S+ TO [\w.]+(?=,)"))
        assert engine.platform("migrate").exit_code == 0
        engine.client.command(remedy(line, r"INSERT INTO .* SELECT .* FROM [\w.]+(?=\.)"))
    after = engine.platform("qa", "--all", "--explain", "--strict-runbook")
    assert after.exit_code == 2
    assert "DateTime" not in after.output
    assert "Judged: 2 decisions of 1 market" in after.output


def test_whole_seconds_are_noticed_in_the_rows_too(engine: Engine) -> None:
    engine.prepare()
    for second in range(20):
        engine.decision(200 - second, judged())
    assert "note: engine older-1 writes whole seconds as ts" in engine.platform("qa").output
    at = engine.now.replace(microsecond=1000)
    engine.now = at
    engine.decision(1, judged(), whole=False)
    assert "whole seconds" not in engine.platform("qa").output


@pytest.mark.parametrize("protocol", ["http", "native"])
def test_the_older_flag_for_the_protocol_is_taken(engine: Engine, protocol: str) -> None:
    engine.prepare()
    engine.decision(30, judged())
    result = engine.platform("qa", "--protocol", protocol)
    assert result.exit_code == 0, f"{result.output}{result.exception or ''}"
    assert ("native port" in result.stderr) == (protocol == "native")
