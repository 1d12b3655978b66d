"""Hours of the archive: what one holds, sealing it, building it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform.loading.coverage import ANY, BREAKING, Coverage, coverage
from kalshi_platform.storage import checksum
from kalshi_platform.storage.archive import HOUR, Archive, Manifest, Part, batches, rows_of
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
COUNTED_ROWS = 32_768
"""Looked at together: the streamer does it beside its recording, and should not grow for it."""
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


def describe(archive: Archive, hour: datetime, *, complete: bool) -> HourReport:
    """Count and check everything that the archive holds of an hour."""
    tallies = {name: tally for name in RECORDED if (tally := _tally(archive, name, hour)).parts}
    if not tallies:
        return HourReport(hour, complete, ())
    stream = _stream(archive, hour)
    gaps = sum(event["kind"] == "gap" for event in stream)
    covered = _coverage(archive, hour, stream, complete=complete)
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
                path=archive.where(name, hour),
            )
            for name, tally in tallies.items()
        ),
        {ticker: round(seconds, 3) for ticker, seconds in sorted(covered.by_market.items())},
    )


def seal(
    archive: Archive, hour: datetime, taken: Mapping[str, Sequence[str]] | None = None
) -> HourReport:
    """Write down that an hour is complete: a manifest beside each dataset's files. Idempotent.

    `taken`: by dataset, the parts that have become one sorted file just now.
    """
    report = describe(archive, hour, complete=True)
    for dataset in report.datasets:
        merged = (taken or {}).get(dataset.dataset, ())
        archive.write_manifest(_manifest(archive, dataset, report.verified_by_market, merged))
    return report


def is_sealed(archive: Archive, hour: datetime) -> bool:
    """Whether an hour that has data also has its manifests."""
    present = [name for name in RECORDED if archive.files(name, hour)]
    return bool(present) and all(
        (manifest := archive.read_manifest(name, hour)) is not None and manifest.complete
        for name in present
    )


def unsealed(archive: Archive, since: datetime, before: datetime) -> list[datetime]:
    """The hours from `since` to before `before` of which some dataset has files and no manifest."""
    return sorted(
        {
            hour
            for name in RECORDED
            for hour, listed in archive.listing(name, since, before).items()
            if hour < before and listed.files and listed.manifest is None
        }
    )


def _manifest(
    archive: Archive, it: DatasetHour, verified: Mapping[str, float], merged: Sequence[str]
) -> Manifest:
    before = archive.read_manifest(it.dataset, it.hour)
    tally_parts = [
        Part(file.name, rows_of(file), file.bytes) for file in archive.files(it.dataset, it.hour)
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
        merged=sorted({*merged, *(before.merged if before else [])}),
    )


def is_compacted(names: Sequence[str]) -> bool:
    """Whether files of these names are an hour's one sorted file."""
    return len(names) == 1 and names[0].startswith(COMPACTED)


def _tally(archive: Archive, dataset: str, hour: datetime) -> _Tally:
    clock = "ts" if dataset == BOOK_CHECKPOINTS.name else "ingest_ts"
    rows, total = 0, 0
    markets: set[str] = set()
    first: datetime | None = None
    last: datetime | None = None
    parts = []
    for file in archive.files(dataset, hour):
        count = 0
        for table in batches(file, DATASETS[dataset].arrow, COUNTED_ROWS):
            count += table.num_rows
            total = (total + checksum.rows_checksum(table)) % 2**64
            markets.update(table["market_ticker"].unique().cast(pa.string()).to_pylist())
            span = pc.min_max(table[clock]).as_py()
            if span["min"] is not None:
                first = span["min"] if first is None else min(first, span["min"])
                last = span["max"] if last is None else max(last, span["max"])
        rows += count
        parts.append(Part(file.name, count, file.bytes))
    return _Tally(rows, total, frozenset(markets), first, last, tuple(parts))


def _stream(archive: Archive, hour: datetime) -> list[dict[str, Any]]:
    """The stream events that coverage and gap counts need, in order."""
    tables = []
    for table in archive.read(STREAM_EVENTS.name, hour):
        plain = table.set_column(
            table.column_names.index("kind"), "kind", table["kind"].cast(pa.string())
        )
        tables.append(plain.filter(pc.is_in(plain["kind"], pa.array(BREAKING))))
    # By time, for the parts of several shards lie side by side. What has the same time comes in the
    # order of its journal, as in a compacted hour.
    rows = [row for table in tables for row in table.to_pylist()]
    return sorted(rows, key=itemgetter("ingest_ts"))


def _coverage(
    archive: Archive, hour: datetime, stream: list[dict[str, Any]], *, complete: bool
) -> Coverage:
    books: dict[str, tuple[str, str, int, bool]] = {}
    columns = ["market_ticker", "conn_id", "sid", "verified"]
    for table in archive.read(BOOK_CHECKPOINTS.name, hour, columns):
        for row in table.group_by(columns).aggregate([]).to_pylist():
            books[row["market_ticker"]] = (
                row["market_ticker"],
                row["conn_id"],
                row["sid"],
                row["verified"],
            )
    signs = _signs(archive, hour)
    last = max(signs.values(), default=hour)
    end = hour + HOUR if complete else max(last, min(datetime.now(UTC), hour + HOUR))
    return coverage(hour, end, books.values(), stream, signs)


def _signs(archive: Archive, hour: datetime) -> dict[str, datetime]:
    """Each connection's newest receive time in the hour's files; see `coverage`."""
    newest: dict[str, datetime] = {}
    for name in (ORDERBOOK_EVENTS.name, STREAM_EVENTS.name):
        for table in archive.read(name, hour, ["conn_id", "ingest_ts"]):
            found = pl.DataFrame(table).group_by("conn_id").agg(pl.col("ingest_ts").max())
            for conn, at in found.cast({"conn_id": pl.String}).iter_rows():
                newest[conn] = max(newest.get(conn, hour), at)
    newest.pop(ZERO_UUID, None)  # happened to no connection
    columns = ["kind", "conn_id", "detail", "ingest_ts"]
    for table in archive.read(STREAM_EVENTS.name, hour, columns):
        beats = pl.DataFrame(table).filter(
            pl.col("kind").cast(pl.String) == "heartbeat",
            pl.col("conn_id").cast(pl.String) == ZERO_UUID,
            ~pl.col("detail").str.contains(r'"state":"(?:starting|connecting|stopped)"'),
        )
        for at in beats["ingest_ts"].tail(1):
            newest[ANY] = max(newest.get(ANY, hour), at)
    return newest
