"""Every state file missing, old, altered, truncated or swapped: nothing is stored twice, nothing is left out.

Where going on cannot be known to be right, the load says so, and what its sentence says to do is done
here and leads to the same.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.archive import LocalArchive
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.journal import journal_identity
from kalshi_platform.journal.reader import LogOffset
from kalshi_platform.loading import state_files
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.loader import Loader
from kalshi_platform_tests.clickhouse.tables import prepare
from kalshi_platform_tests.loading.recorder import (
    KINDS,
    PATIENCE_S,
    Recorder,
    Start,
    assert_each_record_once,
)

OTHER = {"clickhouse": "parquet", "parquet": "clickhouse"}


@pytest.fixture
def recorder(tmp_path: Path, clickhouse_url: str, clickhouse_database: str) -> Recorder:
    settings = platform_settings.load(
        kalshi_data_dir=tmp_path / "data",
        clickhouse_url=clickhouse_url,
        clickhouse_database=clickhouse_database,
        hot_retention_days=36_500,
    )
    prepare(settings)
    return Recorder(settings)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalshi_platform.loading.loader.RESTART_S", 0.05)


Damage = Callable[[Path, "Earlier"], None]


class Earlier:
    """Copies of a data folder: of an earlier moment, and of another recorder."""

    def __init__(self, data: Path, old: Path, other: Recorder) -> None:
        """`other` is made when it is asked for: few damages need it."""
        self._data, self._old, self._other = data, old, other

    def old(self, path: Path) -> Path:
        return self._old / path.relative_to(self._data)

    def of_another(self, path: Path) -> Path:
        data = self._other.settings.data_dir
        if not data.exists():
            self._other.run(40)
            cursors = self._other.folder / "load"
            shutil.copy(cursors / "parquet.json", cursors / "clickhouse.json")
        return data / path.relative_to(self._data)


def missing(path: Path, _: Earlier) -> None:
    path.unlink()


def old(path: Path, earlier: Earlier) -> None:
    shutil.copy(earlier.old(path), path)


def altered(path: Path, _: Earlier) -> None:
    """One digit is another one: the last of the record that the file names first."""
    text = path.read_bytes()
    match = re.search(
        rb"(?:committed\":\[\d+,\d+,|loaded_to\":|epoch\":|id\":\"\w*?)\d*?(\d)\b", text
    )
    assert match is not None
    at = match.start(1)
    other = b"8" if text[at : at + 1] != b"8" else b"3"
    path.write_bytes(text[:at] + other + text[at + 1 :])


def truncated(path: Path, _: Earlier) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swapped_with_the_other_stores(path: Path, _: Earlier) -> None:
    other = path.with_name(f"{OTHER[path.stem]}.json")
    mine, its = path.read_bytes(), other.read_bytes()
    path.write_bytes(its)
    other.write_bytes(mine)


def of_another_recorder(path: Path, earlier: Earlier) -> None:
    shutil.copy(earlier.of_another(path), path)


CURSOR_DAMAGES: list[Damage] = [
    missing,
    old,
    altered,
    truncated,
    swapped_with_the_other_stores,
    of_another_recorder,
]
TIMES = ("at a start", "while running")


def earlier_of(recorder: Recorder, tmp_path: Path) -> Earlier:
    """The folder as it is now, and that of a recorder of the same age that loads elsewhere."""
    data = recorder.settings.data_dir
    shutil.copytree(data, tmp_path / "old")
    elsewhere = recorder.settings.model_copy(
        update={"kalshi_data_dir": tmp_path / "other", "use_clickhouse": False}
    )
    other = Recorder(elsewhere, kinds=["parquet"])
    return Earlier(data, tmp_path / "old", other)


def disturbed(
    recorder: Recorder, tmp_path: Path, when: str, damage: Callable[[Earlier], None]
) -> list[str]:
    """Three starts with the damage between them, or in the middle of the second. Returns the notes."""
    recorder.run()
    earlier = earlier_of(recorder, tmp_path)
    notes = []
    if when == "at a start":
        recorder.run()
        damage(earlier)
    else:
        with recorder.started() as start:
            start.record(30)
            start.load()
            damage(earlier)
            start.record(30)
            start.wait()
            assert start.trouble is None
        notes += start.notes
    last = recorder.run()
    assert last.trouble is None
    return notes + last.notes


@pytest.mark.parametrize("when", TIMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", CURSOR_DAMAGES)
def test_a_wrong_cursor_loses_and_duplicates_nothing(
    damage: Damage, kind: str, when: str, recorder: Recorder, tmp_path: Path
) -> None:
    path = recorder.folder / "load" / f"{kind}.json"
    notes = disturbed(recorder, tmp_path, when, lambda earlier: damage(path, earlier))
    assert_each_record_once(recorder)
    if when == "at a start":  # else the running load has written it again
        assert any(note.startswith(f"{kind}: resumed") for note in notes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_without_cursor_uses_the_newest_saved_state(
    kind: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder.run()
    recorder.run()
    (recorder.folder / "load" / f"{kind}.json").unlink()
    recorder.kinds = [kind]  # the other load reads its own
    state_files.save_hour_state(BookState(n=1), recorder.folder, datetime(2026, 1, 1, tzinfo=UTC))
    read = counting(monkeypatch)
    began: dict[str, int] = {}
    before = Loader._books_before

    def books_before(load: Loader, n: int, cursor: object) -> tuple[BookState, LogOffset]:
        state, position = before(load, n, cursor)  # type: ignore[arg-type]
        began[load.name] = n - position.n
        return state, position

    monkeypatch.setattr(Loader, "_books_before", books_before)
    recorder.run()
    assert began[kind] == 0
    assert len(read) == 1
    recorder.kinds = KINDS
    recorder.run()
    assert_each_record_once(recorder)
    for name in KINDS:  # and none is left over
        assert len([*(recorder.folder / "load").glob(f"{name}-*.state")]) == 1


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The record of each state whose levels are read from now on."""
    read: list[int] = []
    load = state_files.load

    def loaded(*args: Any, **options: Any) -> BookState:
        state = load(*args, **options)
        read.append(state.n)
        return state

    monkeypatch.setattr(state_files, "load", loaded)
    return read


