"""One bad row or file never costs the good ones; joined inserts are stored once; the bounds hold."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import verified_inserts
from kalshi_platform.clickhouse.client import Client
from kalshi_platform.clickhouse.verified_inserts import Insert
from kalshi_platform.commands import doctor
from kalshi_platform.engine import Contract, InventoryError, Quoted, Recorder
from kalshi_platform.inventory import spool as spools
from kalshi_platform.inventory.rows import DECISIONS, FILLS, ORDER_RESPONSES
from kalshi_platform.inventory.spool import Spool, is_of_a_spool
from kalshi_platform.settings import Settings
from kalshi_platform_tests.inventory.planted import Planted
from kalshi_platform_tests.inventory.test_recorder import (
    PATIENCE_S,
    away,
    count,
    held,
    wait_for,
)

AT = datetime(2026, 11, 22, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spools, "BACKOFF_S", 0.05)
    monkeypatch.setattr(spools, "BACKOFF_LIMIT_S", 0.1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def response(number: int, **changed: Any) -> dict[str, Any]:
    """A row of mm_order_responses."""
    texts = dict.fromkeys(
        ("engine_instance_id", "engine_version", "client_order_id", "status", "exchange_order_id"),
        "x",
    )
    return {
        "ts": AT + timedelta(seconds=number),
        "action_id": f"a-{number}",
        **texts,
        "market_ticker": "T",
        "reject_reason": "",
        "latency_ms": 1.0,
        "response_json": "{}",
    } | changed


def by_hand(folder: Path, number: int, rows: pa.Table, name: str = ORDER_RESPONSES.name) -> Path:
    """A file as an older build, or a person, has left it."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{number:020d}-{'0' * 32}-{number % 10**8:08d}-{name}.arrow"
    with pa.ipc.new_file(path, rows.schema) as stream:
        stream.write_table(rows)
    return path


def responses(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=ORDER_RESPONSES.arrow)


def recorded_away(settings: Settings, folder: Path, fills: int) -> list[Path]:
    """Files of one fill each, as ClickHouse's absence leaves them."""
    gone = Recorder("engine-1", "1", settings=away(settings), spool=folder)
    for number in range(fills):
        fill(gone, f"f-{number}")
        assert gone._spool is not None
        assert gone._spool.flush()
    gone.close(0.0)
    return sorted(folder.glob("*.arrow"))


def fill(recorder: Recorder, fill_id: str, size: Decimal = Decimal(1)) -> None:
    recorder.fill("T", fill_id, Contract.YES, size, Decimal("0.5"), at=AT)


def sent_by(folder: Path, settings: Settings) -> Spool:
    """A spool that has sent what it can, closed."""
    heir = Spool(folder, settings)
    assert heir.drain(PATIENCE_S), heir.trouble
    heir.close()
    return heir


def action_ids(planted: Planted) -> set[str]:
    return {
        str(name)
        for (name,) in planted.client.query("SELECT action_id FROM mm_order_responses").result_rows
    }


def test_a_bad_row_of_an_older_build_is_set_aside(
    planted: Planted, migrated_once: Settings, folder: Path
) -> None:
    bad = [
        response(1, exchange_order_id=None),
        response(2, ts=datetime(1969, 7, 20, tzinfo=UTC)),
        response(3),
    ]
    path = by_hand(folder, 1, responses(*bad))
    by_hand(folder, 2, responses(response(4)))
    heir = Spool(folder, migrated_once)
    assert heir.drain(PATIENCE_S), heir.trouble
    assert action_ids(planted) == {"a-3", "a-4"}
    status = heir.status()
    assert (status.rows_set_aside, status.files_set_aside, status.rows_waiting) == (2, 1, 0)
    assert "exchange_order_id is null" in str(heir.trouble)
    reasons = (folder / "refused" / path.with_suffix(".txt").name).read_text().splitlines()
    assert len(reasons) == 2
    assert "ts is not between 2000 and 2099" in reasons[1]
    heir.close()
    assert all(is_of_a_spool(path.name) for path in folder.iterdir())
    later = Spool(folder, migrated_once)  # the next engine says it, too
    assert later.status().rows_set_aside == 2
    later.close()


