"""The checks pass on an intact recording, and each planted fault fails the right check."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from kalshi_platform import settings as platform_settings
from kalshi_platform.analytics.hourly import compute_hour
from kalshi_platform.archive import LocalArchive
from kalshi_platform.clickhouse.client import Client, connect
from kalshi_platform.commands.main import main
from kalshi_platform.journal.kind import Kind
from kalshi_platform.loading.loader import Loader, Pace
from kalshi_platform.loading.rebuild import rebuild
from kalshi_platform.loading.sinks import ClickHouseSink, ParquetSink
from kalshi_platform.orchestration import checks
from kalshi_platform.orchestration.recorded_tables import recorded_hour
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.processes import Identity
from kalshi_platform.quality import continuity
from kalshi_platform.schema import STREAM_EVENTS, TABLES, ZERO_UUID
from kalshi_platform.settings import Settings
from kalshi_platform_tests import wire
from kalshi_platform_tests.archived import paths
from kalshi_platform_tests.clickhouse.tables import insert, prepare, settings_for
from kalshi_platform_tests.loading.test_loader import (
    FIRST_HOUR,
    SECOND_HOUR,
    journal_of,
    load_all,
    recording,
)

NAMES = {
    *(
        "no_unexplained_gaps",
        "hot_cold_parity",
        "books_uncrossed",
        "clocks_monotonic",
        "wire_drift",
    ),
    "fresh",
}
ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN
CONN = wire.conn_id(1)
FILLED = (*TABLES, "recorders")
"""The tables that a recorder fills."""
FOR_EVER = {"hot_retention_days": 36_500}
PACE = Pace(rows=150, seconds=0.0, first_s=0.0)


@dataclass
class Platform:
    """A platform with two recorded hours, the first one sealed, and a healthy streamer."""

    settings: Settings
    client: Client
    instance: dg.DagsterInstance

    def record(self, records: Sequence[wire.Record]) -> None:
        record(self.settings, records)
        self.health()

    def health(self, shard: int = 0, **others: Any) -> None:
        """Write the streamer's report: it heard the exchange just now, and its journal ends with the records."""
        now = time.time_ns()
        last = int(continuity.extent(self.client).newest.timestamp() * 1e9)
        store = {"lag": 0, "committed_ns": now, "trouble": None, "refused": False}
        report = {
            "pid": os.getpid(),
            "pid_started": Identity.own().started,
            "state": "quiet",
            "started_ns": now,
            "updated_ns": now,
            "last_frame_ns": last,
            "last_heard_ns": now,
            "last_durable_ns": last,
            "stores": {"parquet": store, "clickhouse": store},
            "trouble": None,
        }
        path = self.settings.journal_dir(shard) / "health.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report | others))

    def check(self, **overrides: str) -> dict[str, dg.AssetCheckEvaluation]:
        return run_checks(self.instance, resource(self.settings, **overrides))


def record(settings: Settings, records: Sequence[wire.Record]) -> None:
    """Write records to the journal, and load them into both stores."""
    writer = journal_of(settings.journal_dir(), records)
    for store in (
        ParquetSink(LocalArchive(settings.archive_dir), 0, lambda _: None),
        ClickHouseSink(settings, str(writer.id)),
    ):
        load_all(Loader(settings.journal_dir(), writer, store, PACE))
    writer.close()


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalshi_platform.loading.shared_rows.CHUNK_ROWS", 100)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)


@pytest.fixture(scope="module")
def database(clickhouse_url: str) -> Iterator[Settings]:
    """A migrated database for this module."""
    settings = settings_for(clickhouse_url, f"test_{uuid.uuid4().hex}")
    prepare(settings_for(clickhouse_url, settings.clickhouse_database, **FOR_EVER))
    yield settings
    httpx.post(
        clickhouse_url, content=f"DROP DATABASE {settings.clickhouse_database} SYNC"
    ).raise_for_status()


@pytest.fixture(scope="module")
def recording_once(
    database: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Settings]:
    """Two recorded hours, in a database and a folder that no test changes."""
    kept = f"{database.clickhouse_database}_recorded"
    data = tmp_path_factory.mktemp("recorded") / "data"
    settings = settings_for(database.clickhouse_url, kept, kalshi_data_dir=data, **FOR_EVER)
    prepare(settings)
    with pytest.MonkeyPatch.context() as patched, closing(connect(settings)) as client:
        small_chunks(patched)
        record(settings, recording())
        yield settings
        client.command(f"DROP DATABASE {kept} SYNC")


