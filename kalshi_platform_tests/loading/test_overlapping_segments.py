"""Two recorders wrote to one journal: a gap row names the records of either that are not loaded."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from pathlib import Path

import pytest

from kalshi_platform.archive import LocalArchive
from kalshi_platform.journal import reader
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.reader import JournalError
from kalshi_platform.journal.writer import Writer
from kalshi_platform.loading.loader import Loader
from kalshi_platform.loading.sinks import ParquetSink
from kalshi_platform_tests import wire
from kalshi_platform_tests.journal.test_overlapping_segments import apply_remedy
from kalshi_platform_tests.loading.test_loader import SMALL, archived, load_all

SHARED, OURS, THEIRS = 20, 60, 30


def connection(number: int, deltas: int) -> list[wire.Record]:
    """A recorder's records: its start, a connection with one book, and deltas of a second each."""
    conn, at = wire.conn_id(number), wire.NOON_NS + number * 3600 * wire.SECOND // 10
    snapshot = wire.snapshot("A-1", 1, {4_800: 1_000}, {})
    records = [wire.started(at), wire.connected(conn, at), (at, conn, int(Kind.SNAPSHOT), snapshot)]
    for n in range(deltas):
        frame = wire.delta("A-1", n + 2, "yes", 4_800, 1)
        records.append((at + (n + 1) * wire.SECOND, conn, int(Kind.DELTA), frame))
    return records


def write(writer: Writer, records: list[wire.Record]) -> None:
    for record in records:
        writer.append(*record)
    writer.submit()
    assert writer.wait_durable(writer.next_n, 60)


def overlapping(folder: Path, archive: Path, loaded: int) -> None:
    """The first recorder's load has come to record `loaded`, and the second one's segment lies there."""
    records = connection(1, SHARED + OURS - 3)
    writer = Writer(folder)
    write(writer, records[:SHARED])
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    second = Writer(other)
    write(second, connection(2, THEIRS - 3))
    second.close()
    write(writer, records[SHARED:loaded])
    if loaded > SHARED:
        load_all(load(folder, archive, writer))
    write(writer, records[max(loaded, SHARED) :])
    writer.close()
    shutil.copy(reader.segment_path(other, SHARED), folder)


def load(folder: Path, archive: Path, writer: Writer) -> Loader:
    return Loader(folder, writer, ParquetSink(LocalArchive(archive), 0, lambda _: None), SMALL)


@pytest.mark.parametrize("loaded", [0, SHARED + 10])
def test_after_the_overlap_remedy_every_record_has_a_row(loaded: int, tmp_path: Path) -> None:
    """`loaded`: so far the first one's load had come when the second one's records came beside."""
    folder, archive = tmp_path / "journal", tmp_path / "archive"
    overlapping(folder, archive, loaded)
    after = Writer(folder, reached=loaded)
    stuck = load(folder, archive, after)
    stuck.start()
    deadline = time.monotonic() + 60
    while stuck.failure is None:
        assert time.monotonic() < deadline, "the load does not stop"
        time.sleep(0.01)
    assert isinstance(stuck.failure, JournalError)
    stuck.drain()
    stuck.join(1.0)
    apply_remedy(folder, stuck.failure)
    load_all(load(folder, archive, after))
    after.close()

    rows = archived(archive, "orderbook_events").select("conn_id", "seq", "price").rows()
    assert len(set(rows)) == len(rows)  # none is stored twice
    stored = {(conn, seq) for conn, seq, _ in rows}
    events = archived(archive, "stream_events").select("kind", "detail").rows()
    gaps = [json.loads(detail) for kind, detail in events if kind == "gap"]
    whole = [gap for gap in gaps if gap.get("channel") == "journal" and "record" in gap]
    named = {n for gap in whole for n in range(gap["record"], gap["until_record"])}
    for first_n, number, count in ((0, 1, SHARED + OURS), (SHARED, 2, THEIRS)):
        conn = str(uuid.UUID(bytes=wire.conn_id(number)))
        for n in range(2, count):  # of the snapshot and the deltas; their numbers begin with 1
            assert (conn, n - 1) in stored or first_n + n in named, (conn, n)
    assert [(gap["segment"], gap["instead"]) for gap in gaps if "instead" in gap] == [
        (f"{0:020d}.arrows.damaged", f"{SHARED:020d}.arrows")
    ]