def test_the_remedy_for_a_row_that_was_set_aside_sends_it(
    planted: Planted, migrated_once: Settings, folder: Path
) -> None:
    path = by_hand(folder, 1, responses(response(1, status=None), response(2)))
    heir = Spool(folder, migrated_once)
    assert heir.drain(PATIENCE_S)
    assert "move the .arrow files back into the spool's folder" in str(heir.trouble)
    aside = folder / "refused" / path.name
    rows = pa.ipc.open_file(aside.read_bytes()).read_all()
    assert rows.num_rows == 1
    repaired = rows.set_column(rows.column_names.index("status"), "status", pa.array(["resting"]))
    by_hand(folder / "refused", 1, repaired)
    aside.rename(path)
    wait_for(lambda: heir.trouble is None, "the row that was repaired")
    assert heir.drain(PATIENCE_S)
    assert action_ids(planted) == {"a-1", "a-2"}
    heir.close()


def test_a_refused_row_is_found_among_the_good_ones(
    planted: Planted, migrated_once: Settings, folder: Path
) -> None:
    planted.client.command("ALTER TABLE mm_fills ADD CONSTRAINT small CHECK size < 1000")
    try:
        recorder = Recorder("engine-1", "1", settings=migrated_once, spool=folder)
        for number in range(40):
            fill(recorder, f"f-{number}", Decimal(5000 if number in {7, 33} else 1))
        assert recorder.drain(PATIENCE_S), recorder.trouble
        fill(recorder, "later")
        assert recorder.drain(PATIENCE_S), recorder.trouble
        assert count(planted, "mm_fills") == 39
        assert recorder.status().rows_set_aside == 2
        assert "VIOLATED_CONSTRAINT" in str(recorder.trouble)
    finally:
        planted.client.command("ALTER TABLE mm_fills DROP CONSTRAINT small")
    for path in (folder / "refused").glob("*.arrow"):
        path.rename(folder / path.name)
    wait_for(lambda: recorder.trouble is None and count(planted, "mm_fills") == 41, "the rest")
    assert recorder.close() == 0
    ids = planted.client.query("SELECT uniqExact(fill_id), count() FROM mm_fills").result_rows
    assert ids == [(41, 41)]


def test_a_table_that_takes_nothing_sets_nothing_aside(
    planted: Planted, migrated_once: Settings, folder: Path
) -> None:
    planted.client.command("ALTER TABLE mm_fills ADD CONSTRAINT none CHECK size < 0")
    try:
        recorder = Recorder("engine-1", "1", settings=migrated_once, spool=folder)
        for number in range(50):
            fill(recorder, f"f-{number}")
        recorder.decision(held(), Quoted())
        wait_for(
            lambda: count(planted, "mm_decisions") == 1 and recorder.trouble is not None,
            "the decision, and the trouble with the fills",
        )
        assert "VIOLATED_CONSTRAINT" in str(recorder.trouble)
        assert recorder.status().rows_set_aside == 0
        assert recorder.status().rows_waiting == 50
    finally:
        planted.client.command("ALTER TABLE mm_fills DROP CONSTRAINT none")
    assert recorder.drain(PATIENCE_S)
    assert count(planted, "mm_fills") == 50
    assert recorder.close() == 0


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "columns", "utf-8"])
def test_a_file_that_is_none_is_set_aside_and_the_others_go(
    planted: Planted, migrated_once: Settings, folder: Path, damage: str
) -> None:
    rows = responses(response(1))
    if damage == "columns":
        rows = rows.drop_columns(["status"])
    if damage == "utf-8":
        broken = pa.Array.from_buffers(
            pa.string(), 1, [*pa.array(["xx"]).buffers()[:2], pa.py_buffer(b"\xff\xfe")]
        )
        rows = rows.set_column(rows.column_names.index("status"), "status", broken)
    path = by_hand(folder, 1, rows)
    if damage in {"cut", "empty", "text"}:
        path.write_bytes({"cut": path.read_bytes()[:200], "empty": b"", "text": b"x" * 99}[damage])
    kept = path.read_bytes()
    by_hand(folder, 2, responses(response(2)))
    heir = sent_by(folder, migrated_once)
    assert action_ids(planted) == {"a-2"}
    assert (folder / "refused" / path.name).read_bytes() == kept
    assert heir.status().files_set_aside == 1
    assert f"{path.name} cannot be read" in str(heir.trouble)