@pytest.fixture
def empty(tmp_path: Path, database: Settings, instance: dg.DagsterInstance) -> Iterator[Platform]:
    """A platform with nothing recorded."""
    settings = settings_for(
        database.clickhouse_url,
        database.clickhouse_database,
        kalshi_data_dir=tmp_path / "data",
        **FOR_EVER,
    )
    with closing(connect(settings)) as client:
        for name in FILLED:
            client.command(f"TRUNCATE TABLE {name}")
        yield Platform(settings, client, instance)


@pytest.fixture
def recorded(empty: Platform, recording_once: Settings) -> Platform:
    """A platform with a copy of the recording, which the test may damage."""
    shutil.copytree(recording_once.data_dir, empty.settings.data_dir)
    for name in FILLED:
        empty.client.command(
            f"INSERT INTO {name} SELECT * FROM {recording_once.clickhouse_database}.{name}"
            " SETTINGS insert_deduplicate = 0"
        )
    empty.health()
    return empty


def resource(settings: Settings, **overrides: str) -> KalshiResource:
    return KalshiResource(
        overrides={
            "kalshi_data_dir": str(settings.data_dir),
            "clickhouse_url": settings.clickhouse_url,
            "clickhouse_database": settings.clickhouse_database,
            "hot_retention_days": str(settings.hot_retention_days),
            **overrides,
        }
    )


@functools.cache
def job() -> dg.JobDefinition:
    """The job `order_book_checks`; each run provides the platform."""
    defs = dg.Definitions(
        assets=[recorded_hour],
        asset_checks=checks.CHECKS,
        jobs=checks.JOBS,
        resources={"platform": KalshiResource()},
        executor=dg.in_process_executor,
    )
    return defs.resolve_job_def("order_book_checks")


def run_checks(
    instance: dg.DagsterInstance, platform: KalshiResource
) -> dict[str, dg.AssetCheckEvaluation]:
    """Run the job `order_book_checks`; the evaluations by check."""
    result = job().execute_in_process(instance=instance, resources={"platform": platform})
    assert result.success
    return {
        evaluation.check_name: evaluation for evaluation in result.get_asset_check_evaluations()
    }


def red(found: Mapping[str, dg.AssetCheckEvaluation]) -> dict[str, dg.AssetCheckSeverity]:
    """The failed checks, with their severity."""
    return {
        name: evaluation.severity for name, evaluation in found.items() if not evaluation.passed
    }


def table(evaluation: dg.AssetCheckEvaluation, name: str = "offenders") -> list[Mapping[str, Any]]:
    """The rows of a table of the check's metadata."""
    value = evaluation.metadata[name]
    assert isinstance(value, dg.TableMetadataValue)
    return [record.data for record in value.records]


def with_a_gap(*, resynced_after_s: int | None = 2) -> list[wire.Record]:
    """Lose numbers 403 to 405 with a gap row; the books are synced again or not."""
    records = recording()
    at = records[-1][0] + wire.SECOND
    named = {"cause": "sequence", "expected": 403, "got": 406, "channel": "orderbook_delta"}
    records.append((at, CONN, Kind.NOTE, wire.note("gap", named, sid=1)))
    for seq, ticker in ((406, "A-1"), (407, "EMPTY-2")):
        records.append((at, CONN, Kind.SNAPSHOT, wire.snapshot(ticker, seq, {4_000: 100}, {})))
    if resynced_after_s is not None:
        at += resynced_after_s * wire.SECOND
        records.append((at, CONN, Kind.NOTE, wire.note("resynced", {}, sid=1)))
    at += 120 * wire.SECOND
    records.append((at, bytes(16), Kind.NOTE, wire.note("heartbeat", {})))
    return records


def test_a_sound_recording_is_green_and_says_what_was_looked_at(recorded: Platform) -> None:
    found = recorded.check()
    assert set(found) == NAMES
    assert red(found) == {}
    assert (
        found["no_unexplained_gaps"].metadata["frames"].value == 402 + 57
    )  # of the books, of trades
    assert found["hot_cold_parity"].metadata["hours equal"].value == 1
    assert found["fresh"].metadata["cause"].value == "quiet"


