"""Bytes for each event of a recorded order flow, in Parquet and in ClickHouse, every column kept.

The recording is loaded as the streamer loads it, with its real receive times, compacted, and weighed:
the Parquet file of the hour, and the active parts of the table with their marks and index.
"""

from __future__ import annotations

import gzip
import tempfile
import uuid
from datetime import datetime
from pathlib import Path

from kalshi_platform import settings as platform_settings
from kalshi_platform.archive import open_archive, rows_of
from kalshi_platform.archive.compaction import compact, pending
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.clickhouse import migrations
from kalshi_platform.embedded_clickhouse import running
from kalshi_platform.errors import StoreError
from kalshi_platform.exchange.frames import decode_head
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.writer import Writer
from kalshi_platform.loading.loader import CLICKHOUSE_PACE, PARQUET_PACE, Loader
from kalshi_platform.loading.sinks import ClickHouseSink, ParquetSink
from kalshi_platform.schema import ORDERBOOK_EVENTS
from kalshi_platform.settings import Settings
from kalshi_platform.utc_hours import HOUR, hour_of_ns, hour_start_ns
from kalshi_platform_tests.benchmarks.figures import Figure, number

BOUND = 7.5


def figures(frames: Path, received: Path) -> list[Figure]:
    """Load, compact, weigh. `received` has the receive time of each line of `frames`."""
    lines = _lines(frames)
    times = [_ns(text.decode()) for text in _lines(received)]
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        running(Path(name) / "clickhouse") as url,
    ):
        settings = platform_settings.load(
            kalshi_data_dir=Path(name), clickhouse_url=str(url), hot_retention_days=36_500
        )
        migrations.migrate(settings)
        _load(settings, lines, times)
        archive = open_archive(settings)
        compact(archive, pending(archive), lambda _: None, _refused)
        rows, cold = 0, 0
        for hour in archive.hours(ORDERBOOK_EVENTS.name):
            for file in archive.files(ORDERBOOK_EVENTS.name, hour):
                rows += rows_of(file)
                cold += file.bytes
        client = clickhouse.connect(settings)
        client.command("OPTIMIZE TABLE orderbook_events FINAL")
        parts = "SELECT sum(rows), sum(bytes_on_disk) FROM system.parts WHERE active AND table = 'orderbook_events'"
        hot_rows, hot = client.query(parts).result_rows[0]
        client.close()
    if hot_rows != rows:
        raise RuntimeError(f"Parquet has {rows} events, ClickHouse {hot_rows}")
    raw = f"raw JSON {number(sum(map(len, lines)) / len(lines))}"
    what = f"an event of the recorded flow ({rows:,} rows)"
    return [
        Figure(f"Parquet, {what}", cold / rows, "bytes", at_most=BOUND, beside=raw),
        Figure(f"ClickHouse, {what}", hot / rows, "bytes", at_most=BOUND, beside=raw),
    ]


def _load(settings: Settings, lines: list[bytes], times: list[int]) -> None:
    folder = settings.journal_dir()
    writer = Writer(folder)
    conn = uuid.uuid4().bytes
    writer.note("connected", {"use_yes_price": False}, conn=conn, recv_ns=times[0])
    for frame, at in zip(lines, times, strict=True):
        kind = _KINDS.get(decode_head(frame).type, Kind.CONTROL)
        writer.append(at, conn, kind, frame)
    hour_after = hour_start_ns(hour_of_ns(times[-1]) + HOUR)
    writer.note("heartbeat", {}, recv_ns=hour_after)  # with it the last hour is over
    writer.submit()
    if not writer.wait_durable(writer.next_n, 60.0):
        raise RuntimeError("the journal took too long")
    parquet = ParquetSink(open_archive(settings), 0, lambda _: None)
    hot = ClickHouseSink(settings, str(writer.id))
    for load in (
        Loader(folder, writer, parquet, PARQUET_PACE),
        Loader(folder, writer, hot, CLICKHOUSE_PACE),
    ):
        load.start()
        load.drain()
        if not load.join(120.0):
            raise RuntimeError(f"{load.name}: {load.failure or load.trouble}")
    writer.close()


_KINDS = {"orderbook_delta": Kind.DELTA, "orderbook_snapshot": Kind.SNAPSHOT}


def _refused(hour: datetime, error: StoreError) -> None:
    raise error


def _lines(path: Path) -> list[bytes]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return [line for line in file.read().splitlines() if line]


def _ns(text: str) -> int:
    """An ISO 8601 time, in ns since the epoch, exactly."""
    at = datetime.fromisoformat(text)
    return (int(at.replace(microsecond=0).timestamp()) * 1_000_000 + at.microsecond) * 1000
