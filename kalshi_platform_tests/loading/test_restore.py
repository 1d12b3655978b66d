"""An archive is restored into ClickHouse exactly, without duplicates, after any interruption."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kalshi_platform import settings as platform_settings
from kalshi_platform.archive import LocalArchive, checksum
from kalshi_platform.archive.checksum import Content
from kalshi_platform.clickhouse import clickhouse_ledger, migrations
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.clickhouse.clickhouse_ledger import open_table_ledger
from kalshi_platform.errors import PlatformError, StoreRefused, StoreUnavailable
from kalshi_platform.journal import journal_identity
from kalshi_platform.journal.ledger import Entry
from kalshi_platform.journal.writer import Writer
from kalshi_platform.loading import restore as module
from kalshi_platform.loading.loader import Loader, Pace
from kalshi_platform.loading.rebuild import rebuild
from kalshi_platform.loading.restore import Restored, Verdict, parse_hours, refusals, restore
from kalshi_platform.loading.sinks import ClickHouseSink, ParquetSink
from kalshi_platform.schema import ORDERBOOK_EVENTS
from kalshi_platform.settings import Settings
from kalshi_platform.utc_hours import floor_hour
from kalshi_platform_tests import wire
from kalshi_platform_tests.archived import paths
from kalshi_platform_tests.clickhouse.tables import arrow, prepare
from kalshi_platform_tests.loading.test_loader import (
    FIRST_HOUR,
    PATIENCE_S,
    SECOND_HOUR,
    SMALL,
    journal_of,
    load_all,
    recording,
)

HOT = ("orderbook_events", "trades", "book_checkpoints", "stream_events")


def quiet(_: Restored) -> None: ...


@pytest.fixture
def recorded(tmp_path: Path, clickhouse_url: str, clickhouse_database: str) -> Settings:
    """Settings of a recorder that has stopped: two hours in both stores, the first one sealed."""
    settings = platform_settings.load(
        kalshi_data_dir=tmp_path,
        clickhouse_url=clickhouse_url,
        clickhouse_database=clickhouse_database,
        hot_retention_days=36_500,
    )
    prepare(settings)
    writer = journal_of(settings.journal_dir(), recording())
    for store in (
        ParquetSink(LocalArchive(settings.archive_dir), 0, lambda _: None),
        ClickHouseSink(settings, str(writer.id)),
    ):
        load_all(Loader(settings.journal_dir(), writer, store, SMALL))
    writer.close()
    return settings


@pytest.fixture
def archived(recorded: Settings) -> Settings:
    """The same settings after all of ClickHouse's rows were deleted."""
    client = clickhouse.connect(recorded)
    for name in (*HOT, "latest_levels"):
        client.command(f"TRUNCATE TABLE {name}")
    return recorded


def run(settings: Settings, *, replace: bool = False) -> list[Restored]:
    return restore(settings, LocalArchive(settings.archive_dir), None, quiet, replace=replace)


def verdicts(done: Sequence[Restored]) -> set[Verdict]:
    return {it.verdict for it in done}


def rows_of(settings: Settings) -> dict[str, int]:
    client = clickhouse.connect(settings)
    return {name: int(client.command(f"SELECT count() FROM {name}")) for name in HOT}  # type: ignore[arg-type]


def command(settings: Settings, *statements: str) -> None:
    client = clickhouse.connect(settings)
    for statement in statements:
        client.command(statement)


def levels(settings: Settings) -> list[Sequence[Any]]:
    sql = "SELECT market_ticker, side, price, size FROM latest_levels FINAL WHERE size > 0 ORDER BY ALL"
    return list(clickhouse.connect(settings).query(sql).result_rows)


def test_a_repeated_restore_stores_each_row_once(recorded: Settings) -> None:
    was, book = rows_of(recorded), levels(recorded)
    command(recorded, *(f"TRUNCATE TABLE {name}" for name in (*HOT, "latest_levels")))
    first = run(recorded)
    assert {it.verdict for it in first if it.rows} == {Verdict.INSERTED}
    assert {it.dataset for it in first} == set(HOT)
    assert (rows_of(recorded), levels(recorded)) == (was, book)
    again = run(recorded)
    assert verdicts(again) == {Verdict.EQUAL}
    assert [(it.rows, it.checksum) for it in again] == [(it.rows, it.checksum) for it in first]
    assert (rows_of(recorded), levels(recorded)) == (was, book)


