"""The journal keeps every record, and its errors name the last good one."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalshi_platform.journal import reader
from kalshi_platform.journal.reader import JournalError, LogOffset
from kalshi_platform.journal.writer import Writer

CONN = bytes(range(16))


def frames(folder: Path, start: LogOffset | None = None) -> list[bytes]:
    ranges = reader.record_ranges(folder, start or reader.oldest_offset(folder))
    return [frame for records in ranges for frame in records.batch.column("frame").to_pylist()]


def write(folder: Path, count: int, *, first: int = 0, batch: int = 7) -> None:
    """Write records whose frames contain their numbers; `n % batch == 0` ends a batch."""
    writer = Writer(folder)
    for n in range(first, first + count):
        writer.append(n, CONN, 1, b"frame %d" % n)
        if n % batch == 0:
            writer.submit()
            assert writer.wait_durable(n + 1, 60)  # otherwise waiting batches are joined into one
    writer.close()


def test_records_are_read_back_in_order_across_restarts(tmp_path: Path) -> None:
    for opening in range(4):
        write(tmp_path, 50, first=50 * opening)
    assert frames(tmp_path) == [b"frame %d" % n for n in range(200)]
    assert reader.segments(tmp_path) == [0, 50, 100, 150]


def test_any_arrow_reader_opens_a_segment(tmp_path: Path) -> None:
    write(tmp_path, 20)
    table = pa.ipc.open_stream(reader.segment_path(tmp_path, 0)).read_all()
    assert table.num_rows == 20
    assert table.column("recv_ns").to_pylist() == list(range(20))


@given(cut=st.floats(0, 1), count=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_an_unfinished_end_loses_only_its_incomplete_batch(
    cut: float, count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    write(folder, count)
    path = reader.segment_path(folder, 0)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    kept = frames(folder)
    assert kept == [b"frame %d" % n for n in range(len(kept))]
    writer = Writer(folder)
    assert writer.next_n == len(kept)
    writer.append(0, CONN, 1, b"after")
    writer.close()
    assert frames(folder) == [*kept, b"after"]
    torn_bytes = [p for p in folder.iterdir() if ".torn-" in p.name]
    # The unreadable bytes are kept, in their segment or in a renamed file.
    assert path.stat().st_size >= int(len(data) * cut) or torn_bytes


def test_an_unfinished_end_is_reported_with_its_last_good_record(tmp_path: Path) -> None:
    write(tmp_path, 50)
    path = reader.segment_path(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:-40])
    writer = Writer(tmp_path)
    assert writer.unfinished_end is not None
    assert writer.unfinished_end.segment == path.name
    assert writer.unfinished_end.good_up_to_n == writer.next_n - 1
    assert writer.unfinished_end.bytes_left > 0
    writer.close()


def test_a_flipped_bit_is_an_error_and_deletes_nothing(tmp_path: Path) -> None:
    write(tmp_path, 500, batch=50)
    write(tmp_path, 10, first=500)
    path = reader.segment_path(tmp_path, 0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))
    with pytest.raises(JournalError, match=r"corrupt at byte \d+ .*good up to record \d+"):
        frames(tmp_path)
    assert path.read_bytes() == bytes(data)


def test_a_truncated_earlier_segment_is_an_error_with_a_count(
    tmp_path: Path,
) -> None:
    write(tmp_path, 50, batch=5)
    write(tmp_path, 10, first=50)
    path = reader.segment_path(tmp_path, 0)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(JournalError, match=r"next segment begins at 50: \d+ records"):
        frames(tmp_path)


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    with pytest.raises(JournalError, match="Another streamer"):
        Writer(tmp_path)
    writer.close()
    Writer(tmp_path).close()


def test_reading_starts_at_any_record(tmp_path: Path) -> None:
    write(tmp_path, 40)
    write(tmp_path, 40, first=40)
    for n in (0, 1, 6, 7, 8, 39, 40, 41, 79):
        segment = 40 if n >= 40 else 0
        assert frames(tmp_path, LogOffset(segment, 0, n)) == [b"frame %d" % i for i in range(n, 80)]


@given(
    openings=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    batch=st.integers(1, 12),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_range_over_segments_can_be_cut_at_any_record(
    openings: list[int],
    batch: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    total = 0
    for count in openings:
        write(folder, count, first=total, batch=batch)
        total += count
    edges = st.sets(st.integers(1, total - 1)) if total > 1 else st.just(set[int]())
    rest = reader.concatenate(list(reader.record_ranges(folder, reader.oldest_offset(folder))))
    for edge in sorted(data.draw(edges)):
        head, rest = rest.cut(edge - rest.first_n)
        assert head.first_n + head.rows == edge == rest.first_n == head.end.n
        # Earlier segments may have been pruned before a reader starts from here.
        assert head.end.segment == reader.offset_of(folder, edge).segment
        assert frames(folder, head.end) == [b"frame %d" % n for n in range(edge, total)]
    assert rest.end.n == total


def test_an_offset_naming_an_earlier_segment_reads_from_its_record(
    tmp_path: Path,
) -> None:
    for opening in range(4):
        write(tmp_path, 20, first=20 * opening)
    for n in (20, 25, 40, 59, 79):
        expected = [b"frame %d" % i for i in range(n, 80)]
        assert frames(tmp_path, LogOffset(0, 300, n)) == expected
    reader.segment_path(tmp_path, 0).unlink()
    assert frames(tmp_path, LogOffset(0, 300, 25)) == [b"frame %d" % i for i in range(25, 80)]


KILLED = """
import sys, time
from pathlib import Path
from kalshi_platform.journal.writer import Writer
writer = Writer(Path(sys.argv[1]))
n = writer.next_n
while True:
    writer.append(time.time_ns(), bytes(16), 1, b"frame %d" % n)
    n += 1
    if n % 50 == 0:
        writer.submit()
        if writer.wait_durable(n, 60):
            print(n, flush=True)