def test_a_file_that_cannot_be_set_aside_waits_and_the_others_go(
    planted: Planted, migrated_once: Settings, folder: Path
) -> None:
    by_hand(folder, 1, responses(response(1, status=None)))
    by_hand(folder, 2, responses(response(2)))
    (folder / "refused").write_text("in the way")
    heir = Spool(folder, migrated_once)
    wait_for(lambda: heir.trouble is not None and action_ids(planted) == {"a-2"}, "the good row")
    assert "mm_order_responses.arrow: File exists." in str(heir.trouble)
    (folder / "refused").unlink()
    assert heir.drain(PATIENCE_S)
    assert heir.status().rows_set_aside == 1
    heir.close()


def test_a_row_that_arrow_does_not_take_is_set_aside_as_text(
    planted: Planted, migrated_once: Settings, folder: Path
) -> None:
    own = Spool(folder, migrated_once)
    own.put(ORDER_RESPONSES.name, response(1, latency_ms="slow", response_json=object()))
    own.put(ORDER_RESPONSES.name, response(2))
    assert own.drain(PATIENCE_S)
    assert action_ids(planted) == {"a-2"}
    (text,) = (folder / "refused").glob("*.jsonl")
    assert '"latency_ms": "slow"' in text.read_text()
    assert own.status().rows_set_aside == 1
    own.close()
    with pytest.raises(InventoryError, match="is closed"):
        own.put(ORDER_RESPONSES.name, response(3))


def test_the_sender_survives_an_unforeseen_error_and_reports_it(
    planted: Planted, migrated_once: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inserted = verified_inserts.insert

    def insert(client: Client, it: Insert) -> None:
        if it.name == FILLS.name:
            raise KeyError("unforeseen")
        inserted(client, it)

    monkeypatch.setattr(verified_inserts, "insert", insert)
    recorder = Recorder("engine-1", "1", settings=migrated_once, spool=folder)
    fill(recorder, "f")
    recorder.decision(held(), Quoted())
    wait_for(
        lambda: count(planted, "mm_decisions") == 1 and recorder.trouble is not None, "the decision"
    )
    assert "KeyError" in str(recorder.trouble)
    assert "unforeseen" in str(recorder.trouble)
    monkeypatch.setattr(verified_inserts, "insert", inserted)
    assert recorder.drain(PATIENCE_S)
    wait_for(lambda: recorder.trouble is None, "the end of the trouble")
    assert count(planted, "mm_fills") == 1
    assert recorder.close() == 0


@pytest.fixture
def inserts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Insert]]:
    """What is inserted from here on."""
    seen: list[Insert] = []
    inserted = verified_inserts.insert

    def insert(client: Client, it: Insert) -> None:
        seen.append(it)
        inserted(client, it)

    monkeypatch.setattr(verified_inserts, "insert", insert)
    return iter([seen])