def test_a_row_missing_in_clickhouse_is_found_by_two_checks(recorded: Platform) -> None:
    recorded.client.command("DELETE FROM orderbook_events WHERE seq = 20")
    found = recorded.check()
    assert red(found) == {"no_unexplained_gaps": ERROR, "hot_cold_parity": ERROR}
    (hole,) = table(found["no_unexplained_gaps"])
    assert (hole["conn_id"], hole["sid"]) == ("00000000-0000-0000-0000-000000000001", 1)
    assert (hole["unexplained_holes"], hole["doubled"]) == (1, 0)
    (hour,) = table(found["hot_cold_parity"])
    assert (hour["hour"], hour["dataset"]) == (f"{FIRST_HOUR:%Y-%m-%d %H:00}", "orderbook_events")
    assert hour["rows_parquet"] == hour["rows_clickhouse"] + 1


def test_a_row_that_is_stored_twice_is_doubled(recorded: Platform) -> None:
    recorded.client.command(
        "INSERT INTO orderbook_events SELECT * FROM orderbook_events WHERE seq = 21"
    )
    found = recorded.check()
    assert red(found) == {"no_unexplained_gaps": ERROR, "hot_cold_parity": ERROR}
    assert [row["doubled"] for row in table(found["no_unexplained_gaps"])] == [1]


def test_a_changed_value_in_a_file_is_a_difference_of_its_hour(
    recorded: Platform,
) -> None:
    assert red(recorded.check()) == {}
    path = paths(recorded.settings.archive_dir, "orderbook_events", FIRST_HOUR)[0]
    rows = pq.read_table(path, partitioning=None)
    at = rows.schema.get_field_index("size")
    changed = pc.add(rows["size"], pa.scalar(1)).cast(rows.schema.field("size").type)
    pq.write_table(rows.set_column(at, "size", changed), path)
    found = recorded.check()
    assert red(found) == {"hot_cold_parity": ERROR}
    (hour,) = table(found["hot_cold_parity"])
    assert hour["rows_parquet"] == hour["rows_clickhouse"]
    assert hour["checksum_parquet"] != hour["checksum_clickhouse"]


def advised(platform: Platform, evaluation: dg.AssetCheckEvaluation) -> str:
    """Execute the remedy that a check's sentence, and then the command's own output, names; returns the last text."""
    text = evaluation.description or ""
    for _ in range(3):
        if "aterialise" in text and "restore:" not in text:
            rebuild(platform.settings, FIRST_HOUR)  # what materialising the hour runs
            return text
        found = re.search(r"kalshi-platform (restore(?: --[\w-]+(?: [\d.-]+\d)?)*)", text)
        assert found, text
        with pytest.MonkeyPatch.context() as env:
            env.setenv("KALSHI_DATA_DIR", str(platform.settings.data_dir))
            env.setenv("CLICKHOUSE_URL", platform.settings.clickhouse_url)
            env.setenv("CLICKHOUSE_DATABASE", platform.settings.clickhouse_database)
            env.setenv("HOT_RETENTION_DAYS", str(platform.settings.hot_retention_days))
            platform_settings.current.cache_clear()
            result = CliRunner().invoke(main, found[1].split())
        platform_settings.current.cache_clear()
        text = result.output + str(result.exception or "")
        if result.exit_code == 0:
            return text
    raise AssertionError(text)


DOUBLE = "INSERT INTO orderbook_events SELECT * FROM orderbook_events WHERE seq = 21"


@pytest.mark.parametrize("check", ["no_unexplained_gaps", "hot_cold_parity"])
@pytest.mark.parametrize(
    "harm",
    ["DELETE FROM orderbook_events WHERE seq IN (20, 21)", DOUBLE],
    ids=["lost", "doubled"],
)
def test_what_a_red_check_advises_turns_it_green(recorded: Platform, harm: str, check: str) -> None:
    recorded.client.command(harm)
    found = recorded.check()
    assert red(found) == {"no_unexplained_gaps": ERROR, "hot_cold_parity": ERROR}
    advised(recorded, found[check])
    assert red(recorded.check()) == {}


