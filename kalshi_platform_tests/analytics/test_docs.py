"""The snippets of docs/reading-the-archive.md run as they stand, and show what the archive holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import polars as pl
import pytest

from kalshi_platform.analytics.hourly import compute_hour
from kalshi_platform.archive import LocalArchive
from kalshi_platform.clickhouse import client
from kalshi_platform.schema import ORDERBOOK_EVENTS, SPREADS
from kalshi_platform.utc_hours import HOUR as ONE_HOUR
from kalshi_platform_tests.analytics.recording import HOUR, record_hour
from kalshi_platform_tests.archived import without_records
from kalshi_platform_tests.clickhouse.tables import insert, prepare, settings_for

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reading-the-archive.md"
SNIPPETS = dict(
    re.findall(
        r"^## ([\w-]+):[^\n]*\n(?:(?!##|```)[^\n]*\n)*```python\n(.*?)```",
        PAGE.read_text("utf-8"),
        re.DOTALL | re.MULTILINE,
    )
)
(LATER,) = re.findall(
    r"^## Columns that came later\n.*?```python\n(.*?)```",
    PAGE.read_text("utf-8"),
    re.DOTALL | re.MULTILINE,
)
TICKER = "M-1"
mpl.use("Agg")


def rows(root: Path, dataset: str) -> list[dict[str, Any]]:
    (table,) = LocalArchive(root).read(dataset, HOUR)
    found: list[dict[str, Any]] = table.to_pylist()
    return found


def polars_is_right(result: Any, root: Path) -> None:
    spreads = rows(root, "spreads")
    wanted = {}
    for ticker in {r["market_ticker"] for r in spreads}:
        of = [r for r in spreads if r["market_ticker"] == ticker]
        spans = [
            ((b["known_at"] - a["known_at"]).total_seconds(), float(a["spread"]))
            for a, b in pairwise(of)
            if a["spread"] is not None and a["verified"]
        ]
        assert any(not r["verified"] for r in of)  # the hour has an outage
        wanted[ticker] = sum(s * t for t, s in spans) / sum(t for t, _ in spans)
    assert dict(result.iter_rows()) == pytest.approx(wanted)


def duckdb_is_right(result: Any, root: Path) -> None:
    spreads = rows(root, "spreads")
    counts = {t: sum(r["market_ticker"] == t for r in spreads) for t in ("M-0", "M-1", "M-2")}
    busiest = min(counts, key=lambda t: (-counts[t], t))
    wanted = [
        r["mid"]
        for r in spreads
        if r["market_ticker"] == busiest and r["verified"] and r["mid"] is not None
    ]
    assert [Decimal(str(mid)) for mid in result["mid"]] == [Decimal(str(float(m))) for m in wanted]


def pandas_is_right(result: Any, root: Path) -> None:
    both = {(t, m) for t, m in result.index}
    flow = {
        (r["market_ticker"], r["second"].replace(second=0))
        for r in rows(root, "imbalance")
        if r["verified"]
    }
    assert both
    assert {(t, m.to_pydatetime()) for t, m in both} <= flow
    total = sum(
        (
            r["ofi"]
            for r in rows(root, "imbalance")
            if r["verified"]
            and (r["market_ticker"], r["second"].replace(second=0))
            in {(t, m.to_pydatetime()) for t, m in both}
        ),
        Decimal(0),
    )
    assert result["ofi"].sum() == pytest.approx(float(total))


def as_of_is_right(result: Any, root: Path) -> None:
    known = rows(root, "imbalance")
    for row in result.to_dicts():
        before = [
            r
            for r in known
            if r["market_ticker"] == row["market_ticker"]
            and r["second"] + timedelta(seconds=1) <= row["at"]
        ]
        assert before[-1]["verified"]
        assert row["imbalance_5c"] == before[-1]["imbalance_5c"]
    assert result.height
    assert any(not row["verified"] for row in known)  # the hour has an outage


def replay_is_right(result: Any, root: Path) -> None:
    spreads = [r for r in rows(root, "spreads") if r["market_ticker"] == TICKER and r["verified"]]
    mids = {r["seq"]: float(r["mid"]) for r in spreads if r["mid"] is not None}
    mid_at = dict(result.select("seq", "mid").iter_rows())
    assert len(mid_at) > 40
    shared = mid_at.keys() & mids.keys()  # every change of the best is an event
    assert len(shared) >= 10
    assert {seq: mid_at[seq] for seq in shared} == pytest.approx({seq: mids[seq] for seq in shared})
    assert result["imbalance"].is_between(-1, 1).all()


def trades() -> pl.DataFrame:
    """Trades at instants at which the imbalance is looked up."""
    at = [HOUR + timedelta(seconds=7.3 * n) for n in range(1, 400)]
    tickers = [f"M-{n % 3}" for n in range(1, 400)]
    return pl.DataFrame({"market_ticker": tickers, "at": at}).cast({"at": pl.Datetime("us", "UTC")})


CHECKS: dict[str, Callable[[Any, Path], None]] = {
    "Polars": polars_is_right,
    "DuckDB": duckdb_is_right,
    "pandas": pandas_is_right,
    "As-of": as_of_is_right,
    "Replay": replay_is_right,
}


@pytest.fixture(scope="module")
def archived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive with one hour, analytics included."""
    root = tmp_path_factory.mktemp("archive")
    record_hour(root)
    compute_hour(
        settings_for("http://127.0.0.1:1", "none", parquet_dir=root, use_clickhouse=False), HOUR
    )
    return root


