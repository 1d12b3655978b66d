"""Foreign names in the archive are ignored, listed, and never changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.archive import (
    LocalArchive,
    compaction,
    hour_path,
    hours,
    part_name,
    part_range,
)
from kalshi_platform.archive.layout import day_of_name, hour_of_path, is_data
from kalshi_platform.errors import StoreRefused
from kalshi_platform.schema import DATASETS, ORDERBOOK_EVENTS
from kalshi_platform.utc_hours import HOUR
from kalshi_platform_tests import foreign

EVENTS = ORDERBOOK_EVENTS.name
FIRST = datetime(2026, 11, 20, 14, tzinfo=UTC)


def record(archive: LocalArchive, hour: datetime = FIRST) -> None:
    schema = ORDERBOOK_EVENTS.arrow
    archive.write(EVENTS, hour, part_name(0, 0, 1), [schema.empty_table()], schema)


@given(st.text(st.characters(codec=None), max_size=40))
def test_any_file_name_is_classified(name: str) -> None:
    for text in (name, f"date={name}", f"date=2026-11-28/hour={name}", f"{name}/hour=07"):
        hour = hour_of_path(text)
        assert hour is None or hour_path(EVENTS, hour).endswith(text.rpartition("date=")[2])
        day_of_name(text)
        if (found := part_range(text)) is not None:
            assert text.startswith(f"part-{found[0]}-") or text.startswith("part-0")
        is_data(text)


@given(st.integers(0, 24 * 365 * 200))
def test_every_hour_is_parsed_from_its_path(number: int) -> None:
    hour = datetime(1970, 1, 1, tzinfo=UTC) + number * HOUR
    assert hour_of_path(hour_path(EVENTS, hour)) == hour
    assert day_of_name(f"date={hour:%Y-%m-%d}") == hour.date()


def test_foreign_names_change_nothing_and_are_listed(
    tmp_path: Path,
) -> None:
    archive = LocalArchive(tmp_path)
    record(archive)
    day = tmp_path / EVENTS / f"date={FIRST:%Y-%m-%d}"
    put = [foreign.put(folder) for folder in (tmp_path, tmp_path / EVENTS, day)]
    assert archive.hours(EVENTS) == [FIRST]
    assert archive.first_day() == FIRST.date()
    assert list(archive.listing(EVENTS)) == [FIRST]
    assert list(archive.listing(EVENTS, FIRST, FIRST + HOUR)) == [FIRST]
    assert hours.unsealed(archive, FIRST, FIRST + HOUR) == [FIRST]
    assert len(archive.files(EVENTS, FIRST)) == 1
    archive.sweep(0)
    named = set(archive.foreign())
    for folder, names in zip(("", f"{EVENTS}/", f"{EVENTS}/{day.name}/"), put, strict=True):
        assert {f"{folder}{name}" for name in names} <= named
    assert len(named) == sum(map(len, put)), "what is ours is not named"


def test_foreign_files_are_not_sealed_and_block_compaction(
    tmp_path: Path,
) -> None:
    archive = LocalArchive(tmp_path)
    record(archive)
    folder = archive.folder(EVENTS, FIRST)
    (folder / "copy.parquet").write_bytes(b"no Parquet")
    report = hours.seal(archive, FIRST)
    assert [(it.dataset, it.files) for it in report.datasets] == [(EVENTS, 1)]
    with archive.compacting(), pytest.raises(StoreRefused, match=r"copy\.parquet.*Move them out"):
        list(compaction.compact_hour(archive, FIRST))
    assert f"{hour_path(EVENTS, FIRST)}/copy.parquet" in set(archive.foreign())
    (folder / "copy.parquet").unlink()


def test_a_users_files_in_an_hour_survive_compaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "LINGER_S", 0.0)
    archive = LocalArchive(tmp_path)
    record(archive)
    hours.seal(archive, FIRST)
    folder = archive.folder(EVENTS, FIRST)
    (folder / "notes.txt").write_text("mine")
    (folder / "more").mkdir()
    (folder / "more" / "notes.txt").write_text("mine, too")
    with archive.compacting():
        assert list(compaction.compact_hour(archive, FIRST))
    archive.sweep(0)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "more" / "notes.txt").read_text() == "mine, too"
    assert hours.is_compacted([file.name for file in archive.files(EVENTS, FIRST)])


def test_an_unreadable_day_is_an_error_not_an_empty_day() -> None:
    with foreign.open_folder() as root:
        archive = LocalArchive(root)
        record(archive)
        later = FIRST + timedelta(days=1)
        with foreign.closed_to_us(root / EVENTS / f"date={FIRST:%Y-%m-%d}"):
            assert archive.first_day() == FIRST.date()
            with pytest.raises(StoreRefused, match="cannot be read"):
                archive.hours(EVENTS)
            assert archive.listing(EVENTS, later, later) == {}


LOAD = """
import json
from kalshi_platform.definitions import defs
from kalshi_platform.orchestration.metadata import HOURS
defs.get_repository_def().load_all_definitions()
print(json.dumps([HOURS.start.isoformat(), len(HOURS.get_partition_keys())]))
"""


@pytest.mark.parametrize("days", [["2026-11-20"], ["0001-01-01", "9999-12-31"], ["9999-12-31"]])
def test_the_code_location_loads_despite_foreign_files(tmp_path: Path, days: list[str]) -> None:
    archive = tmp_path / "data" / "parquet"
    for dataset in DATASETS:
        (archive / dataset).mkdir(parents=True)
    for day in days:
        (archive / EVENTS / f"date={day}" / "hour=07").mkdir(parents=True)
    for folder in (archive, archive / EVENTS, tmp_path / "data"):
        foreign.put(folder)
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD],
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "KALSHI_DATA_DIR": str(tmp_path / "data"),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    start, partitions = json.loads(loaded.stdout)
    begins = date.fromisoformat(start[:10])
    assert date(2018, 1, 1) <= begins <= datetime.now(UTC).date()
    assert 0 < partitions < 200_000