@pytest.mark.parametrize("harm", ["changed", "removed", "damaged"])
def test_what_parity_advises_about_files_turns_it_green(recorded: Platform, harm: str) -> None:
    path = paths(recorded.settings.archive_dir, "orderbook_events", FIRST_HOUR)[0]
    match harm:
        case "changed":
            rows = pq.read_table(path, partitioning=None)
            pq.write_table(rows.slice(1), path)
        case "removed":
            path.unlink()
        case _:
            path.write_bytes(path.read_bytes()[:100])
    found = recorded.check()
    assert red(found) == {"hot_cold_parity": ERROR}
    assert "Materialise the hour again." in (found["hot_cold_parity"].description or "")
    advised(recorded, found["hot_cold_parity"])
    assert red(recorded.check()) == {}


def test_rows_that_both_stores_lost_are_restored_as_advised(recorded: Platform) -> None:
    recorded.client.command("DELETE FROM orderbook_events WHERE seq = 20")
    for path in paths(recorded.settings.archive_dir, "orderbook_events", FIRST_HOUR):
        rows = pq.read_table(path, partitioning=None)
        pq.write_table(rows.filter(pc.not_equal(rows["seq"], 20)), path)
    found = recorded.check()
    assert red(found) == {"no_unexplained_gaps": ERROR, "hot_cold_parity": ERROR}
    report = found["no_unexplained_gaps"].description or ""
    assert "What the archive lacks too is in the journal while that is kept: materialise" in report
    rebuild(recorded.settings, FIRST_HOUR)
    advised(recorded, recorded.check()["no_unexplained_gaps"])
    assert red(recorded.check()) == {}


def test_a_gap_without_its_row_is_unexplained(
    empty: Platform,
) -> None:
    empty.record(with_a_gap())
    found = empty.check()
    assert red(found) == {}
    assert found["no_unexplained_gaps"].metadata["numbers named by gaps"].value == 3
    assert found["no_unexplained_gaps"].metadata["gaps in the last hour"].value == 1
    empty.client.command("DELETE FROM stream_events WHERE kind = 'gap'")
    found = empty.check()
    assert red(found) == {"no_unexplained_gaps": ERROR}
    assert [row["unexplained_holes"] for row in table(found["no_unexplained_gaps"])] == [3]


@pytest.mark.parametrize("after_s", [None, 90])
def test_a_gap_that_leaves_its_books_stale_warns(empty: Platform, after_s: int | None) -> None:
    empty.record(with_a_gap(resynced_after_s=after_s))
    found = empty.check()
    assert red(found) == {"no_unexplained_gaps": WARN}
    (gap,) = table(found["no_unexplained_gaps"], "gaps")
    assert (gap["expected"], gap["got"]) == (403, 406)
    assert gap["open_s"] == (120 if after_s is None else after_s)
    assert bool(gap["ended_at"]) is (after_s is not None)


def test_a_level_that_differs_from_the_exchange_s_warns(recorded: Platform) -> None:
    level = {"side": "yes", "price": "0.4800", "ours": "1.00", "theirs": "2.00"}
    newest = continuity.extent(recorded.client).whole_until
    row = {"kind": "mismatch", "market_ticker": "A-1", "ingest_ts": newest, "conn_id": ZERO_UUID}
    insert(recorded.client, STREAM_EVENTS, [row | {"detail": json.dumps(level)}])
    found = recorded.check()
    assert red(found) == {"no_unexplained_gaps": WARN}
    (shown,) = table(found["no_unexplained_gaps"], "mismatches")
    assert {name: shown[name] for name in level} == level


def crossing(lasts_s: float, *, uncrossed: bool) -> list[wire.Record]:
    """Cross the book of A-1 (YES 0.48, NO 0.51) for a while near the end of an hour's records."""
    records = recording(50)
    at, seq = records[-1][0] + wire.SECOND, 53
    records.append((at, CONN, Kind.DELTA, wire.delta("A-1", seq, "no", 5_300, 100)))
    at += int(lasts_s * wire.SECOND)
    if uncrossed:
        frame = wire.delta("A-1", seq + 1, "no", 5_300, -100)
        frame = frame.replace(b"28.97871Z", b"40.5Z")  # another matching event
        records.append((at, CONN, Kind.DELTA, frame))
    records.append((at + wire.SECOND, bytes(16), Kind.NOTE, wire.note("heartbeat", {})))
    return records


