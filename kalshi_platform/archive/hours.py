"""Hours of the archive: what one holds, sealing it, building it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform import schema
from kalshi_platform.archive import Archive, File, Manifest, Part, batches, rows_of
from kalshi_platform.archive.coverage import ANY, BREAKING, CHECKPOINT, Coverage, coverage
from kalshi_platform.archive.row_statistics import RowStatistics
from kalshi_platform.schema import (
    BOOK_CHECKPOINTS,
    DATASETS,
    ORDERBOOK_EVENTS,
    PLACE,
    STREAM_EVENTS,
    ZERO_UUID,
)
from kalshi_platform.utc_hours import HOUR

RECORDED = tuple(dataset.name for dataset in schema.RECORDED)
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
    statistics: RowStatistics
    parts: tuple[Part, ...]


def describe(
    archive: Archive, hour: datetime, *, complete: bool, proceed: Callable[[], None] = lambda: None
) -> HourReport:
    """Count and check everything that the archive holds of an hour.

    COUNTED_ROWS are read at a time, and `proceed` called between.
    """
    read = _Reading(archive, hour, proceed)
    tallies = {name: tally for name in RECORDED if (tally := _tally(read, name)).parts}
    if not tallies:
        return HourReport(hour, complete, ())
    events = _events(read)
    gaps = sum(event["kind"] == "gap" for event in events)
    covered = _coverage(read, events, complete=complete)
    return HourReport(
        hour,
        complete,
        tuple(
            DatasetHour(
                dataset=name,
                hour=hour,
                complete=complete,
                rows=tally.statistics.rows,
                files=len(tally.parts),
                bytes=sum(part.bytes for part in tally.parts),
                markets=tally.statistics.markets,
                gaps=gaps,
                verified_seconds=round(covered.verified_s, 3),
                coverage=None if covered.ratio is None else round(covered.ratio, 6),
                first=tally.statistics.first,
                last=tally.statistics.last,
                checksum=tally.statistics.checksum,
                path=archive.where(name, hour),
            )
            for name, tally in tallies.items()
        ),
        {ticker: round(seconds, 3) for ticker, seconds in sorted(covered.by_market.items())},
    )


def seal(
    archive: Archive,
    hour: datetime,
    taken: Mapping[str, Sequence[str]] | None = None,
    proceed: Callable[[], None] = lambda: None,
) -> HourReport:
    """Write down that an hour is complete: a manifest beside each dataset's files. Idempotent.

    `taken`: by dataset, the parts that have become one sorted file just now. `proceed`: as in `describe`.
    """
    report = describe(archive, hour, complete=True, proceed=proceed)
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


@dataclass(frozen=True)
class _Reading:
    """Reads an hour some rows at a time, whatever it holds."""

    archive: Archive
    hour: datetime
    proceed: Callable[[], None]

    def files(self, dataset: str) -> list[File]:
        return self.archive.files(dataset, self.hour)

    def batches(self, dataset: str, columns: list[str]) -> Iterator[pa.Table]:
        """These columns of a dataset, file by file."""
        for file in self.files(dataset):
            yield from self.of_file(file, dataset, columns)

    def of_file(
        self, file: File, dataset: str, columns: list[str] | None = None
    ) -> Iterator[pa.Table]:
        columns_read = DATASETS[dataset].arrow
        if columns is not None:
            columns_read = pa.schema([columns_read.field(name) for name in columns])
        for table in batches(file, columns_read, COUNTED_ROWS, columns=columns):
            self.proceed()
            yield table


def _tally(read: _Reading, dataset: str) -> _Tally:
    statistics = RowStatistics(DATASETS[dataset])
    parts = []
    for file in read.files(dataset):
        before = statistics.rows
        for table in read.of_file(file, dataset):
            statistics.add(table)
        parts.append(Part(file.name, statistics.rows - before, file.bytes))
    return _Tally(statistics, tuple(parts))


_EVENT = ["ingest_ts", "conn_id", "sid", "kind", "market_ticker", "detail", *PLACE]
_BOOK = ["ts", "conn_id", "sid", "market_ticker", "verified", *PLACE]


def _events(read: _Reading) -> list[dict[str, Any]]:
    """What coverage and gap counts depend on, in order: stream events, and the books of the checkpoints."""
    found = []
    text = pl.col("conn_id", "market_ticker").cast(pl.String)
    for table in read.batches(STREAM_EVENTS.name, _EVENT):
        kind = table["kind"].cast(pa.string())
        rows = pl.DataFrame(table.filter(pc.is_in(kind, pa.array(BREAKING))))
        found.append(rows.with_columns(text, pl.col("kind").cast(pl.String)))
    books = [
        pl.DataFrame(table).unique(maintain_order=True).with_columns(text)
        for table in read.batches(BOOK_CHECKPOINTS.name, _BOOK)
    ]
    if books:
        each = pl.concat(books).unique(maintain_order=True)
        found.append(each.rename({"ts": "ingest_ts"}).with_columns(kind=pl.lit(CHECKPOINT)))
    if not found:
        return []
    return _in_order(pl.concat(found, how="diagonal")).to_dicts()


def _in_order(events: pl.DataFrame) -> pl.DataFrame:
    """Each shard's events by record, with times that do not step back; shards among each other by those.

    Of one record a checkpoint comes first, what breaks a book next, and the snapshot last. What has no
    record goes by its time, and else as it was read, checkpoints first.
    """
    kind, placed = pl.col("kind"), pl.col("record").is_not_null()
    rank = (
        pl.when(kind == CHECKPOINT).then(0).when(placed & (kind == "snapshot")).then(2).otherwise(1)
    )
    by_record = events.sort(*PLACE, rank, nulls_last=False, maintain_order=True)
    clock = pl.col("ingest_ts").cum_max().over("shard")
    timed = by_record.with_columns(
        pl.when(placed).then(clock).otherwise("ingest_ts").alias("ingest_ts")
    )
    return timed.sort("ingest_ts", ~placed & (kind != CHECKPOINT), maintain_order=True)


def _coverage(read: _Reading, events: list[dict[str, Any]], *, complete: bool) -> Coverage:
    signs, hour = _signs(read), read.hour
    last = max(signs.values(), default=hour)
    end = hour + HOUR if complete else max(last, min(datetime.now(UTC), hour + HOUR))
    return coverage(hour, end, events, signs)


def _signs(read: _Reading) -> dict[str, datetime]:
    """Each connection's newest receive time in the hour's files; see `coverage`."""
    newest: dict[str, datetime] = {}
    hour = read.hour
    for name in (ORDERBOOK_EVENTS.name, STREAM_EVENTS.name):
        for table in read.batches(name, ["conn_id", "ingest_ts"]):
            found = pl.DataFrame(table).group_by("conn_id").agg(pl.col("ingest_ts").max())
            for conn, at in found.cast({"conn_id": pl.String}).iter_rows():
                newest[conn] = max(newest.get(conn, hour), at)
    newest.pop(ZERO_UUID, None)  # happened to no connection
    columns = ["kind", "conn_id", "detail", "ingest_ts"]
    for table in read.batches(STREAM_EVENTS.name, columns):
        beats = pl.DataFrame(table).filter(
            pl.col("kind").cast(pl.String) == "heartbeat",
            pl.col("conn_id").cast(pl.String) == ZERO_UUID,
            ~pl.col("detail").str.contains(r'"state":"(?:starting|connecting|stopped)"'),
        )
        for at in beats["ingest_ts"].tail(1):
            newest[ANY] = max(newest.get(ANY, hour), at)
    return newest
