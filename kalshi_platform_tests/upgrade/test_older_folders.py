"""A data folder that an older version recorded is opened, and recording goes on from it.

`folders/` has one of before the record columns and epochs (1a2c9ed), and a recent one; `record.py` made them.
Each is a part of one hour, which was sealed, and of the next.
"""

from __future__ import annotations

import json
import shutil
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from kalshi_platform import settings as platform_settings
from kalshi_platform.analytics.hourly import compute_hour
from kalshi_platform.archive import LocalArchive
from kalshi_platform.clickhouse import migrations
from kalshi_platform.clickhouse.client import Client, connect
from kalshi_platform.clickhouse.migrations import State
from kalshi_platform.commands.main import main
from kalshi_platform.embedded_clickhouse import running
from kalshi_platform.journal import journal_identity, reader
from kalshi_platform.quality import continuity
from kalshi_platform.quality.parity import compare_hours
from kalshi_platform.recorder.streamer import Streamer
from kalshi_platform.schema import DATASETS, PLACE
from kalshi_platform.settings import Settings
from kalshi_platform_tests import archived
from kalshi_platform_tests.simulator_fixtures import StartSimulator

FOLDERS = Path(__file__).with_name("folders")
SEALED = datetime(2026, 11, 28, 10, tzinfo=UTC)
WITHOUT_RECORDS = "1a2c9ed"
WITH_RECORDS, WITH_CLOCK = 15, 22
"""The migrations that added the columns."""
QUERIES = Path(__file__).resolve().parents[2] / "infra" / "queries"
OF_BEFORE = "{} < toDateTime('2026-11-28 12:00:00', 'UTC')"
"""What the older version recorded; the tests record now."""
PATIENCE_S = 120.0


def unpacked(commit: str, folder: Path) -> Path:
    """The data folder that this commit recorded."""
    with tarfile.open(FOLDERS / f"{commit}.tar.xz") as kept:
        kept.extractall(folder, filter="data")
    return folder


@dataclass
class Opened:
    """A folder of before, its ClickHouse running."""

    commit: str
    settings: Settings
    client: Client
    were: dict[str, int]
    """Rows by table, as the version that wrote them counted them."""
    before: set[int]
    """The migrations that it had."""
    applied: set[int]
    """Those that this build applied."""

    def rows(self, table: str, where: str = "1") -> int:
        return int(self.client.query(f"SELECT count() FROM {table} WHERE {where}").first_row[0])  # type: ignore[index]


