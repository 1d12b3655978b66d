"""Copies, restored backups and lost journals are detected, and made independent recorders by `adopt`."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import client
from kalshi_platform.commands import adopt as adopt_command
from kalshi_platform.journal.reader import JournalError
from kalshi_platform.loading import adoption
from kalshi_platform.settings import Settings
from kalshi_platform_tests.clickhouse.tables import prepare
from kalshi_platform_tests.loading.recorder import (
    PATIENCE_S,
    Recorder,
    Start,
    assert_each_record_once,
)


@pytest.fixture
def settings(tmp_path: Path, clickhouse_url: str, clickhouse_database: str) -> Settings:
    made = platform_settings.load(
        kalshi_data_dir=tmp_path / "data",
        clickhouse_url=clickhouse_url,
        clickhouse_database=clickhouse_database,
        hot_retention_days=36_500,
    )
    prepare(made)
    return made


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalshi_platform.loading.loader.RESTART_S", 0.05)
    monkeypatch.setattr("kalshi_platform.loading.loader.DRAIN_GIVE_UP_S", 0.3)


def until(condition: Callable[[], bool], start: Start) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, start.trouble
        time.sleep(0.01)


def copy_of(original: Recorder, to: Path) -> Recorder:
    """A copy of the current data folder that loads into the same ClickHouse and its own archive."""
    shutil.copytree(original.settings.data_dir, to, ignore=shutil.ignore_patterns("lock"))
    settings = original.settings.model_copy(update={"kalshi_data_dir": to})
    # no two machines receive records of one number in the same microsecond
    return Recorder(settings, at_ns=original.at_ns + 1_000, conns=iter(range(500, 600)))


def deltas(settings: Settings) -> list[tuple[str, int]]:
    """(connection, number) of each delta in ClickHouse, with repetitions."""
    sql = "SELECT toString(conn_id), seq FROM orderbook_events WHERE type = 'delta'"
    return [(str(c), int(n)) for c, n in client.connect(settings).query(sql).result_rows]


def assert_clickhouse_has_each_once(*recorders: Recorder) -> None:
    """The distinct deltas of all their archives together."""
    expected = []
    for recorder in recorders:
        cold = recorder.rows("parquet", "orderbook_events").filter(pl.col("type") == "delta")
        expected += cold.select("conn_id", "seq").rows()
    assert sorted(deltas(recorders[0].settings)) == sorted(set(expected))


def test_a_copy_stops_the_original_until_it_is_adopted(settings: Settings, tmp_path: Path) -> None:
    original = Recorder(settings)
    original.run()
    with original.started() as first:
        first.record(40)
        first.load()
        copy = copy_of(original, tmp_path / "copy")
        with copy.started() as second:
            second.record(30)
            second.load()
            assert second.trouble is None
            first.record(30)
            until(lambda: first.trouble is not None, first)
            assert "loaded by another recorder" in str(first.trouble)
            assert "kalshi-platform adopt" in str(first.trouble)
            with pytest.raises(JournalError, match="Another streamer"):
                adoption.adopt(settings, 0)
    done = adoption.adopt(settings, 0)
    assert done.before != done.after
    assert original.run().trouble is None
    assert copy.run().trouble is None
    assert original.run().trouble is None
    assert_clickhouse_has_each_once(original, copy)


def test_a_copy_started_during_an_outage_is_reported(settings: Settings, tmp_path: Path) -> None:
    original = Recorder(settings, kinds=["clickhouse"])
    original.run()
    copy = copy_of(original, tmp_path / "copy")
    copy.kinds, copy.asks_stores = ["clickhouse"], False
    original.run()
    with copy.started() as start:
        start.record(20)
        start.load()
        assert "kalshi-platform adopt" in str(start.trouble)
    adoption.adopt(copy.settings, 0)
    assert copy.run().trouble is None
    found = deltas(settings)
    assert len(found) == len(set(found)) == 60 + 60 + 20 + 60


def test_a_restored_journal_continues_after_the_stores(settings: Settings, tmp_path: Path) -> None:
    recorder = Recorder(settings)
    recorder.run()
    shutil.copytree(settings.journals_dir, tmp_path / "backup")
    lost = recorder.run()
    held = list(range(lost.writer.began_n, lost.writer.durable.n))
    shutil.rmtree(settings.journals_dir)
    shutil.copytree(tmp_path / "backup", settings.journals_dir)
    assert recorder.run().trouble is None
    assert recorder.run().trouble is None
    assert_each_record_once(recorder, beside=held)


def test_a_full_restore_from_backup_resumes(settings: Settings, tmp_path: Path) -> None:
    recorder = Recorder(settings, kinds=["parquet"])
    recorder.run()
    shutil.copytree(settings.data_dir, tmp_path / "backup")
    recorder.run()
    shutil.rmtree(settings.data_dir)
    shutil.move(tmp_path / "backup", settings.data_dir)
    assert recorder.run().trouble is None
    assert_each_record_once(recorder)


def test_a_restored_archive_is_loaded_again_from_its_ledger(
    settings: Settings, tmp_path: Path
) -> None:
    recorder = Recorder(settings)
    recorder.run()
    shutil.copytree(settings.archive_dir, tmp_path / "backup")
    recorder.run()
    shutil.rmtree(settings.archive_dir)
    shutil.move(tmp_path / "backup", settings.archive_dir)
    last = recorder.run()
    assert last.trouble is None
    assert any(note.startswith("parquet: resumed") for note in last.notes)
    assert_each_record_once(recorder)


def test_an_unmounted_journal_is_not_a_first_start(settings: Settings, tmp_path: Path) -> None:
    recorder = Recorder(settings)
    before = recorder.run()
    settings.journals_dir.rename(tmp_path / "away")
    with pytest.raises(JournalError, match=r"is gone: .* adopt"):
        recorder.run()
    assert not (recorder.folder / "journal.json").exists()
    shutil.rmtree(settings.journals_dir)
    (tmp_path / "away").rename(settings.journals_dir)
    assert recorder.run().trouble is None
    assert_each_record_once(recorder)
    held = recorder.journalled()
    shutil.rmtree(settings.journals_dir)  # now the journal is lost for good
    adoption.adopt(settings, 0)
    after = recorder.run()
    assert after.trouble is None
    assert after.writer.began_n > before.writer.durable.n
    assert_each_record_once(recorder, beside=held)


@pytest.mark.parametrize("what", ["host name", "data folder", "archive", "all of them"])
def test_a_moved_recorder_resumes(
    what: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container with another host name, volumes mounted elsewhere, a moved folder."""
    recorder = Recorder(settings)
    recorder.run()
    if what in {"host name", "all of them"}:
        monkeypatch.setattr("socket.gethostname", lambda: "another-container")
    if what in {"data folder", "all of them"}:
        settings.data_dir.rename(tmp_path / "mounted")
        settings = settings.model_copy(update={"kalshi_data_dir": tmp_path / "mounted"})
    if what in {"archive", "all of them"}:
        settings.archive_dir.rename(tmp_path / "archive")
        settings = settings.model_copy(update={"parquet_dir": str(tmp_path / "archive")})
    recorder.settings = settings
    for _ in range(2):
        last = recorder.run()
        assert last.trouble is None
    assert_each_record_once(recorder)


def test_the_adopt_command_reports_where_loading_resumes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(settings, kinds=["parquet"])
    start = recorder.run()
    alone = settings.model_copy(update={"use_clickhouse": False})
    monkeypatch.setattr("kalshi_platform.settings.load", lambda: alone)
    done = CliRunner().invoke(adopt_command.command)
    assert done.exit_code == 0, done.output
    after = json.loads((recorder.folder / "journal.json").read_text())["id"]
    expected = (
        f"Shard 0: journal {start.writer.id} is journal {after} now. It is loaded into parquet"
    )
    assert expected in done.output
