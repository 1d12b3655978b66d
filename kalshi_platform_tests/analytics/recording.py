"""A small recorded hour in an archive, built as the loader builds it."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path

from kalshi_platform.archive import LocalArchive, hours, part_name, write_durably
from kalshi_platform.exchange.columnar import decode
from kalshi_platform.journal.kind import Kind
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.rows import build_rows
from kalshi_platform.loading.sinks import by_hour
from kalshi_platform.loading.state_files import checkpoint
from kalshi_platform.schema import BOOK_CHECKPOINTS, DATASETS
from kalshi_platform_tests import wire

HOUR = datetime(2026, 9, 21, 15, tzinfo=UTC)
START_NS = int(HOUR.timestamp()) * wire.SECOND


def record_hour(
    root: Path, *, deltas: int = 400, markets: int = 3, sealed: bool = True, seed: int = 1
) -> None:
    """Write the hour HOUR: books from the hour before, deltas over it, one gap and the snapshot that ends it."""
    rng = random.Random(seed)
    tickers = [f"M-{i}" for i in range(markets)]
    conn, seq, at = wire.conn_id(1), 0, START_NS - 5 * wire.SECOND
    records: list[wire.Record] = [wire.connected(conn, at)]
    held: dict[tuple[str, str, int], int] = {}
    for ticker in tickers:
        seq += 1
        book = {p: 100 * p for p in range(3_000, 4_900, 300)}
        held |= {(ticker, side, p): q for side in ("yes", "no") for p, q in book.items()}
        records.append((at, conn, Kind.SNAPSHOT, wire.snapshot(ticker, seq, book, book)))
    begins = len(records)
    at = START_NS
    for number in range(deltas):
        at += rng.randrange(1, 2 * 3_590 * wire.SECOND // deltas)
        at = min(at, START_NS + 3_599 * wire.SECOND)
        seq += 1
        ticker, side = rng.choice(tickers), rng.choice(["yes", "no"])
        price = rng.randrange(3_900, 4_950, 50)
        now = held.get((ticker, side, price), 0)
        qty = -now if now and rng.random() < 0.5 else rng.randrange(1, 5_000)
        held[ticker, side, price] = now + qty
        if number == deltas // 2:
            records.append((at, conn, Kind.NOTE, wire.note("gap", {"cause": "test"}, sid=1)))
            book = {p: q for (t, s, p), q in held.items() if (t, s) == (ticker, side) and q > 0}
            records.append((at + 9_000, conn, Kind.SNAPSHOT, wire.snapshot(ticker, seq, book, {})))
            held = {key: q for key, q in held.items() if key[0] != ticker or key[1] == side}
            continue
        records.append((at, conn, Kind.DELTA, wire.delta(ticker, seq, side, price, qty)))
    state = BookState()
    for block in wire.blocks(records, [begins, (begins + len(records)) // 2]):
        name = part_name(0, block.first_n, block.first_n + block.rows)
        if block.first_n == begins:
            folder = LocalArchive(root).folder(BOOK_CHECKPOINTS.name, HOUR)
            books = checkpoint(state, HOUR)
            write_durably(folder / part_name(0, begins, begins), [books], books.schema)
        rows, state = build_rows(decode([block]), state)
        for dataset in ("orderbook_events", "stream_events"):
            for hour, piece in by_hour(rows.tables[dataset], "ingest_ts"):
                folder = LocalArchive(root).folder(dataset, hour)
                write_durably(folder / name, [piece], DATASETS[dataset].arrow)
    if sealed:
        hours.seal(LocalArchive(root), HOUR)
