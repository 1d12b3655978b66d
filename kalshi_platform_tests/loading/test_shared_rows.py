"""Rows are built once for all stores: each loader gets the rows that it would have built alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kalshi_platform.exchange.columnar import Decoded
from kalshi_platform.journal import reader
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.reader import LogOffset, RecordRange
from kalshi_platform.journal.writer import Writer
from kalshi_platform.loading import book_state, shared_rows, sorted_levels
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.rows import Rows, build_rows
from kalshi_platform.loading.shared_rows import SharedRows, chunks, until_record
from kalshi_platform_tests import wire
from kalshi_platform_tests.loading.test_loader import PATIENCE_S, journal_of, recording


def follow(
    shared: SharedRows, name: str, at: tuple[LogOffset, BookState], limit: LogOffset, steps: int
) -> tuple[tuple[LogOffset, BookState], list[dict[str, object]]]:
    """Take this many built ranges as one loader; return their event rows."""
    rows: list[dict[str, object]] = []
    for step in shared.steps(name, at[0], at[1], limit):
        rows += step.rows.tables["orderbook_events"].to_pylist()
        at = (step.end, step.state)
        steps -= 1
        if not steps:
            break
    return at, rows


@pytest.mark.parametrize("seed", range(12))
def test_loaders_in_any_order_get_the_same_rows(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across any ends of hours, segments and kept ranges."""
    dice = random.Random(seed)
    monkeypatch.setattr(shared_rows, "CHUNK_ROWS", dice.choice((10, 30, 80)))
    monkeypatch.setattr(shared_rows, "KEPT_STEPS", dice.choice((2, 4, 8)))
    folder = tmp_path / "journal"
    writer = journal_of(folder, recording(600, dice.choice((1.0, 60.0))), dice.randint(1, 40))
    start = (reader.oldest_offset(folder), BookState())
    _, alone = follow(joined(folder, "alone"), "alone", start, writer.durable, -1)
    shared = joined(folder, "hot", "cold")
    at = {"hot": start, "cold": start}
    got: dict[str, list[dict[str, object]]] = {"hot": [], "cold": []}
    while any(position.n < writer.durable.n for position, _ in at.values()):
        name = dice.choice(("hot", "hot", "hot", "cold"))
        at[name], rows = follow(shared, name, at[name], writer.durable, dice.randint(1, 9))
        got[name] += rows
    writer.close()
    assert got["hot"] == alone
    assert got["cold"] == alone


def test_a_loader_at_the_same_offset_reuses_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_rows, "CHUNK_ROWS", 30)
    folder = tmp_path / "journal"
    writer = journal_of(folder, recording(200))
    derived = counted(monkeypatch)
    shared = joined(folder, "hot", "cold")
    at = {name: (reader.oldest_offset(folder), BookState()) for name in ("hot", "cold")}
    while at["cold"][0].n < writer.durable.n:
        for name in ("hot", "cold"):
            at[name], _ = follow(shared, name, at[name], writer.durable, 1)
    writer.close()
    assert len(derived) == len(set(derived))


def test_a_loader_that_was_behind_shares_rows_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_rows, "CHUNK_ROWS", 30)
    folder = tmp_path / "journal"
    writer = Writer(folder)
    records = recording(600)
    derived = counted(monkeypatch)
    shared = joined(folder, "hot", "cold")
    at: dict[str, tuple[LogOffset, BookState]] = {}
    for n, record in enumerate(records):
        writer.append(*record)
        if n % 17:
            continue
        writer.submit()
        assert writer.wait_durable(n + 1, PATIENCE_S)
        behind = n < 300
        for name in ("hot",) if behind else ("cold", "hot"):
            at.setdefault(name, (reader.oldest_offset(folder), BookState()))
            at[name], _ = follow(shared, name, at[name], writer.durable, -1)
    writer.close()
    late = [first_n for first_n in derived if first_n > 400]
    assert len(late) == len(set(late))


