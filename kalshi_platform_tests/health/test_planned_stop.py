"""A stop that the platform asked for is distinguished from one that it did not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from kalshi_platform.health import planned_stop
from kalshi_platform.health.planned_stop import (
    ASKED_S,
    KEPT,
    SIZE,
    TOGETHER_S,
    begin,
    note,
    planned,
)
from kalshi_platform.orchestration.host import code_server
from kalshi_platform.orchestration.streamer import DRAIN_S
from kalshi_platform_tests.small_disk import fill, small_disk


def file_of(data: Path) -> Path:
    return data / "checks" / "planned_stops.json"


def note_at(at: float, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: at)
        note(data)


def test_only_a_run_that_ends_soon_after_a_stop_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not planned(tmp_path, 100.0, 1500.0)  # no stop was noted
    begin(tmp_path)
    assert not planned(tmp_path, 100.0, 1500.0)
    note_at(1500.0, tmp_path, monkeypatch)
    begin(tmp_path)  # the next start
    assert planned(tmp_path, 100.0, 1500.0)
    assert planned(tmp_path, 100.0, 1500.0 + ASKED_S)
    assert not planned(tmp_path, 100.0, 1501.0 + ASKED_S)  # the run went on long after the stop
    assert planned(tmp_path, 100.0, 1500.0 - TOGETHER_S)
    assert not planned(tmp_path, 100.0, 1499.0 - TOGETHER_S)  # the run had ended before
    assert planned(tmp_path, 1500.0 + TOGETHER_S, 1510.0)
    assert not planned(tmp_path, 1501.0 + TOGETHER_S, 1510.0)  # the run was created afterwards


def test_a_run_that_ends_at_the_last_moment_counts_as_stopped() -> None:
    assert code_server.GRACE_S + DRAIN_S + TOGETHER_S < ASKED_S
    infra = Path(__file__).parents[2] / "infra"
    compose = yaml.safe_load((infra / "compose/compose.yaml").read_text())
    assert compose["services"]["code-location"]["stop_grace_period"] == f"{ASKED_S:.0f}s"
    parts = yaml.safe_load_all((infra / "kubernetes/code-location.yaml").read_text())
    pods = [part["spec"]["template"]["spec"] for part in parts if part["kind"] == "StatefulSet"]
    assert [pod["terminationGracePeriodSeconds"] for pod in pods] == [ASKED_S]


def test_the_last_stops_are_kept_in_a_file_of_fixed_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stop is noted by `up` and, a moment later, by the code server."""
    stops = [1e9 + 1000.123456789 * number for number in range(KEPT + 3)]
    for at in stops:
        note_at(at, tmp_path, monkeypatch)
        note_at(at + 1.0, tmp_path, monkeypatch)
        assert file_of(tmp_path).stat().st_size == SIZE
    found = [planned(tmp_path, 0.0, at + 5.0) for at in stops]
    assert found == [False] * 3 + [True] * KEPT


def test_a_clock_that_is_set_back_hides_no_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in (5000.0, 1000.0, 4999.0, 998.0):
        note_at(at, tmp_path, monkeypatch)
        assert planned(tmp_path, 0.0, at + 1.0)


@pytest.mark.parametrize("damaged", [b"", b"[1.0", b"{}", b"5", b'["x"]', b"\0" * SIZE])
def test_a_damaged_file_excuses_no_run_and_is_repaired(tmp_path: Path, damaged: bytes) -> None:
    begin(tmp_path)
    file_of(tmp_path).write_bytes(damaged)
    assert not planned(tmp_path, 0.0, time.time())
    note(tmp_path)
    assert planned(tmp_path, 0.0, time.time())
    assert not planned_stop.asked_here.is_set()


def test_a_file_of_another_size_is_resized_and_keeps_its_stops(tmp_path: Path) -> None:
    file_of(tmp_path).parent.mkdir()
    file_of(tmp_path).write_bytes(b"[1500.0]".ljust(512))  # as an earlier version wrote it
    begin(tmp_path)
    assert file_of(tmp_path).stat().st_size == SIZE
    assert planned(tmp_path, 0.0, 1500.0)


def test_a_full_disk_takes_a_note_and_leaves_no_empty_file(tmp_path: Path) -> None:
    with small_disk(tmp_path, megabytes=1) as disk:
        begin(disk / "begun")
        (disk / "new" / "checks").mkdir(parents=True)
        fill(disk)
        note(disk / "begun")
        assert planned(disk / "begun", 0.0, time.time())
        for write in (begin, note):
            with pytest.raises(OSError, match="No space left"):
                write(disk / "new")
            assert not file_of(disk / "new").exists()
        file_of(disk / "new").touch()  # as an earlier version left it
        with pytest.raises(OSError, match="No space left"):
            begin(disk / "new")
        (disk / "fill").unlink()
        begin(disk / "new")
        assert file_of(disk / "new").stat().st_size == SIZE
