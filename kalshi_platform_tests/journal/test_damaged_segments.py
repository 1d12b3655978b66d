"""A set-aside segment yields every intact batch and names the lost ranges."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalshi_platform.journal import reader
from kalshi_platform.journal.reader import (
    JournalError,
    JournalRange,
    LogOffset,
    LostRange,
    RecordRange,
)
from kalshi_platform.journal.writer import SEGMENT_BYTES, Writer
from kalshi_platform_tests.journal.test_reader import frames, write

Content = list[bytes | None]
"""The frame of every record, None where it is lost."""


def content(parts: list[JournalRange], first_n: int) -> Content:
    """The frames read, None for lost ones; asserts that record numbers are consecutive."""
    found: Content = []
    for part in parts:
        assert part.first_n == first_n + len(found), "a record is neither present nor named as lost"
        if isinstance(part, LostRange):
            found += [None] * part.rows
        else:
            found += part.batch["frame"].to_pylist()
        assert part.end.n == first_n + len(found)
    return found


def read_all(folder: Path) -> list[JournalRange]:
    return list(reader.read(folder, reader.oldest_offset(folder)))


def set_aside_with(folder: Path, first_n: int, data: bytes) -> None:
    path = reader.segment_path(folder, first_n)
    path.write_bytes(data)
    path.rename(reader.set_aside(path))


def without_the_third_batch(folder: Path) -> bytes:
    """The first segment with its third batch (seven records) zeroed."""
    data = reader.segment_path(folder, 0).read_bytes()
    third = list(reader.record_ranges(folder, LogOffset(0, 0, 0), LogOffset(0, len(data), 0)))[2]
    assert third.rows == 7
    begin, end = third.begins[0].offset, third.end.offset
    return data[:begin] + bytes(end - begin) + data[end:]


def three_segments(folder: Path, counts: tuple[int, int, int], batch: int) -> list[RecordRange]:
    """Write three segments; return the ranges of the middle one."""
    first, middle, _ = counts
    write(folder, first, batch=batch)
    write(folder, middle, first=first, batch=batch)
    write(folder, counts[2], first=first + middle, batch=batch)
    start, limit = LogOffset(first, 0, first), LogOffset(first, 1 << 40, 0)
    return list(reader.record_ranges(folder, start, limit))


@given(
    counts=st.tuples(st.integers(1, 20), st.integers(1, 60), st.integers(1, 20)),
    batch=st.integers(1, 9),
    damage=st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 2_000),
        st.sampled_from(["zeros", "ones", "cut off", "taken out"]),
    ),
)
@settings(max_examples=50, deadline=None)
def test_only_damaged_batches_are_lost(
    counts: tuple[int, int, int],
    batch: int,
    damage: tuple[float, int, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    ranges = three_segments(folder, counts, batch)
    whole = reader.segment_path(folder, counts[0]).read_bytes()
    where, length, how = damage
    at = int(where * len(whole))
    until = len(whole) if how == "cut off" else min(at + length, len(whole))
    patch = {"zeros": bytes(until - at), "ones": b"\xff" * (until - at)}.get(how, b"")
    set_aside_with(folder, counts[0], whole[:at] + patch + whole[until:])
    total = sum(counts)
    found = content(read_all(folder), 0)
    assert len(found) == total
    assert all(frame in (None, b"frame %d" % n) for n, frame in enumerate(found))
    touched = [b for b in ranges if b.begins[0].offset < until and at < b.end.offset]
    may_be_lost = {n for block in touched for n in range(block.first_n, block.end.n)}
    assert {n for n, frame in enumerate(found) if frame is None} <= may_be_lost


@given(batch=st.integers(1, 9), data=st.data())
@settings(max_examples=25, deadline=None)
def test_lost_ranges_do_not_depend_on_the_start_offset(
    batch: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    three_segments(folder, (20, 60, 20), batch)
    damaged = bytearray(reader.segment_path(folder, 20).read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[at] ^= 0x5A
    set_aside_with(folder, 20, bytes(damaged))
    found = read_all(folder)
    expected = content(found, 0)
    for n in range(0, 100, 3):
        part = next(p for p in found if p.first_n <= n < p.first_n + p.rows)
        inside = n > part.first_n
        start = part.cut(n - part.first_n)[0].end if inside else reader.offset_of(folder, n)
        assert content(list(reader.read(folder, start)), n) == expected[n:]


@pytest.mark.parametrize("follows", [True, False])
def test_a_changed_byte_never_yields_a_record_that_was_not_written(
    tmp_path: Path, follows: bool
) -> None:
    """The checksum does not cover a batch's record number: a changed number must not be trusted."""
    write(tmp_path, 30, batch=7)
    if follows:
        write(tmp_path, 5, first=30)
    expected = [b"frame %d" % n for n in range(35 if follows else 30)]
    whole = reader.segment_path(tmp_path, 0).read_bytes()
    second = list(reader.record_ranges(tmp_path, LogOffset(0, 0, 0)))[1]
    set_aside_with(tmp_path, 0, whole)
    path = reader.segment_path(tmp_path, 0)
    for at in range(second.begins[0].offset, second.end.offset):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        found = content(read_all(tmp_path), 0)
        lost = [n for n, frame in enumerate(found) if frame is None]
        assert lost in ([], list(range(second.first_n, second.end.n)))
        assert all(f in (None, e) for f, e in zip(found, expected, strict=True))