@pytest.mark.parametrize("seed", range(20))
def test_chunks_are_bounded_and_complete(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Except for the record that fills one; each can be read again from the end of the one before it."""
    monkeypatch.setattr(shared_rows, "CHUNK_ROWS", 40)
    monkeypatch.setattr(shared_rows, "CHUNK_BYTES", 4_000)
    dice = random.Random(seed)
    conn = wire.conn_id(1)
    records: list[wire.Record] = []
    for seq in range(1, 150):
        ladder = {100 + level: 5 for level in range(dice.choice((0, 1, 30, 200)))}
        frame = wire.snapshot("A-1", seq, ladder, {})
        kind = dice.choice((Kind.SNAPSHOT, Kind.DELTA, Kind.CONTROL))
        if kind is not Kind.SNAPSHOT:
            frame = wire.delta("A-1", seq, "yes", 4_800, 5) + b" " * dice.choice((0, 0, 0, 5_000))
        records.append((wire.NOON_NS + seq, conn, int(kind), frame))
    folder = tmp_path / "journal"
    writer = journal_of(folder, records, dice.randint(1, 3))
    writer.close()
    dropped = dice.choice((0, 7))
    start = reader.oldest_offset(folder)
    found = list(blocks(chunks(reader.read(folder, start), dropped)))
    assert frames_of(found) == [(recv_ns, frame) for recv_ns, _, _, frame in records]
    for chunk in found:
        *others, last = chunk.batch.to_pylist()
        rows, size = (sum(each) for each in zip((0, 0), *map(cost, others), strict=True))
        assert rows + len([it for it in others if it["kind"] == Kind.SNAPSHOT]) * dropped < 40
        assert size < 4_000
        assert cost(last)
    for before in found[:-1]:
        again = next(blocks(chunks(reader.read(folder, before.end), dropped)))
        assert frames_of([again]) == frames_of(found)[before.end.n :][: again.rows]
    until = dice.randint(0, len(records))
    cut = list(blocks(chunks(until_record(until, reader.read(folder, start)), dropped)))
    assert frames_of(cut) == frames_of(found)[:until]


def cost(record: dict[str, object]) -> tuple[int, int]:
    """(rows, bytes) of a record, of a snapshot as many rows as it has levels or more."""
    frame = record["frame"]
    assert isinstance(frame, bytes)
    levels = frame.count(b'"],') if record["kind"] == Kind.SNAPSHOT else 0
    return 1 + levels, len(frame)


def blocks(parts: Iterator[reader.JournalRange]) -> Iterator[RecordRange]:
    for it in parts:
        assert isinstance(it, RecordRange)
        yield it


def frames_of(found: list[RecordRange]) -> list[tuple[int, bytes]]:
    return [
        (record["recv_ns"], record["frame"])
        for block in found
        for record in block.batch.select(["recv_ns", "frame"]).to_pylist()
    ]


@pytest.mark.parametrize("ahead", [0, 3], ids=["at the same step", "some steps ahead"])
def test_a_loader_stuck_while_building_delays_no_other(
    ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_rows, "CHUNK_ROWS", 30)
    monkeypatch.setattr(shared_rows, "SHARED_WAIT_S", 0.05)
    folder = tmp_path / "journal"
    writer = journal_of(folder, recording(300))
    shared = joined(folder, "slow", "quick")
    start = (reader.oldest_offset(folder), BookState())
    at = {"slow": start, "quick": start}
    at["slow"], _ = (
        follow(shared, "slow", start, writer.durable, ahead or -1) if ahead else (start, [])
    )
    held, go_on = threading.Event(), threading.Event()

    def deriving(decoded: Decoded, state: BookState, shard: int) -> tuple[Rows, BookState]:
        if threading.current_thread().name.startswith("slow"):
            held.set()
            assert go_on.wait(PATIENCE_S)
        return build_rows(decoded, state, shard)

    monkeypatch.setattr(shared_rows, "build_rows", deriving)
    with ThreadPoolExecutor(1, thread_name_prefix="slow") as threads:
        slow = threads.submit(follow, shared, "slow", at["slow"], writer.durable, -1)
        try:
            assert held.wait(PATIENCE_S)
            (reached, _), rows = follow(shared, "quick", at["quick"], writer.durable, -1)
        finally:
            go_on.set()
        _, late = slow.result(PATIENCE_S)
    writer.close()
    assert reached.n == writer.durable.n
    assert len(rows) == 303
    assert late == rows[len(rows) - len(late) :]


def test_kept_rows_are_bounded_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A built range holds all its levels: of large ranges only the newest is kept."""
    monkeypatch.setattr(shared_rows, "CHUNK_ROWS", 30)
    folder = tmp_path / "journal"
    writer = journal_of(folder, recording(200))
    for at_most, kept in ((64 << 20, shared_rows.KEPT_STEPS), (1, 1)):
        monkeypatch.setattr(shared_rows, "KEPT_BYTES", at_most)
        shared = joined(folder, "hot", "cold")
        follow(shared, "hot", (reader.oldest_offset(folder), BookState()), writer.durable, -1)
        assert len(shared._kept) == kept
    writer.close()


@pytest.mark.parametrize("seed", range(6))
def test_steps_that_are_kept_share_the_books(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While books come one after the other, then while levels of all books change, each in several merges."""
    dice = random.Random(seed)
    monkeypatch.setattr(shared_rows, "CHUNK_ROWS", 400)
    monkeypatch.setattr(shared_rows, "KEPT_BYTES", dice.choice((1, 150_000, 64 << 20)))
    monkeypatch.setattr(book_state, "RECENT_LEVELS", 300)
    monkeypatch.setattr(sorted_levels, "LEAF_LEVELS", 256)
    folder = tmp_path / "journal"
    writer = journal_of(folder, many_books(200, 40, dice))
    shared = joined(folder, "hot", "cold")
    start, merges = reader.oldest_offset(folder), set[int]()
    states: list[BookState] = []
    for step in shared.steps("hot", start, BookState(), writer.durable):
        kept = list(shared._kept.values())
        pieces = dict(pair for it in kept for pair in pieces_of(it.state))
        beside = sum(pieces[piece] for piece in pieces.keys() - dict(pieces_of(step.state)).keys())
        rows = sum(it.rows.bytes for it in kept)
        assert len(kept) == 1 or beside + rows <= shared_rows.KEPT_BYTES
        if step.end.n <= 200:  # of snapshots: what is there stays as it is
            states = [*states[-7:], step.state]
            held = {id(leaf): leaf.height for it in states for leaf in it.ladders.base.leaves}
            assert sum(held.values()) <= step.state.ladders.base.height + len(states) * 2 * 256
        merges |= {id(step.state.ladders.base)}
    writer.close()
    assert len(merges) > 10


def pieces_of(state: BookState) -> Iterator[tuple[int, int]]:
    """The pieces of a state's books, as (identity, bytes)."""
    return ((id(piece), size) for piece, size in state.pieces())


def many_books(markets: int, levels: int, dice: random.Random) -> list[wire.Record]:
    """A snapshot of each, then as many changes of any level as there are levels."""
    conn, at = wire.conn_id(1), wire.NOON_NS
    ladder = {100 + 10 * level: 500 for level in range(levels)}
    frames = [(Kind.SNAPSHOT, wire.snapshot(f"M-{n}", n + 1, ladder, {})) for n in range(markets)]
    for n in range(markets * levels // 2):
        market, price = dice.randrange(markets), 100 + 10 * dice.randrange(levels)
        frames.append((Kind.DELTA, wire.delta(f"M-{market}", markets + n + 1, "yes", price, 5)))
    head = [wire.started(at), wire.connected(conn, at)]
    return [*head, *((at, conn, int(kind), frame) for kind, frame in frames)]


def joined(folder: Path, *loads: str) -> SharedRows:
    shared = SharedRows(folder)
    for load in loads:
        shared.register_loader(load)
    return shared


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first record of every range built from now on."""
    derived: list[int] = []

    def counting(decoded: Decoded, state: BookState, shard: int) -> tuple[Rows, BookState]:
        derived.append(decoded.first_n)
        return build_rows(decoded, state, shard)

    monkeypatch.setattr(shared_rows, "build_rows", counting)
    return derived