def test_a_server_that_kept_a_token_without_rows_gets_them_again(
    archived: Settings,
) -> None:
    """ClickHouse stores a token before the rows: a kill in between leaves only the token."""
    run(archived)
    was = rows_of(archived)
    for lost in HOT:
        command(archived, f"ALTER TABLE {lost} DELETE WHERE true SETTINGS mutations_sync = 2")
        assert rows_of(archived) == was | {lost: 0}
        for _ in range(2):
            run(archived)
            assert rows_of(archived) == was, lost


def test_only_the_given_hours_are_restored(archived: Settings) -> None:
    archive = LocalArchive(archived.archive_dir)
    done = restore(archived, archive, (SECOND_HOUR, SECOND_HOUR), quiet)
    assert {it.hour for it in done} == {SECOND_HOUR}
    ((first,),) = (
        clickhouse.connect(archived).query("SELECT min(ingest_ts) FROM stream_events").result_rows
    )
    assert first >= SECOND_HOUR


def test_only_missing_rows_are_inserted(recorded: Settings) -> None:
    was = rows_of(recorded)
    for share in (3, 1):
        command(recorded, f"DELETE FROM orderbook_events WHERE seq % {share} = 0 AND seq < 60")
        gone = was["orderbook_events"] - rows_of(recorded)["orderbook_events"]
        assert gone
        done = run(recorded)
        found = [it for it in done if it.verdict is Verdict.COMPLETED]
        assert [(it.dataset, it.hour, it.inserted) for it in found] == [
            ("orderbook_events", FIRST_HOUR, gone)
        ]
        assert rows_of(recorded) == was
        assert verdicts(run(recorded)) == {Verdict.EQUAL}


@pytest.mark.parametrize(
    "harm",
    [
        "INSERT INTO orderbook_events SELECT * FROM orderbook_events",
        "INSERT INTO orderbook_events SELECT * REPLACE (seq + 1000 AS seq) FROM orderbook_events LIMIT 1",
        "INSERT INTO stream_events SELECT * FROM stream_events WHERE kind = 'connected'",
    ],
    ids=["all doubled", "another row", "one doubled"],
)
def test_other_rows_are_refused_with_the_replace_command(recorded: Settings, harm: str) -> None:
    was = rows_of(recorded)
    command(recorded, "DELETE FROM orderbook_events WHERE seq = 30", harm)
    harmed = rows_of(recorded)
    done = run(recorded)
    differs = [it for it in done if it.verdict is Verdict.DIFFERS]
    assert {it.hour for it in differs} == {FIRST_HOUR}
    assert "connected" in harm or rows_of(recorded) == harmed
    (sentence, *_) = refusals(done, asked_for=False)
    assert f"kalshi-platform restore --hours {FIRST_HOUR:%Y-%m-%d-%H} --replace." in sentence
    replaced = restore(
        recorded,
        LocalArchive(recorded.archive_dir),
        (FIRST_HOUR, FIRST_HOUR),
        quiet,
        replace=True,
    )
    assert Verdict.REPLACED in verdicts(replaced)
    if "SELECT * FROM orderbook_events" in harm:  # the open hour has them twice, too
        command(
            recorded,
            f"DELETE FROM orderbook_events WHERE ingest_ts >= '{SECOND_HOUR:%Y-%m-%d %H:%M:%S}'",
        )
        run(recorded)
    assert rows_of(recorded) == was
    assert verdicts(run(recorded)) == {Verdict.EQUAL}


class Killed(BaseException):
    """Stands for a SIGKILL between two statements."""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("replace", [False, True], ids=["insert", "replace"])
