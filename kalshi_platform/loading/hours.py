"""Hours of the archive: what one holds, sealing it, building it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kalshi_platform.loading.coverage import ANY, BREAKING, Coverage, coverage
from kalshi_platform.storage import archive, checksum
from kalshi_platform.storage.archive import HOUR, Manifest, Part
from kalshi_platform.storage.schema import (
    BOOK_CHECKPOINTS,
    DATASETS,
    ORDERBOOK_EVENTS,
    STREAM_EVENTS,
    TRADES,
    ZERO_UUID,
)

RECORDED = (ORDERBOOK_EVENTS.name, STREAM_EVENTS.name, BOOK_CHECKPOINTS.name, TRADES.name)
"""The datasets that the recording itself makes."""
COMPACTED = "hour-"
"""A compacted hour's file begins so; the rest of its name is a digest of its bytes."""


@dataclass(frozen=True)
class DatasetHour:
    """What the archive holds of one dataset's hour."""

    dataset: str
    hour: datetime
    complete: bool
    rows: int
    files: int
    bytes: int
    markets: int
    gaps: int
    verified_seconds: float | None
    coverage: float | None
    first: datetime | None
    last: datetime | None
    checksum: str
    path: str


@dataclass(frozen=True)
class HourReport:
    """What the archive holds of an hour; `datasets` is empty where there is nothing."""

    hour: datetime
    complete: bool
    datasets: tuple[DatasetHour, ...]
    verified_by_market: Mapping[str, float] = field(default_factory=dict)
    """Seconds of the hour in which each market's book could be believed."""


@dataclass(frozen=True)
class _Tally:
    rows: int
    checksum: int
    markets: frozenset[str]
    first: datetime | None
    last: datetime | None
    parts: tuple[Part, ...]


def describe(root: Path, hour: datetime, *, complete: bool) -> HourReport:
    """Count and check everything that the archive holds of an hour."""
    tallies = {name: tally for name in RECORDED if (tally := _tally(root, name, hour)).parts}
    if not tallies:
        return HourReport(hour, complete, ())
    stream = _stream(root, hour)
    gaps = sum(event["kind"] == "gap" for event in stream)
    covered = _coverage(root, hour, stream, complete=complete)
    return HourReport(
        hour,
        complete,
        tuple(
            DatasetHour(
                dataset=name,
                hour=hour,
                complete=complete,
                rows=tally.rows,
                files=len(tally.parts),
                bytes=sum(part.bytes for part in tally.parts),
                markets=len(tally.markets - {""}),
                gaps=gaps,
                verified_seconds=round(covered.verified_s, 3),
                coverage=None if covered.ratio is None else round(covered.ratio, 6),
                first=tally.first,
                last=tally.last,
                checksum=checksum.text(tally.checksum),
                path=str(archive.hour_folder(root, name, hour)),
            )
            for name, tally in tallies.items()
        ),
        {ticker: round(seconds, 3) for ticker, seconds in sorted(covered.by_market.items())},
    )


def seal(root: Path, hour: datetime) -> HourReport:
    """Write down that an hour is complete: a manifest beside each dataset's files. Idempotent."""
    report = describe(root, hour, complete=True)
    for dataset in report.datasets:
        archive.write_manifest(root, _manifest(root, dataset, report.verified_by_market))
    return report


def is_sealed(root: Path, hour: datetime) -> bool:
    """Whether an hour that has data also has its manifests."""
    present = [name for name in RECORDED if archive.files(root, name, hour)]
    return bool(present) and all(
        (manifest := archive.read_manifest(root, name, hour)) is not None and manifest.complete
        for name in present
    )


def _manifest(root: Path, it: DatasetHour, verified: Mapping[str, float]) -> Manifest:
    before = archive.read_manifest(root, it.dataset, it.hour)
    tally_parts = [
        Part(path.name, pq.read_metadata(path).num_rows, path.stat().st_size)
        for path in archive.files(root, it.dataset, it.hour)
    ]
    return Manifest(
        dataset=it.dataset,
        hour=it.hour.isoformat(),
        complete=it.complete,
        rows=it.rows,
        bytes=it.bytes,
        markets=it.markets,
        gaps=it.gaps,
        verified_seconds=it.verified_seconds,
        coverage=it.coverage,
        verified_by_market=dict(verified),
        first=it.first.isoformat() if it.first else None,
        last=it.last.isoformat() if it.last else None,
        checksum=it.checksum,
        parts=tally_parts,
        compacted=is_compacted([part.file for part in tally_parts]),
        merged=before.merged if before else [],
    )