"""


def test_kill_9_loses_no_durable_record(tmp_path: Path) -> None:
    for attempt in range(5):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        first = child.stdout.readline()
        time.sleep(0.05 + 0.037 * attempt)
        child.send_signal(signal.SIGKILL)
        durable = int((first + child.stdout.read()).split()[-1])  # there may be no second line
        child.wait()
        found = frames(tmp_path)
        assert len(found) >= durable
        assert found == [b"frame %d" % n for n in range(len(found))]


def test_a_full_disk_is_reported_and_loses_nothing(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # A file-size limit makes write() fail part-way, as a full disk does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        for n in range(2_000):
            writer.append(n, CONN, 1, os.urandom(64))
        writer.submit()
        deadline = time.monotonic() + 60
        while writer.blocked is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert writer.blocked is not None
        assert str(tmp_path) in writer.blocked
        assert writer.durable.n == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert writer.wait_durable(2_000, 60)
    writer.close()
    assert len(frames(tmp_path)) == 2_000


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="KALSHI_DATA_DIR"):
        Writer(tmp_path / "file" / "journal")


def test_a_read_only_disk_is_reported_and_stays_readable(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a disk")
    try:
        write(disk / "journal", 30)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(JournalError, match=r"Read-only.*KALSHI_DATA_DIR"):
            Writer(disk / "journal")
        assert len(frames(disk / "journal")) == 30
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_pruning_keeps_needed_segments(tmp_path: Path) -> None:
    for opening in range(4):
        write(tmp_path, 10, first=10 * opening)
    assert reader.prune(tmp_path, 25, older_than_s=3600) == []
    removed = reader.prune(tmp_path, 25, older_than_s=0)
    assert [p.stem for p in removed] == [f"{0:020d}", f"{10:020d}"]
    assert frames(tmp_path)[0] == b"frame 20"


def test_a_damaged_length_is_an_error_not_fewer_records(tmp_path: Path) -> None:
    """Change each byte of a segment's first batch: reading returns all records or raises, never fewer."""
    write(tmp_path, 21)
    path = reader.segment_path(tmp_path, 0)
    whole = path.read_bytes()
    first, *_ = reader.record_ranges(tmp_path, reader.oldest_offset(tmp_path))
    durable = LogOffset(0, len(whole), 21)
    for at in range(first.begins[0].offset, first.end.offset):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        try:
            blocks = list(reader.record_ranges(tmp_path, reader.oldest_offset(tmp_path), durable))
        except JournalError as error:
            assert "good up to record" in str(error)
        else:
            kept = [f for block in blocks for f in block.batch.column("frame").to_pylist()]
            assert kept == [b"frame %d" % n for n in range(21)]