def test_a_restore_killed_at_any_step_completes_when_repeated(
    recorded: Settings, monkeypatch: pytest.MonkeyPatch, when: str, *, replace: bool
) -> None:
    """Each run is killed at the first change of ClickHouse that no earlier run has reached."""
    was, book = rows_of(recorded), levels(recorded)
    if replace:
        command(
            recorded, "INSERT INTO orderbook_events SELECT * FROM orderbook_events WHERE seq = 9"
        )
    else:
        command(recorded, *(f"TRUNCATE TABLE {name}" for name in (*HOT, "latest_levels")))
    seen: set[str] = set()

    def kill_once(what: str, act: Callable[[], Any]) -> Any:
        first = what not in seen
        seen.add(what)
        if first and when == "before":
            raise Killed
        answer = act()
        if first:
            raise Killed
        return answer

    def connected(*args: Any, **others: Any) -> clickhouse.Client:
        client = clickhouse.connect(*args, **others)
        run_command = client.command
        client.command = lambda sql, **more: kill_once(sql, lambda: run_command(sql, **more))  # type: ignore[method-assign]
        return client

    def insert(client: clickhouse.Client, table: str, rows: pa.Table, token: str) -> None:
        kill_once(token, lambda: clickhouse.insert_arrow(client, table, rows, token))

    class Watched:
        """The module `clickhouse`, as `restore` sees it."""

        connect = staticmethod(connected)
        insert_arrow = staticmethod(insert)
        translated = staticmethod(clickhouse.translated)
        Client = clickhouse.Client

    monkeypatch.setattr(module, "clickhouse", Watched)
    kills = 0
    while True:
        try:
            run(recorded, replace=replace)
        except Killed:
            kills += 1
            if not replace:
                assert all(now <= was[name] for name, now in rows_of(recorded).items())
            continue
        break
    monkeypatch.undo()
    assert kills >= 6
    assert (rows_of(recorded), levels(recorded)) == (was, book)
    assert verdicts(run(recorded)) == {Verdict.EQUAL}
    tables = clickhouse.connect(recorded).query("SHOW TABLES LIKE '%staging%'").result_rows
    assert list(tables) == []