def is_compacted(names: Sequence[str]) -> bool:
    """Whether files of these names are an hour's one sorted file."""
    return len(names) == 1 and names[0].startswith(COMPACTED)


def _tally(root: Path, dataset: str, hour: datetime) -> _Tally:
    clock = "ts" if dataset == BOOK_CHECKPOINTS.name else "ingest_ts"
    rows, total = 0, 0
    markets: set[str] = set()
    first: datetime | None = None
    last: datetime | None = None
    parts = []
    for path in archive.files(root, dataset, hour):
        count = 0
        for table in archive.batches(path, DATASETS[dataset].arrow):
            count += table.num_rows
            total = (total + checksum.rows_checksum(table)) % 2**64
            markets.update(table["market_ticker"].unique().cast(pa.string()).to_pylist())
            span = pc.min_max(table[clock]).as_py()
            if span["min"] is not None:
                first = span["min"] if first is None else min(first, span["min"])
                last = span["max"] if last is None else max(last, span["max"])
        rows += count
        parts.append(Part(path.name, count, path.stat().st_size))
    return _Tally(rows, total, frozenset(markets), first, last, tuple(parts))


def _stream(root: Path, hour: datetime) -> list[dict[str, Any]]:
    """The stream events that coverage and gap counts need, in order."""
    tables = []
    for table in archive.read(root, STREAM_EVENTS.name, hour):
        plain = table.set_column(
            table.column_names.index("kind"), "kind", table["kind"].cast(pa.string())
        )
        tables.append(plain.filter(pc.is_in(plain["kind"], pa.array(BREAKING))))
    # By time, for the parts of several shards lie side by side. What has the same time comes in the
    # order of its journal, as in a compacted hour.
    rows = [row for table in tables for row in table.to_pylist()]
    return sorted(rows, key=itemgetter("ingest_ts"))


def _coverage(
    root: Path, hour: datetime, stream: list[dict[str, Any]], *, complete: bool
) -> Coverage:
    books: dict[str, tuple[str, str, int, bool]] = {}
    columns = ["market_ticker", "conn_id", "sid", "verified"]
    for table in archive.read(root, BOOK_CHECKPOINTS.name, hour, columns):
        for row in table.group_by(columns).aggregate([]).to_pylist():
            books[row["market_ticker"]] = (
                row["market_ticker"],
                row["conn_id"],
                row["sid"],
                row["verified"],
            )
    signs = _signs(root, hour)
    last = max(signs.values(), default=hour)
    end = hour + HOUR if complete else max(last, min(datetime.now(UTC), hour + HOUR))
    return coverage(hour, end, books.values(), stream, signs)


def _signs(root: Path, hour: datetime) -> dict[str, datetime]:
    """Each connection's newest receive time in the hour's files; see `coverage`."""
    newest: dict[str, datetime] = {}
    for name in (ORDERBOOK_EVENTS.name, STREAM_EVENTS.name):
        for table in archive.read(root, name, hour, ["conn_id", "ingest_ts"]):
            found = pl.DataFrame(table).group_by("conn_id").agg(pl.col("ingest_ts").max())
            for conn, at in found.cast({"conn_id": pl.String}).iter_rows():
                newest[conn] = max(newest.get(conn, hour), at)
    newest.pop(ZERO_UUID, None)  # happened to no connection
    columns = ["kind", "conn_id", "detail", "ingest_ts"]
    for table in archive.read(root, STREAM_EVENTS.name, hour, columns):
        beats = pl.DataFrame(table).filter(
            pl.col("kind").cast(pl.String) == "heartbeat",
            pl.col("conn_id").cast(pl.String) == ZERO_UUID,
            ~pl.col("detail").str.contains(r'"state":"(?:starting|connecting|stopped)"'),
        )
        for at in beats["ingest_ts"].tail(1):
            newest[ANY] = max(newest.get(ANY, hour), at)
    return newest
