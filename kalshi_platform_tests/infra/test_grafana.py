"""Every query of every dashboard runs on the real engine and returns recorded rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from kalshi_platform.clickhouse.client import Client, connect
from kalshi_platform.schema import (
    DEPTH,
    IMBALANCE,
    LATEST_LEVELS,
    ORDERBOOK_EVENTS,
    SPREADS,
    STREAM_EVENTS,
)
from kalshi_platform_tests.clickhouse.tables import insert, prepare, settings_for, uuid
from kalshi_platform_tests.clickhouse.two_shards import database_name

GRAFANA = Path(__file__).resolve().parents[2] / "infra" / "grafana"
TICKER = "KXSHOWN-26"


@dataclass(frozen=True)
class Panel:
    """One query of a dashboard."""

    board: str
    title: str
    kind: str
    sql: str

    def __str__(self) -> str:
        return f"{self.board}: {self.title}"


def boards() -> dict[str, dict[str, Any]]:
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((GRAFANA / "dashboards").glob("*.json"))
    }


def queries() -> list[Panel]:
    found = []
    for name, board in boards().items():
        for panel in board["panels"]:
            for target in panel["targets"]:
                found.append(Panel(name, panel["title"], target["queryType"], target["rawSql"]))
        for variable in board["templating"]["list"]:
            found.append(Panel(name, f"variable {variable['name']}", "variable", variable["query"]))
    return found


def as_the_plugin_sends_it(sql: str) -> str:
    """The macros of Grafana's ClickHouse plugin, for the last hour in steps of ten seconds."""
    now = datetime.now(UTC)  # not that of the import: hundreds of tests may come between
    start, end = (int((now + timedelta(minutes=m)).timestamp()) for m in (-60, 5))
    sql = re.sub(
        r"\$__timeFilter\((\w+)\)", rf"\1 >= toDateTime({start}) AND \1 <= toDateTime({end})", sql
    )
    sql = re.sub(
        r"\$__timeInterval\((\w+)\)",
        r"toStartOfInterval(toDateTime(\1), INTERVAL 10 second)",
        sql,
    )
    sql = sql.replace("$__interval_s", "10").replace("${ticker:sqlstring}", f"'{TICKER}'")
    assert "$" not in sql, "an unreplaced macro or variable"
    return sql


def rows_of(client: Client) -> None:
    """Insert the rows of a minute of recording, and of a market maker with a break."""
    at = datetime.now(UTC) - timedelta(seconds=60)
    book = {"market_id": uuid(9), "market_ticker": TICKER}
    frame = {"conn_id": uuid(1), "sid": 1, "ingest_ts": at}
    levels = [("yes", "0.45", 5), ("yes", "0.44", 9), ("no", "0.52", 3)]
    size = Decimal(10)
    snapshot: list[dict[str, Any]] = [
        {**book, **frame, "type": "snapshot", "seq": 1, "side": side, "price": Decimal(price)}
        | {"qty": Decimal(qty), "size": Decimal(qty)}
        for side, price, qty in levels
    ]
    deltas = [
        {**book, **frame, "type": "delta", "seq": 2 + n, "side": "yes", "price": Decimal("0.45")}
        | {"qty": Decimal(1), "size": size, "ingest_ts": at + timedelta(seconds=n)}
        | {"ts": at + timedelta(seconds=n, milliseconds=-40)}
        for n in range(30)
    ]
    insert(client, ORDERBOOK_EVENTS, [*snapshot, *deltas])
    happened = [("snapshot", 1), ("heartbeat", 0), ("gap", 40), ("error", 41), ("mismatch", 0)]
    insert(client, STREAM_EVENTS, [{**frame, "kind": kind, "seq": seq} for kind, seq in happened])
    lost = {"conn_id": uuid(2), "sid": 1, "ingest_ts": at, "kind": "disconnected"}
    begun = {**frame, "market_ticker": TICKER, "kind": "snapshot", "seq": 1}  # for rolling_stats
    insert(client, STREAM_EVENTS, [lost, begun])
    insert(
        client,
        LATEST_LEVELS,
        [
            {**book, "side": s, "price": Decimal(p), "size": Decimal(q), "ingest_ts": at}
            for s, p, q in levels
        ],
    )
    second = {"market_ticker": TICKER, "second": at}
    insert(client, SPREADS, [{**frame, "market_ticker": TICKER, "cause": "delta"}])
    insert(client, DEPTH, [second])
    insert(client, IMBALANCE, [{**second, "ofi": Decimal(3)}])
    mine = f"now() - 30, '{TICKER}'"
    for statement in (
        "INSERT INTO mm_decisions (ts, market_ticker, pos_filled, pos_total_est, allowed, block_codes)"
        f" SELECT {mine}, 5, 7, 0, ['RISK']",
        f"INSERT INTO mm_position_snapshots (ts, market_ticker, pos_filled) SELECT {mine}, 6",
        f"INSERT INTO mm_order_responses (ts, market_ticker, latency_ms) SELECT {mine}, 12",
        "INSERT INTO mm_inventory_breaks (opened_at, market_ticker, last_seen_at)"
        f" SELECT {mine}, now()",
    ):
        client.command(statement)


@pytest.fixture(scope="module")
def client(clickhouse_url: str) -> Iterator[Client]:
    """A database with rows of the last minute."""
    settings = settings_for(clickhouse_url, database_name(), hot_retention_days=36_500)
    prepare(settings)
    with closing(connect(settings)) as client:
        rows_of(client)
        yield client


@pytest.mark.parametrize("panel", queries(), ids=str)
def test_a_panels_query_runs_and_shows_recorded_rows(client: Client, panel: Panel) -> None:
    found = client.query(as_the_plugin_sends_it(panel.sql))
    assert found.result_rows
    if panel.kind == "timeseries":
        assert found.column_names[0] == "time"
        assert str(found.column_types[0].base_type).startswith("DateTime")
        numbers = [kind.python_type in (int, float) for kind in found.column_types[1:]]
        texts = sum(kind.base_type == "String" for kind in found.column_types[1:])
        assert any(numbers)
        assert texts <= 1  # the series' name
    assert any(value is not None for value in found.result_rows[0])


def test_what_is_counted_as_an_open_gap(client: Client) -> None:
    (panel,) = [p for p in queries() if p.title == "Open gaps"]
    sql = as_the_plugin_sends_it(panel.sql)
    assert client.query(sql).first_row == (1,)
    resync = {"conn_id": uuid(1), "sid": 1, "ingest_ts": datetime.now(UTC), "kind": "resynced"}
    insert(client, STREAM_EVENTS, [resync])
    assert client.query(sql).first_row == (0,)


def test_every_panel_has_a_unique_name_and_the_data_source() -> None:
    source = yaml.safe_load((GRAFANA / "provisioning/datasources/clickhouse.yaml").read_text())
    (known,) = source["datasources"]
    uids = set()
    for board in boards().values():
        uids.add(board["uid"])
        ids = [panel["id"] for panel in board["panels"]]
        titles = [panel["title"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids)
        assert len(set(titles)) == len(titles)
        wanted = {"type": known["type"], "uid": known["uid"]}
        for panel in board["panels"]:
            assert panel["datasource"] == wanted
            assert [t["datasource"] for t in panel["targets"]] == [wanted]
    assert len(uids) == 3


def test_panels_do_not_overlap() -> None:
    for board in boards().values():
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            at = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(at["x"], at["x"] + at["w"])
                for y in range(at["y"], at["y"] + at["h"])
            }
            assert at["x"] + at["w"] <= 24
            assert not cells & taken, panel["title"]
            taken |= cells