@pytest.fixture(scope="module", params=sorted(path.stem for path in FOLDERS.glob("*.json")))
def opened(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """A folder that was migrated, in ClickHouse, too. Its rows of before stay what they are."""
    data = unpacked(request.param, tmp_path_factory.mktemp("older") / "data")
    facts = json.loads((FOLDERS / f"{request.param}.json").read_text(encoding="utf-8"))
    with running(data / "clickhouse") as url:
        settings = platform_settings.load(
            kalshi_data_dir=data,
            clickhouse_url=url,
            hot_retention_days=36_500,
            journal_retention_hours=1_000_000,
        )
        with closing(connect(settings)) as client:
            before = {one.version for one in migrations.standing(client) if one.applied_at}
            applied = {migration.version for migration in migrations.migrate(settings)}
            yield Opened(request.param, settings, client, facts["rows"], before, applied)


def command(opened: Opened, monkeypatch: pytest.MonkeyPatch, *argv: str) -> str:
    """What a command says; it must succeed."""
    platform_settings.current.cache_clear()
    monkeypatch.setenv("KALSHI_DATA_DIR", str(opened.settings.data_dir))
    monkeypatch.setenv("CLICKHOUSE_URL", opened.settings.clickhouse_url)
    monkeypatch.setenv("HOT_RETENTION_DAYS", "36500")
    done = CliRunner().invoke(main, list(argv), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_schema_is_brought_up_to_date(opened: Opened) -> None:
    assert opened.before | opened.applied == {m.version for m in migrations.available()}
    assert WITH_CLOCK in opened.applied
    assert (WITH_RECORDS in opened.applied) == (opened.commit == WITHOUT_RECORDS)
    assert {one.state for one in migrations.standing(opened.client)} == {State.APPLIED}
    assert migrations.differences(opened.client) == []
    for table in ("orderbook_events", "stream_events", "book_checkpoints", "trades"):
        of_before = OF_BEFORE.format("ts" if table == "book_checkpoints" else "ingest_ts")
        assert opened.rows(table, of_before) == opened.were[table] > 0, table


def test_what_is_there_is_whole(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Whole: " in command(opened, monkeypatch, "proof")
    proof = (QUERIES / "lossless_proof.sql").read_text(encoding="utf-8").strip().rstrip(";")
    found = opened.client.query(proof)
    rows = [dict(zip(found.column_names, row, strict=True)) for row in found.result_rows]
    assert sum(row["named_holes"] for row in rows) == 3  # the simulator's fault
    assert [row for row in rows if row["unexplained_holes"] or row["doubled"]] == []
    hot = continuity.extent(opened.client)
    stores = compare_hours(opened.settings, opened.client, hot, datetime.now(UTC))
    assert [difference.what for difference in stores.differences] == []


def test_columns_of_later_are_null_in_the_rows_of_before(opened: Opened) -> None:
    archive, records = LocalArchive(opened.settings.archive_dir), opened.commit != WITHOUT_RECORDS
    for name in ("orderbook_events", "stream_events", "trades"):
        (path, *_) = archived.paths(opened.settings.archive_dir, name, SEALED)
        assert ({*PLACE} <= {*pq.read_schema(path).names}) == records
        read = [table for table in archive.read(name, SEALED) if table.num_rows]
        for column in PLACE:
            nulls = sum(table[column].null_count for table in read)
            assert nulls == (0 if records else sum(table.num_rows for table in read)), name
            where = f"toStartOfHour(ingest_ts) = toDateTime('{SEALED:%F %T}', 'UTC')"
            assert opened.rows(name, f"{where} AND {column} IS NULL") == nulls
        for column in {"clock", "sent_ts"} & {*DATASETS[name].arrow.names}:
            assert {table[column].null_count - table.num_rows for table in read} == {0}
            assert opened.rows(name, f"{column} IS NOT NULL") == 0


def test_analytics_of_before_are_read_and_made_again(opened: Opened) -> None:
    archive, known = LocalArchive(opened.settings.archive_dir), opened.commit != WITHOUT_RECORDS
    for name in ("spreads", "depth", "imbalance"):
        (table,) = archive.read(name, SEALED)
        assert table.num_rows == opened.rows(name) == opened.were[name] > 0
        assert table["known_at"].null_count == (0 if known else table.num_rows)
    compute_hour(opened.settings, SEALED)
    for name in ("spreads", "depth", "imbalance"):
        (table,) = archive.read(name, SEALED)
        assert table.num_rows == opened.rows(name) == opened.rows(name, "known_at IS NOT NULL") > 0
        assert table["known_at"].null_count == 0


def test_recording_goes_on(
    opened: Opened, start_simulator: StartSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = opened.settings.journal_dir()
    before = journal_identity.read(folder)
    assert before is not None
    simulator = start_simulator(markets=4, rate=100.0)
    settings = opened.settings.model_copy(
        update={"kalshi_ws_url": simulator.ws_url, "kalshi_rest_url": simulator.rest_url}
    )
    settings.exchange.key_file.parent.mkdir(exist_ok=True)
    shutil.copy(simulator.key_file, settings.exchange.key_file)
    streamer = Streamer(settings)
    streamer.start()
    try:
        deadline = time.monotonic() + PATIENCE_S
        while streamer.health().frames < 300:
            assert time.monotonic() < deadline, streamer.health()
            time.sleep(0.05)
    finally:
        assert streamer.stop(PATIENCE_S)
    assert streamer.failure() is None
    after = journal_identity.read(folder)
    assert after is not None
    assert (after.id, after.format, after.epoch) == (before.id, 2, before.epoch + 1)
    assert reader.oldest_offset(folder).n == 0
    assert opened.rows("orderbook_events") > opened.were["orderbook_events"]
    assert opened.rows("orderbook_events", "record IS NULL") == (
        opened.were["orderbook_events"] if opened.commit == WITHOUT_RECORDS else 0
    )
    test_what_is_there_is_whole(opened, monkeypatch)


def test_an_hour_of_before_is_compacted_and_restored(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(opened, monkeypatch, "compact", "--all")
    (path,) = archived.paths(opened.settings.archive_dir, "orderbook_events", SEALED)
    assert pq.read_metadata(path).num_rows == opened.rows(
        "orderbook_events", f"toStartOfHour(ingest_ts) = toDateTime('{SEALED:%F %T}', 'UTC')"
    )
    opened.client.command("TRUNCATE TABLE orderbook_events")
    command(opened, monkeypatch, "restore", "--hours", f"{SEALED:%F-%H}")
    assert "Whole: " in command(opened, monkeypatch, "proof", "--hours", f"{SEALED:%F-%H}")