def test_an_empty_damaged_file_stands_for_a_missing_segment(tmp_path: Path) -> None:
    three_segments(tmp_path, (10, 20, 10), 7)
    path = reader.segment_path(tmp_path, 10)
    path.unlink()
    with pytest.raises(JournalError, match=r"cannot be read|is gone"):
        frames(tmp_path)
    with pytest.raises(JournalError, match=rf"is gone.*{reader.set_aside(path).name}"):
        frames(tmp_path, LogOffset(10, 0, 12))
    reader.set_aside(path).touch()
    expected: Content = [b"frame %d" % n for n in range(40)]
    expected[10:30] = [None] * 20
    assert content(read_all(tmp_path), 0) == expected
    [lost] = [part for part in read_all(tmp_path) if isinstance(part, LostRange)]
    assert lost.until_ns == 30  # receive time of the next record
    with pytest.raises(JournalError, match="lost its records 10 to 29"):
        frames(tmp_path)


def test_damage_is_an_error_until_the_segment_is_set_aside(
    tmp_path: Path,
) -> None:
    write(tmp_path, 40)
    write(tmp_path, 5, first=40)
    path = reader.segment_path(tmp_path, 0)
    path.write_bytes(without_the_third_batch(tmp_path))
    with pytest.raises(
        JournalError, match=rf"is good up to record 7;.*rename it to {path.name}\.damaged"
    ):
        read_all(tmp_path)
    path.rename(reader.set_aside(path))
    assert content(read_all(tmp_path), 0).count(None) == 7
    assert reader.prune(tmp_path, 40, older_than_s=0) == [reader.set_aside(path)]


@pytest.mark.parametrize("aside", [True, False])
@pytest.mark.parametrize("damage", ["in the middle", "cut short", "empty"])
def test_a_writer_after_damage_reuses_no_record_number(
    tmp_path: Path, damage: str, aside: bool
) -> None:
    write(tmp_path, 40)
    path = reader.segment_path(tmp_path, 0)
    data = path.read_bytes()
    if damage == "in the middle":
        data = without_the_third_batch(tmp_path)
    left = {"cut short": len(data) // 2, "empty": 0}.get(damage, len(data))
    path.write_bytes(data[:left])
    if aside:
        path.rename(reader.set_aside(path))
    writer = Writer(tmp_path, reached=38)  # a loader's cursor had reached this number
    assert (writer.damage is not None) == (damage == "in the middle" and not aside)
    first_n = writer.next_n
    writer.append(99, bytes(16), 1, b"after")
    writer.close()
    if damage == "in the middle":
        assert first_n == 40  # the segment's end is readable
    else:
        assert first_n == (2 * SEGMENT_BYTES if aside else 38)
    if not aside:
        with pytest.raises(JournalError, match=r"corrupt|cannot be read"):
            read_all(tmp_path)
        path.rename(reader.set_aside(path))
    found = read_all(tmp_path)
    ranges = [part for part in found if isinstance(part, RecordRange)]
    assert ranges[-1].batch["frame"].to_pylist() == [b"after"]
    kept = [frame for records in ranges for frame in records.batch["frame"].to_pylist()][:-1]
    assert len(kept) == {"in the middle": 33, "cut short": len(kept), "empty": 0}[damage]
    assert kept == [f for f in (b"frame %d" % n for n in range(40)) if f in set(kept)]
    assert sum(part.rows for part in found) == first_n + 1
