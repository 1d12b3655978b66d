"""A slow disk makes batches larger, not latency longer; records not written before the end are counted."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kalshi_platform.journal import reader
from kalshi_platform.journal.reader import JournalError
from kalshi_platform.journal.writer import UNDURABLE_MS, Writer
from kalshi_platform_tests.journal import slow_disk
from kalshi_platform_tests.journal.faulty_disk import FaultyDisk
from kalshi_platform_tests.journal.test_reader import CONN, frames
from kalshi_platform_tests.recorder import steady_feed
from kalshi_platform_tests.recorder.steady_feed import RECORDS, oldest_ms

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def slow() -> FaultyDisk:
    """A disk whose every sync takes 40 ms."""
    return FaultyDisk({}, delay=lambda: time.sleep(0.04))


def test_10_000_frames_per_second_are_durable_in_1_s_at_40_ms_sync(
    slow: FaultyDisk, tmp_path: Path
) -> None:
    writer = Writer(tmp_path, disk=slow.disk)
    assert oldest_ms(writer) < 1_000
    assert writer.durable.n == RECORDS
    writer.close()
    blocks = list(reader.record_ranges(tmp_path, reader.oldest_offset(tmp_path)))
    assert sum(block.rows for block in blocks) == RECORDS
    assert len(blocks) < 150  # of 300 that were handed over


def test_a_process_with_40_ms_fdatasync_keeps_up(tmp_path: Path) -> None:
    slowed = slow_disk.environment(tmp_path)
    if slowed is None:
        pytest.skip("no C compiler")
    took = subprocess.run(
        [sys.executable, "-m", steady_feed.__name__, str(tmp_path / "journal")],
        cwd=ROOT,
        env={**os.environ, **slowed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert 40 <= int(took.stdout) < 1_000
    assert len(frames(tmp_path / "journal")) == RECORDS


def test_one_write_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kalshi_platform.journal.writer.BATCH_RECORDS", 100)
    monkeypatch.setattr("kalshi_platform.journal.writer.BATCH_BYTES", 20_000)
    go_on = threading.Event()
    go_on.set()
    writer = Writer(tmp_path, disk=FaultyDisk({}, delay=go_on.wait).disk)
    go_on.clear()
    for n in range(1_000):
        writer.append(n, CONN, 1, bytes(1_000 if n >= 500 else 1))
        if n % 7 == 6:
            writer.submit()
    go_on.set()
    writer.close()
    blocks = list(reader.record_ranges(tmp_path, reader.oldest_offset(tmp_path)))
    assert len(blocks) < 50  # of 143 that were handed over
    assert max(block.rows for block in blocks) <= 100
    assert max(sum(map(len, block.batch["frame"].to_pylist())) for block in blocks) <= 20_000
    assert sum(block.rows for block in blocks) == 1_000


def test_a_record_undurable_for_too_long_is_a_reported_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    go_on = threading.Event()
    go_on.set()
    writer = Writer(tmp_path, disk=FaultyDisk({}, delay=go_on.wait).disk)
    assert writer.oldest_undurable_ms == 0
    assert writer.trouble is None
    go_on.clear()
    writer.append(0, CONN, 1, b"not even handed over")
    time.sleep(0.05)
    assert writer.oldest_undurable_ms >= 50
    writer.submit()
    writer.append(1, CONN, 1, b"younger")
    time.sleep(0.05)
    assert writer.oldest_undurable_ms >= 100
    assert writer.trouble is None
    monkeypatch.setattr("kalshi_platform.journal.writer.UNDURABLE_MS", 20)
    assert "is slow: frames received 0.1 s ago are not durable yet" in str(writer.trouble)
    go_on.set()
    assert writer.wait_durable(1, 60)
    writer.submit()
    assert writer.wait_durable(2, 60)
    assert writer.oldest_undurable_ms == 0
    assert writer.trouble is None
    writer.close()
    assert UNDURABLE_MS <= 2_000


def test_close_reports_lost_frames_and_bytes(tmp_path: Path) -> None:
    faulty = FaultyDisk({("pwrite", n): errno.ENOSPC for n in range(2, 10_000)})
    writer = Writer(tmp_path, disk=faulty.disk)
    writer.append(0, CONN, 1, b"durable")
    writer.submit()
    assert writer.wait_durable(1, 60)
    writer.append(1, CONN, 1, b"12345")
    writer.submit()
    writer.append(2, CONN, 2, b"67")
    writer.note("gap", {})
    with pytest.raises(
        JournalError, match=r"^2 frames \(7 bytes\) and 1 notes could not be written"
    ):
        writer.close(timeout_s=0.1)


def test_a_failed_writer_reports_the_fault_and_the_loss(tmp_path: Path) -> None:
    def fault() -> None:
        raise RuntimeError("a bug")

    faulty = FaultyDisk({})
    writer = Writer(tmp_path, disk=faulty.disk)
    faulty.delay = fault
    writer.append(0, CONN, 1, b"12345")
    writer.submit()
    while writer.failure is None:
        time.sleep(0.002)
    with pytest.raises(JournalError, match=r"^1 frames \(5 bytes\).* a bug"):
        writer.close()