def test_a_clock_that_fell_warns_and_resynced_markets_are_counted(empty: Platform) -> None:
    records = recording()
    at = records[-1][0] + wire.SECOND
    for seq, clock in ((403, 7), (404, 6)):
        frame = wire.snapshot("A-1", seq, {4_000: 100}, {}, clock=clock)
        records.append((at, CONN, Kind.SNAPSHOT, frame))
    resynced = {"cause": "gap", "markets": 2}
    records.append((at, CONN, Kind.NOTE, wire.note("resynced", resynced, sid=1)))
    empty.record(records)
    found = empty.check()["clocks_monotonic"]
    assert (found.passed, found.severity) == (False, WARN)
    (fell,) = table(found)
    assert (fell["market_ticker"], fell["of"], fell["after"], fell["clock"]) == (
        *("A-1", "snapshot"),
        *(7, 6),
    )
    assert found.metadata["markets resynced"].value == 2


def test_an_unknown_field_warns_with_its_first_frame_and_an_example(empty: Platform) -> None:
    records = recording()
    at = records[-1][0] + wire.SECOND
    new = wire.delta("A-1", 403, "yes", 4_000, 5).replace(b'"side"', b'"depth":17,"side"')
    records.append((at, CONN, Kind.DELTA, new))
    empty.record(records)
    found = empty.check()["wire_drift"]
    assert (found.passed, found.severity) == (False, WARN)
    (row,) = table(found)
    assert (row["what"], row["type"], row["path"]) == (
        *("unknown field", "orderbook_delta"),
        "msg.depth",
    )
    assert (row["example"], row["days"]) == ("17", 1)
    assert row["first_seen"]


def test_only_a_book_that_stays_crossed_warns(
    empty: Platform,
) -> None:
    empty.record(crossing(20, uncrossed=False))
    found = empty.check()
    assert red(found) == {"books_uncrossed": WARN}
    (book,) = table(found["books_uncrossed"])
    assert (book["market_ticker"], book["lasts"], book["seq"]) == ("A-1", True, 53)
    assert book["lasted_s"] == 21.0
    assert (book["yes_bid"], book["yes_ask"]) == ("0.4800", "0.4700")


def test_a_book_that_is_crossed_only_this_moment_is_no_finding(empty: Platform) -> None:
    empty.record(crossing(2, uncrossed=False))
    assert red(empty.check()) == {}


def test_a_stale_book_is_not_checked(empty: Platform) -> None:
    records = crossing(20, uncrossed=False)
    records.insert(
        -2, (records[-2][0], CONN, Kind.NOTE, wire.note("gap", {"cause": "t"}, sid=1, ticker="A-1"))
    )
    empty.record(records)
    found = empty.check()
    assert found["books_uncrossed"].passed


def test_a_crossed_book_of_a_computed_hour_is_reported_later(empty: Platform) -> None:
    records = crossing(20, uncrossed=True)
    late = int(SECOND_HOUR.timestamp()) * wire.SECOND + 10 * wire.SECOND
    records.append((late, CONN, Kind.DELTA, wire.delta("A-1", 55, "yes", 4_700, 5)))
    records.append((late, bytes(16), Kind.NOTE, wire.note("heartbeat", {})))
    empty.record(records)
    assert red(empty.check()) == {}
    compute_hour(empty.settings, FIRST_HOUR)
    found = empty.check()
    assert red(found) == {"books_uncrossed": WARN}
    (book,) = table(found["books_uncrossed"])
    assert (book["market_ticker"], book["lasts"], book["lasted_s"]) == ("A-1", False, 20.0)


def test_an_old_report_of_the_streamer_is_red_with_what_to_do(recorded: Platform) -> None:
    recorded.health(updated_ns=time.time_ns() - 90 * wire.SECOND)
    found = recorded.check()
    assert red(found) == {"fresh": ERROR}
    assert f"kill -9 {os.getpid()}" in (found["fresh"].description or "")
    recorded.health(pid_started=1.0)
    assert "is gone" in (recorded.check()["fresh"].description or "")


def test_a_damaged_report_is_named(recorded: Platform) -> None:
    path = recorded.settings.journal_dir() / "health.json"
    path.write_text("{")
    assert str(path) in (recorded.check()["fresh"].description or "")
    path.write_text("{}")
    assert red(recorded.check()) == {"fresh": WARN}


