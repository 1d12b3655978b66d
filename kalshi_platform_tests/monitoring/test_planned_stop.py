"""A stop that the platform asked for is told from one that it did not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kalshi_platform.monitoring import planned_stop
from kalshi_platform.monitoring.planned_stop import KEPT, LATE_S, SIZE, begin, note, planned


def test_only_who_was_there_when_it_was_asked_for_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert planned(tmp_path, 100.0, 200.0)  # nobody notes stops here
    begin(tmp_path)
    assert not planned(tmp_path, 100.0, 200.0)
    monkeypatch.setattr(time, "time", lambda: 150.0)
    note(tmp_path)
    begin(tmp_path)  # the next start
    assert planned(tmp_path, 100.0, 200.0)
    assert planned(tmp_path, 100.0, 150.0 - LATE_S)
    assert not planned(tmp_path, 100.0, 149.0 - LATE_S)  # it had ended before
    assert not planned(tmp_path, 151.0, 200.0)  # it began afterwards


def test_the_last_stops_are_remembered_in_a_file_that_never_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(100, 100 + 3 * KEPT):
        monkeypatch.setattr(time, "time", lambda at=at: at + 0.123456789)
        note(tmp_path)
        assert (tmp_path / "checks" / "planned_stops.json").stat().st_size == SIZE
    assert planned(tmp_path, 100.0 + 2 * KEPT, 100.0 + 2 * KEPT)
    assert not planned(tmp_path, 0.0, 100.0 + KEPT - LATE_S)


@pytest.mark.parametrize("damaged", [b"", b"[1.0", b"{}", b"5", b'["x"]'])
def test_a_damaged_note_excuses_nobody_and_is_mended_by_the_next(
    tmp_path: Path, damaged: bytes
) -> None:
    begin(tmp_path)
    (tmp_path / "checks" / "planned_stops.json").write_bytes(damaged)
    assert not planned(tmp_path, 0.0, 1e12)
    note(tmp_path)
    assert planned(tmp_path, 0.0, 1e12)
    assert not planned_stop.asked_here.is_set()