def test_a_damaged_saved_state_falls_back_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {}
    for n, start, partial in (
        (5, "ours", False),
        (9, "ours", False),
        (10, "ours", True),
        (11, "another", False),
        (13, "ours", False),
    ):
        paths[n] = tmp_path / "load" / f"parquet-{n:015d}.state"
        state = BookState(n=n, partial=frozenset({"known in part"} if partial else ()))
        state_files.save(state, paths[n], start)
    for n in (3, 7, 12):
        state_files.save_hour_state(BookState(n=n), tmp_path, datetime(2026, 1, 1, tzinfo=UTC))
        (paths[n],) = state_files.hour_folder(tmp_path).glob(f"*-{n:015d}.state")
    read = counting(monkeypatch)
    for damaged, newest in ((None, 9), (9, 7), (7, 5), (5, None)):
        if damaged is not None:
            paths[damaged].write_bytes(paths[damaged].read_bytes()[:-1])
        read.clear()
        found = state_files.newest_saved(tmp_path, {"ours"}, 4, 11)
        assert (found.n if found else None) == newest
        assert read == ([newest] if newest else [])


def test_a_state_of_an_unknown_start_is_ignored(
    recorder: Recorder,
) -> None:
    recorder.run()
    folder = recorder.folder
    (kept,) = (folder / "load").glob("parquet-*.state")
    n = int(kept.stem.partition("-")[2])
    identity = journal_identity.read(folder)
    assert identity is not None
    tokens = {start.token for start in identity.starts}
    found = state_files.newest_saved(folder, tokens, n, n)
    assert found is not None
    assert found.n == n
    assert state_files.newest_saved(folder, {"another"}, n, n) is None
    assert state_files.newest_saved(folder, {""}, n, n) is None


@pytest.mark.parametrize("when", TIMES)
@pytest.mark.parametrize("how", ["deleted", "moved away"])
def test_the_load_folder_may_be_removed_at_any_moment(
    how: str, when: str, recorder: Recorder, tmp_path: Path
) -> None:
    folder = recorder.folder / "load"

    def damage(_: Earlier) -> None:
        if how == "deleted":
            shutil.rmtree(folder)
        else:
            folder.rename(tmp_path / "load")

    disturbed(recorder, tmp_path, when, damage)
    assert_each_record_once(recorder)


# -- stores that vanish while being written --------------------------------------------------------


def waits(start: Start, sentence: str) -> None:
    """Wait until a loader reports that sentence."""
    deadline = time.monotonic() + PATIENCE_S
    while sentence not in str(start.trouble):
        assert time.monotonic() < deadline, start.trouble
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["moved away", "emptied", "another one in its place"])
def test_an_archive_removed_while_running_is_not_recreated(
    how: str, recorder: Recorder, tmp_path: Path
) -> None:
    root = recorder.settings.archive_dir
    recorder.run()
    with recorder.started() as start:
        start.record(20)
        start.load()
        root.rename(tmp_path / "away")
        if how != "moved away":
            root.mkdir()
        if how == "another one in its place":
            LocalArchive(root).identify()
        start.record(20)
        waits(start, f"The archive in {root} is gone")
        assert not list(root.glob("*/date=*"))
        shutil.rmtree(root, ignore_errors=True)
        (tmp_path / "away").rename(root)
        start.wait_for_stores()
    assert_each_record_once(recorder)