@pytest.mark.slow
def test_a_restore_killed_by_sigkill_completes_when_repeated(
    archived: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of the command at random moments, until a run completes."""
    monkeypatch.setattr(module, "BATCH_ROWS", 20)
    env = {
        **os.environ,
        "KALSHI_DATA_DIR": str(archived.data_dir),
        "CLICKHOUSE_URL": archived.clickhouse_url,
        "CLICKHOUSE_DATABASE": archived.clickhouse_database,
        "HOT_RETENTION_DAYS": "36500",
    }
    code = "from kalshi_platform.loading import restore; restore.BATCH_ROWS = 9; from kalshi_platform.commands.main import run; run()"
    rng = random.Random(7)
    for attempt in range(5):
        child = subprocess.Popen(
            [sys.executable, "-c", code, "restore"],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        # from its first line on, so that the kill falls into its work and not into its start
        if attempt < 4 and child.stdout.readline():
            time.sleep(rng.random() * 0.5)
            child.send_signal(signal.SIGKILL)
        child.communicate()
        if child.returncode == 0:
            break
    assert child.returncode == 0
    done = run(archived)
    assert verdicts(done) == {Verdict.EQUAL}


def test_unloaded_rows_are_left_to_the_loader(
    tmp_path: Path, clickhouse_url: str, clickhouse_database: str
) -> None:
    """The archive has an hour of which ClickHouse has only a part after an outage."""
    settings = platform_settings.load(
        kalshi_data_dir=tmp_path,
        clickhouse_url=clickhouse_url,
        clickhouse_database=clickhouse_database,
        hot_retention_days=36_500,
    )
    prepare(settings)
    records = recording()
    writer = journal_of(settings.journal_dir(), records[:60])

    def hot() -> Loader:
        store = ClickHouseSink(settings, str(writer.id))
        return Loader(settings.journal_dir(), writer, store, SMALL)

    load_all(hot())
    lost = rows_of(settings)
    command(settings, "DELETE FROM orderbook_events WHERE seq < 20")  # rows that it did bring
    for record in records[60:]:
        writer.append(*record)
    writer.submit()
    assert writer.wait_durable(len(records), PATIENCE_S)
    cold = ParquetSink(LocalArchive(settings.archive_dir), 0, lambda _: None)
    load_all(Loader(settings.journal_dir(), writer, cold, SMALL))
    done = restore(settings, LocalArchive(settings.archive_dir), (FIRST_HOUR, FIRST_HOUR), quiet)
    assert rows_of(settings) == lost
    assert sum(it.left for it in done) > 0
    load_all(hot())
    writer.close()
    (events, *_) = [
        it for it in run(settings) if it.dataset == "orderbook_events" and it.hour == FIRST_HOUR
    ]
    assert events.verdict is Verdict.EQUAL
    assert verdicts(run(settings)) == {Verdict.EQUAL}


def test_the_ledger_decides_before_the_cursor(
    archived: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ClickHouse from a backup is behind the cursor, and a new one is loaded from the beginning."""
    command(archived, "ALTER TABLE recorders DELETE WHERE 1 SETTINGS mutations_sync = 2")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(clickhouse_ledger, "place", lambda _: "a new place")
        assert sum(it.rows for it in run(archived)) == 0
    assert rows_of(archived) == dict.fromkeys(HOT, 0)
    identity = journal_identity.read(archived.journal_dir())
    assert identity is not None
    start = identity.starts[-1]
    entry = Entry(start.epoch, start.token, began=0, loaded_to=60, planned_to=60)
    open_table_ledger(archived, 0).claim(identity.id, entry)
    done = run(archived)
    assert (sum(it.left for it in done) > 0, sum(it.inserted for it in done) > 0) == (True, True)
    ((newest,),) = (
        clickhouse.connect(archived).query("SELECT max(record) FROM orderbook_events").result_rows
    )
    assert newest == 59


@pytest.mark.slow
def test_a_restore_beside_a_recorder_keeps_each_row_once(
    tmp_path: Path, clickhouse_url: str, clickhouse_database: str
) -> None:
    """Loaders load records while restores run one after the other."""
    settings = platform_settings.load(
        kalshi_data_dir=tmp_path,
        clickhouse_url=clickhouse_url,
        clickhouse_database=clickhouse_database,
        hot_retention_days=36_500,
    )
    prepare(settings)
    records = recording(600, step_s=12.0)  # two hours
    writer = journal_of(settings.journal_dir(), records[:5])
    pace = Pace(rows=25, seconds=0.0, first_s=0.0)
    slow = Pace(rows=25, seconds=0.4, first_s=0.4)
    cold = Loader(
        settings.journal_dir(),
        writer,
        ParquetSink(LocalArchive(settings.archive_dir), 0, lambda _: None),
        pace,
    )
    hot = Loader(settings.journal_dir(), writer, ClickHouseSink(settings, str(writer.id)), slow)
    cold.start()
    hot.start()
    over = threading.Event()
    rounds = 0

    def receive() -> None:
        for batch, n in enumerate(range(5, len(records), 20)):
            for record in records[n : n + 20]:
                writer.append(*record)
            writer.submit()
            time.sleep(0.1)
            while rounds < batch // 8:  # a busy machine restores slowly
                time.sleep(0.05)
        over.set()

    thread = threading.Thread(target=receive)
    thread.start()
    seen = Counter[Verdict]()
    while not over.is_set():
        try:
            seen.update(it.verdict for it in run(settings))
        except StoreRefused as error:
            assert "has no hour" in str(error)
        rounds += 1
    thread.join()
    writer.wait_durable(len(records), PATIENCE_S)
    for load in (cold, hot):
        load.drain()
        assert load.join(PATIENCE_S), load.failure or load.trouble
    writer.close()
    assert rounds > 3
    assert not {Verdict.DIFFERS, Verdict.UNSOUND} & seen.keys()
    assert verdicts(run(settings)) == {Verdict.EQUAL}
    deltas = sum(kind == 1 for *_, kind, _ in records)
    assert deltas
    ((rows, different),) = (
        clickhouse.connect(settings)
        .query("SELECT count(), uniqExact(shard, record, side, price) FROM orderbook_events")
        .result_rows
    )
    assert rows == different


def test_an_open_hour_is_not_restored_while_recording(archived: Settings) -> None:
    writer = Writer(archived.journal_dir())
    done = run(archived)
    assert {it.hour for it in done if it.verdict is Verdict.OPEN} == {SECOND_HOUR}
    assert refusals(done, asked_for=False) == []
    (sentence,) = refusals(done, asked_for=True)
    assert "is not sealed" in sentence
    ((rows,),) = (
        clickhouse.connect(archived)
        .query(
            "SELECT count() FROM stream_events WHERE ingest_ts >= {at:DateTime64(6, 'UTC')}",
            parameters={"at": SECOND_HOUR},
        )
        .result_rows
    )
    assert rows == 0
    writer.close()
    assert Verdict.OPEN not in verdicts(run(archived))


def test_files_that_differ_from_the_manifest_are_not_restored(
    archived: Settings,
) -> None:
    first, *_ = paths(archived.archive_dir, "orderbook_events", FIRST_HOUR)
    first.unlink()
    done = run(archived)
    unsound = [it for it in done if it.verdict is Verdict.UNSOUND]
    assert [(it.dataset, it.hour) for it in unsound] == [("orderbook_events", FIRST_HOUR)]
    (sentence,) = refusals(done, asked_for=False)
    assert "Materialise the hour again." in sentence
    rebuild(archived, FIRST_HOUR)  # the remedy
    assert Verdict.UNSOUND not in verdicts(run(archived))
    assert verdicts(run(archived)) == {Verdict.EQUAL}


def test_hours_past_retention_are_skipped_and_reported(
    archived: Settings,
) -> None:
    short = archived.model_copy(update={"hot_retention_days": 1})
    migrations.migrate(short)
    done = run(short)
    assert verdicts(done) == {Verdict.EXPIRED}
    assert rows_of(short) == dict.fromkeys(HOT, 0)
    (sentence, *_) = refusals(done, asked_for=True)
    assert "Set HOT_RETENTION_DAYS to more and run kalshi-platform migrate." in sentence
    migrations.migrate(archived)  # the remedy
    assert Verdict.EXPIRED not in verdicts(run(archived))


def test_a_second_restore_at_once_is_refused(archived: Settings) -> None:
    def second(_: Restored) -> None:
        with pytest.raises(StoreUnavailable, match="Another restore is running"):
            run(archived)

    restore(archived, LocalArchive(archived.archive_dir), None, second)
    assert verdicts(run(archived)) == {Verdict.EQUAL}


def test_an_archive_without_hours_is_refused(archived: Settings, tmp_path: Path) -> None:
    with pytest.raises(StoreRefused, match="has no hour of that span"):
        restore(archived, LocalArchive(tmp_path / "nowhere"), None, quiet)


ROWS = st.lists(st.integers(0, 5), max_size=12)


@given(cold=ROWS, hot=ROWS, cuts=st.integers(1, 4), passes=st.integers(0, 3))
@hypothesis_settings(max_examples=150)
def test_rows_are_compared_as_multisets(
    cold: list[int], hot: list[int], cuts: int, passes: int
) -> None:
    """ClickHouse's rows plus those taken from the archive are exactly the archive's."""

    def tables(rows: list[int]) -> list[pa.Table]:
        step = max(1, len(rows) // cuts)
        pieces = [rows[i : i + step] for i in range(0, len(rows), step)]
        return [arrow(ORDERBOOK_EVENTS, [{"seq": seq} for seq in piece]) for piece in pieces]

    class Found:
        def cold(self) -> list[pa.Table]:
            return tables(cold)

        def hot(self) -> list[pa.Table]:
            return tables(hot)

    def content(rows: list[int]) -> Content:
        return sum((checksum.content(t) for t in tables(rows)), Content())

    before = module.COMPARED_ROWS
    module.COMPARED_ROWS = max(1, 12 // (passes + 1))
    try:
        apart = module._compare(Found(), content(cold), content(hot))  # type: ignore[arg-type]
    finally:
        module.COMPARED_ROWS = before
    taken = [
        seq
        for table in (apart.missing(tables(cold), groups=0) if len(apart.lacking) else ())
        for seq in table["seq"].to_pylist()
    ]
    assert Counter(taken) == Counter(cold) - Counter(hot)
    assert apart.others == (Counter(hot) - Counter(cold)).total()
    assert np.all(np.diff(apart.lacking.astype(object)) > 0)


@pytest.mark.parametrize("text", ["yesterday", "2026-11-22", "2026-11-22-14..2026-11-22-13"])
def test_invalid_hours_are_an_error(text: str) -> None:
    with pytest.raises(PlatformError, match="--hours"):
        parse_hours(text)


def test_hours_are_parsed_as_utc() -> None:
    first, last = parse_hours(f"{FIRST_HOUR:%Y-%m-%d-%H}..{SECOND_HOUR:%Y-%m-%d-%H}")
    assert (first, last) == (FIRST_HOUR, SECOND_HOUR)
    assert floor_hour(first + timedelta(minutes=59)) == first
    assert wire.NOON_NS