def test_waiting_files_go_in_few_inserts_of_bounded_size(
    planted: Planted,
    migrated_once: Settings,
    folder: Path,
    inserts: Iterator[list[Insert]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = next(inserts)
    monkeypatch.setattr(spools, "MOST_JOINED_ROWS", 100)
    for number in range(250):
        by_hand(folder, number + 1, responses(response(number)))
    sent_by(folder, migrated_once)
    assert [it.rows.num_rows for it in seen] == [100, 100, 50]
    assert len(action_ids(planted)) == 250
    assert not list(folder.glob("joined-*"))


@pytest.mark.parametrize("manifest", [True, False], ids=["under way", "removing"])
def test_joined_files_that_a_kill_left_are_stored_once(
    planted: Planted, migrated_once: Settings, folder: Path, manifest: bool
) -> None:
    files = recorded_away(migrated_once, folder, 5)
    kept = {path: path.read_bytes() for path in files}
    note = folder / "joined-mm_fills.json"
    sent_by(folder, migrated_once)
    for left in (files, files[3:]):  # of the removal some may be done
        for path in left:
            path.write_bytes(kept[path])
        if manifest:
            names = ",".join(f'"{path.stem}"' for path in files)
            note.write_text(f'{{"files":[{names}]}}')
        sent_by(folder, migrated_once)
        assert count(planted, "mm_fills") == 5
        assert not note.exists()


def test_files_after_a_kill_do_not_join_the_interrupted_insert(
    planted: Planted, migrated_once: Settings, folder: Path, inserts: Iterator[list[Insert]]
) -> None:
    seen = next(inserts)
    files = recorded_away(migrated_once, folder, 5)
    names = ",".join(f'"{path.stem}"' for path in files[:3])
    (folder / "joined-mm_fills.json").write_text(f'{{"files":[{names}]}}')
    sent_by(folder, migrated_once)
    assert [it.rows.num_rows for it in seen] == [3, 2]
    assert count(planted, "mm_fills") == 5


def test_at_its_bounds_the_spool_refuses_and_loses_nothing(
    planted: Planted, migrated_once: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spools, "MOST_FILES", 0)
    monkeypatch.setattr(spools, "MOST_ROWS", 10)
    recorder = Recorder("engine-1", "1", settings=migrated_once, spool=folder)
    for number in range(10):
        fill(recorder, f"f-{number}")
    wait_for(lambda: "the disk refuses" in str(recorder.trouble), "a word about the bound")
    with pytest.raises(InventoryError, match="10 rows wait for the disk"):
        fill(recorder, "refused")
    assert recorder.status().rows_waiting == 10
    monkeypatch.setattr(spools, "MOST_FILES", 100)
    assert recorder.drain(PATIENCE_S)
    assert count(planted, "mm_fills") == 10
    wait_for(lambda: recorder.trouble is None, "the end of the trouble")
    recorder.close()


def test_large_texts_are_counted_against_the_bound_of_memory(
    migrated_once: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spools, "MOST_BYTES", 100_000)
    recorder = Recorder("engine-1", "1", settings=away(migrated_once), spool=folder)
    with pytest.raises(InventoryError, match="wait for the disk"):
        recorder.decision(held(), Quoted(params={"a": "x" * 200_000}))
    recorder.close(0.0)


def test_the_status_has_the_age_of_the_oldest_waiting_row(
    planted: Planted, migrated_once: Settings, folder: Path
) -> None:
    gone = Recorder("engine-1", "1", settings=away(migrated_once), spool=folder)
    assert gone.status().oldest_age_s == 0
    begun = time.monotonic()
    fill(gone, "a")
    assert gone.status().rows_waiting == 1
    wait_for(lambda: gone.status().oldest_age_s > 1.2, "the row to age, on disk")
    fill(gone, "b")
    status = gone.status()
    assert status.oldest_age_s <= time.monotonic() - begun
    assert status.rows_waiting == 2
    assert "cannot be reached" in str(status.trouble)
    gone.close(0.0)
    on_disk = min(int(path.name[:20]) for path in folder.glob("*.arrow"))
    heir = Recorder("engine-1", "1", settings=away(migrated_once), spool=folder)
    assert heir.status().oldest_age_s == pytest.approx((time.time_ns() - on_disk) / 1e9, abs=0.5)
    wait_for(lambda: heir.status().rows_waiting == 2, "its files to be opened")
    heir.close(0.0)
    heir = Recorder("engine-1", "1", settings=migrated_once, spool=folder)
    assert heir.drain(PATIENCE_S)
    wait_for(lambda: heir.status().rows_waiting == 0, "nothing to wait")
    assert heir.status().oldest_age_s == 0
    heir.close()


def test_doctor_names_what_was_set_aside(tmp_path: Path) -> None:
    settings = platform_settings.load(_env_file=None, kalshi_data_dir=tmp_path)
    check, _ = doctor.CHECKS["market maker's spool"]
    assert check(settings).mark is doctor.Mark.SKIPPED
    folder = spools.folder_of(settings)
    folder.mkdir()
    assert check(settings).mark is doctor.Mark.GOOD
    by_hand(folder, time.time_ns() - 3600 * 10**9, responses(response(1)))
    assert "1 files wait, the oldest for" in check(settings).text
    own = Spool(folder, away(settings))
    own.put(DECISIONS.name, {"ts": "never"})
    assert own.flush()
    own.close(0.0)
    found = check(settings)
    assert found.mark is doctor.Mark.ODD
    assert "1 rows in 1 files are set aside" in found.text
    assert found.remedy == spools.REMEDY
    assert threading.active_count() < 50


@pytest.mark.parametrize("kind", ["DateTime", "DateTime('UTC')", "DateTime64(0, 'UTC')"])
def test_an_engines_table_with_whole_seconds_gets_each_row_once(
    planted: Planted, migrated_once: Settings, folder: Path, kind: str
) -> None:
    command = planted.client.command
    command("CREATE TABLE older AS mm_fills")
    command("DROP TABLE mm_fills")
    try:
        columns = str(planted.client.query("SHOW CREATE TABLE older").result_rows[0][0])
        command(columns.replace(".older", ".mm_fills").replace("DateTime64(3, 'UTC')", kind))
        recorder = Recorder("engine-1", "1", settings=migrated_once, spool=folder)
        for number in range(3):
            at = AT + timedelta(milliseconds=1500 * number)
            recorder.fill("T", f"f-{number}", Contract.YES, Decimal(1), Decimal("0.5"), at=at)
        assert recorder.drain(PATIENCE_S), recorder.trouble
        assert recorder.close() == 0
        assert recorder.trouble is None
        assert count(planted, "mm_fills") == 3
    finally:
        command("DROP TABLE IF EXISTS mm_fills")
        command("DROP TABLE older")


KILLED = """
import os, signal, sys, time
from pathlib import Path
from kalshi_platform import settings
from kalshi_platform.inventory.spool import Spool
from kalshi_platform.clickhouse import client as clickhouse, verified_inserts

when, inserted, kept = sys.argv[2], verified_inserts.insert, clickhouse.insert_arrow

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def insert_arrow(*args, **more):
    kept(*args, **more)
    die()

def insert(*args):
    inserted(*args)
    die()

if when == "before":
    verified_inserts.insert = die
elif when == "acknowledged":
    clickhouse.insert_arrow = insert_arrow
elif when == "verified":
    verified_inserts.insert = insert
elif when == "removing":
    removed = []
    unlink = Path.unlink
    def one(path, missing_ok=False):
        unlink(path, missing_ok=missing_ok)
        removed.append(path)
        if sum(path.suffix == ".arrow" for path in removed) == 2:
            die()
    Path.unlink = one
spool = Spool(Path(sys.argv[1]), settings.load(_env_file=None))
time.sleep(60)
"""


@pytest.mark.parametrize("when", ["before", "acknowledged", "verified", "removing"])
def test_a_kill_at_any_moment_of_sending_keeps_each_row_once(
    planted: Planted, migrated_once: Settings, folder: Path, when: str
) -> None:
    recorded_away(migrated_once, folder, 4)
    env = {
        **os.environ,
        "CLICKHOUSE_URL": migrated_once.clickhouse_url,
        "CLICKHOUSE_DATABASE": migrated_once.clickhouse_database,
    }
    for _ in range(2):  # the second meets what the first has left
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(folder), when], env=env, check=False, timeout=120
        )
        assert done.returncode == -signal.SIGKILL
        assert count(planted, "mm_fills") == (0 if when == "before" else 4)
        if when == "removing":
            assert len(list(folder.glob("*.arrow"))) == 2
            break
    more = Recorder("engine-1", "1", settings=migrated_once, spool=folder)
    fill(more, "later")
    assert more.drain(PATIENCE_S)
    assert more.close() == 0
    assert count(planted, "mm_fills") == 5