def test_the_worst_shard_decides_and_all_are_shown(recorded: Platform) -> None:
    last = int(continuity.extent(recorded.client).newest.timestamp() * 1e9)
    store = {"lag": 0, "loaded_ns": last, "committed_ns": 0, "trouble": None, "refused": False}
    stores = {"parquet": store, "clickhouse": store}
    for shard in (0, 1):
        recorded.health(shard, stores=stores)
    well = recorded.check(stream_shards="2")
    assert red(well) == {}
    recorded.health(1, stores=stores, pid_started=1.0)
    fresh = recorded.check(stream_shards="2")["fresh"]
    assert (fresh.description or "").startswith("Shard 1: The streamer is down")
    table = fresh.metadata["shards"]
    assert isinstance(table, dg.TableMetadataValue)
    assert [record.data["shard"] for record in table.records] == [0, 1]


def test_a_shard_that_never_ran_beside_a_recording_one_warns(recorded: Platform) -> None:
    found = recorded.check(stream_shards="2")
    assert red(found) == {"fresh": WARN}
    assert "Shard 1: No streamer has run here yet" in (found["fresh"].description or "")


def test_the_proof_goes_as_far_as_the_shard_that_is_least_far(recorded: Platform) -> None:
    """ClickHouse has newer rows of one shard than the first missing row of the other."""
    newest = continuity.extent(recorded.client).newest
    behind = int((newest - timedelta(seconds=60)).timestamp() * 1e9)
    for shard, loaded in ((0, int(newest.timestamp() * 1e9)), (1, behind)):
        store = {
            "lag": 1,
            "loaded_ns": loaded,
            "committed_ns": 0,
            "trouble": None,
            "refused": False,
        }
        recorded.health(shard, stores={"parquet": store, "clickhouse": store})
    proved = recorded.check(stream_shards="2")["no_unexplained_gaps"].metadata["proved to"].value
    assert proved == pytest.approx(behind / 1e9)


def test_a_former_shard_that_is_not_drained_warns(recorded: Platform) -> None:
    folder = recorded.settings.journal_dir(4)
    folder.mkdir(parents=True)
    (folder / f"{0:020d}.arrows").touch()
    found = recorded.check()
    assert red(found) == {"fresh": WARN}
    assert "kalshi-platform stream --shard 4" in (found["fresh"].description or "")


def test_without_rows_or_clickhouse_the_checks_pass(empty: Platform) -> None:
    for found in (empty.check(), empty.check(use_clickhouse="0")):
        assert set(found) == NAMES
        for evaluation in found.values():
            assert evaluation.passed
            assert (evaluation.description or "").startswith("Nothing to check: ")


def test_without_clickhouse_fresh_warns_and_others_keep_results(
    recorded: Platform,
) -> None:
    found = recorded.check(clickhouse_url="http://127.0.0.1:9")
    assert red(found) == {"fresh": WARN}
    assert set(found) == {"fresh"}
    assert "cannot be reached" in (found["fresh"].description or "")


def test_a_finding_in_a_large_table_stays_until_it_is_repaired(
    recorded: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    def span(evaluation: dg.AssetCheckEvaluation) -> tuple[Any, Any]:
        return evaluation.metadata["proved from"].value, evaluation.metadata["proved to"].value

    monkeypatch.setattr(continuity, "WHOLE_EVENTS", 0)
    monkeypatch.setattr(continuity, "WINDOW", timedelta(seconds=30))
    first = recorded.check()["no_unexplained_gaps"]
    assert span(first)[1] - span(first)[0] == 30
    recorded.client.command("DELETE FROM orderbook_events WHERE seq = 400")
    lost = recorded.check()["no_unexplained_gaps"]
    assert not lost.passed
    assert (
        span(lost)[0] < span(first)[0]
    )  # after a finding in the window, the whole table was checked
    again = recorded.check()["no_unexplained_gaps"]
    assert span(again)[0] == span(lost)[0]
    assert not again.passed


def test_the_schedule_runs_by_default_and_waits_for_a_recording(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    schedule = checks.order_book_checks_schedule
    assert schedule.default_status is dg.DefaultScheduleStatus.RUNNING

    def tick() -> object:
        platform = KalshiResource(overrides={"kalshi_data_dir": str(tmp_path)})
        with dg.build_schedule_context(
            instance=instance, resources={"platform": platform}
        ) as context:
            return schedule(context)

    assert isinstance(tick(), dg.SkipReason)
    (tmp_path / "journal" / "shard-0").mkdir(parents=True)
    (tmp_path / "journal" / "shard-0" / "health.json").write_text("{}")
    assert isinstance(tick(), dg.RunRequest)
