"""The saved book state on disk, written by two loaders at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import msgspec
import pyarrow as pa
import pytest

from kalshi_platform.exchange.columnar import decode
from kalshi_platform.loading import state_files
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.rows import build_rows
from kalshi_platform_tests import wire


def test_two_loaders_may_save_the_same_state_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "2026-11-23T02-000000000000007.state"
    both_have_written = Barrier(2, timeout=60)
    replace = Path.replace

    def replace_when_both_have_written(self: Path, target: Path) -> Path:
        both_have_written.wait()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_when_both_have_written)
    with ThreadPoolExecutor(2) as loads:
        for saved in [loads.submit(state_files.save, BookState(), path) for _ in range(2)]:
            saved.result()
    assert state_files.load(path).n == BookState().n
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_state_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    before = some_state()
    state_files.save(before, tmp_path / "kept.state")
    after = state_files.load(tmp_path / "kept.state")
    assert (after.n, after.version, after.connections) == (
        before.n,
        before.version,
        before.connections,
    )
    assert after.books == before.books
    assert after.levels.equals(before.levels)
    assert dict(after.numbers) == dict(before.numbers)


def test_a_state_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """In that version each level has its connection and its market."""
    before = some_state()
    head = {
        "n": before.n,
        "version": before.version,
        "connections": before.connections,
        "books": before.books,
    }
    table = before.levels.to_arrow()
    with pa.OSFile(str(tmp_path / "old.state"), "wb") as file:
        metadata = {"state": msgspec.json.encode(head)}
        with pa.ipc.new_file(file, table.schema.with_metadata(metadata)) as writer:
            writer.write_table(table)
    after = state_files.load(tmp_path / "old.state")
    assert (after.n, after.version, after.books) == (before.n, before.version, before.books)
    assert after.levels.sort(after.levels.columns).equals(before.levels.sort(before.levels.columns))


def some_state() -> BookState:
    """Of some books, one of which is empty."""
    conn, other = wire.conn_id(1), wire.conn_id(2)
    records: list[wire.Record] = [
        wire.connected(conn, wire.NOON_NS),
        (wire.NOON_NS, conn, 2, wire.snapshot("B-2", 1, {100: 5, 9_900: 7}, {4_800: 1})),
        (wire.NOON_NS, conn, 2, wire.snapshot("A-1", 2, {}, {})),
        (wire.NOON_NS, conn, 1, wire.delta("B-2", 3, "no", 5_000, 12)),
        (wire.NOON_NS, other, 1, wire.delta("C-3", 4, "no", 5_000, 12)),
    ]
    _, after = build_rows(decode(wire.blocks(records)), BookState())
    assert after.levels.height == 5
    return after
