"""Archives for tests of the reader: journal records of one or more shards, written as the loader writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kalshi_platform import settings as platform_settings
from kalshi_platform.analytics.hourly import compute_hour
from kalshi_platform.archive import LocalArchive, hours, part_name
from kalshi_platform.exchange.columnar import decode_range
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.rows import build_rows
from kalshi_platform.loading.shared_rows import split_at_checkpoints
from kalshi_platform.loading.sinks import by_hour
from kalshi_platform.loading.state_files import checkpoint
from kalshi_platform.schema import DATASETS
from kalshi_platform_tests import wire

TABLES = ("orderbook_events", "stream_events", "trades", "book_checkpoints")


def write(root: Path, records: Sequence[wire.Record], *, shard: int = 0) -> LocalArchive:
    """Write the rows of a shard's journal, checkpoints of new hours among them; no hour is sealed."""
    archive = LocalArchive(root)
    state = BookState()
    (block,) = wire.blocks(records)
    for number, (piece, opens) in enumerate(split_at_checkpoints(block, state.clock)):
        tables = {}
        if opens is not None and state.clock.is_new_hour(opens):
            tables = {"book_checkpoints": checkpoint(state, opens, shard)}
            _add(archive, tables, part_name(shard, number, number))
        rows, state = build_rows(decode_range(piece), state, shard)
        tables = {name: rows.tables[name] for name in TABLES if name in rows.tables}
        _add(archive, tables, part_name(shard, number, number + 1))
    return archive


def _add(archive: LocalArchive, tables: dict[str, object], name: str) -> None:
    for dataset, table in tables.items():
        for hour, part in by_hour(table, DATASETS[dataset].time):
            archive.write(dataset, hour, name, [part], DATASETS[dataset].arrow)


def seal(archive: LocalArchive, *, compute: bool = False) -> None:
    """Seal every hour, and compute the datasets of each where asked to."""
    own = platform_settings.load(_env_file=None, parquet_dir=archive.root, use_clickhouse=False)
    for hour in sorted({h for name in TABLES for h in archive.hours(name)}):
        hours.seal(archive, hour)
        if compute:
            compute_hour(own, hour)