def test_the_sql_spread_is_that_of_the_polars_snippet(
    archived: Path, clickhouse_url: str, clickhouse_database: str
) -> None:
    (sql,) = re.findall(r"```sql\n(.*?;)\nSELECT \* FROM live_depth", PAGE.read_text(), re.DOTALL)
    settings = settings_for(
        clickhouse_url, clickhouse_database, parquet_dir=archived, hot_retention_days=36_500
    )
    prepare(settings)
    compute_hour(settings, HOUR)
    found = client.connect(settings).query(sql.rstrip(";")).result_rows
    polars_is_right(pl.DataFrame(found, orient="row"), archived)


def test_the_sql_spread_weighs_nothing_of_a_book_that_one_read_brings_and_breaks(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    (sql,) = re.findall(r"```sql\n(.*?;)\nSELECT \* FROM live_depth", PAGE.read_text(), re.DOTALL)
    settings = settings_for(clickhouse_url, clickhouse_database, hot_retention_days=36_500)
    prepare(settings)
    of = {"market_ticker": "T", "conn_id": "00000000-0000-0000-0000-000000000001", "shard": 0}
    rows = [  # (seconds, record, seq, cause, verified, spread)
        (0, 2, 1, "snapshot", True, "0.1000"),
        (0, 3, 0, "doubt", False, "0.1000"),
        (60, 9, 9, "snapshot", True, "0.2000"),
        (70, 10, 10, "delta", True, "0.3000"),
    ]
    names = ("ingest_ts", "record", "seq", "cause", "verified", "spread")
    with closing(client.connect(settings)) as database:
        made = [
            of
            | dict(zip(names, row, strict=True))
            | {"ingest_ts": (at := HOUR + timedelta(seconds=row[0])), "known_at": at}
            | {"spread": Decimal(row[-1])}
            for row in rows
        ]
        insert(database, SPREADS, made)
        assert database.query(sql.rstrip(";")).result_rows == [("T", pytest.approx(0.2))]


def test_there_is_a_snippet_for_each_reader() -> None:
    assert SNIPPETS.keys() == CHECKS.keys()
    for snippet in SNIPPETS.values():
        code = [
            line
            for line in snippet.splitlines()
            if line and not line.startswith(("import", "from"))
        ]
        assert len(code) <= 10


@pytest.mark.parametrize("reader", CHECKS)
def test_the_snippet_runs_and_its_result_is_right(
    reader: str, archived: Path, tmp_path: Path
) -> None:
    if reader == "DuckDB":
        pytest.importorskip("duckdb", reason="duckdb is a development dependency")
    if reader == "pandas":
        pytest.importorskip("pandas", reason="pandas is a development dependency")
    names: dict[str, Any] = {"archive": str(archived), "chart": str(tmp_path / "chart.png")}
    names |= {"hour": HOUR, "ticker": TICKER, "trades": trades()}
    exec(compile(SNIPPETS[reader], f"{PAGE.name}: {reader}", "exec"), names)
    CHECKS[reader](names["result"], archived)
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    names["plt"].close("all")


def test_every_reader_has_null_for_columns_an_older_file_lacks(tmp_path: Path) -> None:
    pytest.importorskip("duckdb", reason="duckdb is a development dependency")
    pytest.importorskip("pandas", reason="pandas is a development dependency")
    record_hour(tmp_path)
    before = HOUR - ONE_HOUR
    archive = LocalArchive(tmp_path)
    (old,) = archive.read(ORDERBOOK_EVENTS.name, before)
    without_records(tmp_path, before)
    names: dict[str, Any] = {"archive": str(tmp_path)}
    exec(compile(LATER, f"{PAGE.name}: later", "exec"), names)
    new = [
        n
        for table in archive.read(ORDERBOOK_EVENTS.name, HOUR)
        for n in table["record"].to_pylist()
    ]
    assert None not in new
    wanted = sorted([-1] * old.num_rows + new)
    columns = {
        "Polars": names["with_polars"]["record"].to_list(),
        "DuckDB": names["with_duckdb"]["record"].to_list(),
        "pandas": names["with_pandas"]["record"]
        .astype(object)
        .where(lambda n: n.notna(), None)
        .to_list(),
        "pyarrow": names["with_pyarrow"]["record"].to_pylist(),
    }
    for reader, found in columns.items():
        assert sorted(-1 if n is None else n for n in found) == wanted, reader
    for reader in ("with_polars", "with_duckdb", "with_pandas", "with_pyarrow"):
        assert {"clock", "sent_ts"} <= {*pl.DataFrame(names[reader]).columns}, reader