def test_a_missing_archive_at_start_is_an_error_until_restored(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kalshi_platform.loading.loader.DRAIN_GIVE_UP_S", 0.3)
    root = recorder.settings.archive_dir
    recorder.run()
    root.rename(tmp_path / "away")
    with recorder.started() as start:
        start.record(20)
        start.load()
        waits(start, "is not mounted, or was emptied or replaced. Restore it")
        assert not root.exists() or not list(root.glob("*/date=*"))
    shutil.rmtree(root, ignore_errors=True)
    (tmp_path / "away").rename(root)
    assert recorder.run().trouble is None
    assert_each_record_once(recorder)


@pytest.mark.parametrize("lost_for_good", [False, True])
@pytest.mark.parametrize("damage", [altered, swapped_with_the_other_stores])
def test_a_missing_archive_and_cursor_is_not_a_first_start(
    damage: Damage,
    lost_for_good: bool,
    recorder: Recorder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kalshi_platform.loading.loader.DRAIN_GIVE_UP_S", 0.3)
    root = recorder.settings.archive_dir
    cursor = recorder.folder / "load" / "parquet.json"
    recorder.run()
    earlier = earlier_of(recorder, tmp_path)
    root.rename(tmp_path / "away")
    root.mkdir()  # what it was mounted on
    damage(cursor, earlier)
    with recorder.started() as start:
        start.record(20)
        start.load()
        waits(start, "is not mounted, or was emptied or replaced. Restore it")
        assert not list(root.iterdir())
        if lost_for_good:
            cursor.unlink()  # what the sentence says to do
        else:
            root.rmdir()
            (tmp_path / "away").rename(root)
        start.wait_for_stores()
    assert recorder.run().trouble is None
    assert_each_record_once(recorder)


def test_a_new_archive_location_gets_the_whole_journal(recorder: Recorder, tmp_path: Path) -> None:
    recorder.run()
    shutil.rmtree(recorder.settings.archive_dir)  # lost for good: what the sentence says to do
    recorder.settings = recorder.settings.model_copy(
        update={"parquet_dir": str(tmp_path / "new place")}
    )
    last = recorder.run()
    assert last.trouble is None
    assert any("is a new location" in note for note in last.notes)
    assert_each_record_once(recorder)


def test_a_dropped_database_stops_loading_until_replaced(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kalshi_platform.loading.loader.DRAIN_GIVE_UP_S", 0.3)
    monkeypatch.setattr("kalshi_platform.loading.loader.REFUSED_RETRY_S", 0.1)
    name = recorder.settings.clickhouse_database
    client = clickhouse.connect(recorder.settings, database=False)
    recorder.run()
    with recorder.started() as start:
        start.record(20)
        start.load()
        client.command(f"DROP DATABASE {name} SYNC")
        prepare(recorder.settings)
        start.record(20)
        waits(start, "does not hold what was loaded there up to record")
        assert recorder.rows("clickhouse", "orderbook_events").is_empty()
    recorder.settings = recorder.settings.model_copy(update={"clickhouse_database": f"{name}_new"})
    prepare(recorder.settings)
    last = recorder.run()
    assert last.trouble is None
    assert_each_record_once(recorder)
    client.command(f"DROP DATABASE {name}_new SYNC")


# -- folders of a version without ledgers ------------------------------------------------------------


def make_it_older(recorder: Recorder) -> None:
    """Leave what such a version left: an identity without epochs, bare cursors, no records in the stores."""
    identity = json.loads((recorder.folder / "journal.json").read_text())
    (recorder.folder / "journal.json").write_text(json.dumps({"format": 1, "id": identity["id"]}))
    for kind in KINDS:
        path = recorder.folder / "load" / f"{kind}.json"
        kept = json.loads(path.read_text())
        bare = {k: kept[k] for k in ("committed", "planned", "state_at", "state_file")}
        path.write_text(json.dumps(bare))
    shutil.rmtree(recorder.settings.archive_dir / "recorders")
    (recorder.settings.archive_dir / "archive.json").unlink()
    clickhouse.connect(recorder.settings).command("TRUNCATE TABLE recorders")


def test_a_folder_without_ledgers_is_upgraded_once(recorder: Recorder) -> None:
    recorder.run()
    recorder.run()
    make_it_older(recorder)
    for _ in range(2):
        assert recorder.run().trouble is None
    assert_each_record_once(recorder)


def test_a_lost_cursor_without_ledgers_is_an_error(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kalshi_platform.loading.loader.DRAIN_GIVE_UP_S", 0.3)
    recorder.run()
    make_it_older(recorder)
    load = recorder.folder / "load"
    shutil.copytree(load, tmp_path / "backup")
    shutil.rmtree(load)
    with recorder.started() as start:
        start.record(20)
        start.load()
        assert "it is not known up to which" in str(start.trouble)
    shutil.rmtree(load, ignore_errors=True)
    shutil.copytree(tmp_path / "backup", load)
    assert recorder.run().trouble is None
    assert_each_record_once(recorder)
