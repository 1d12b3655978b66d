"""What an hour of the archive holds: counting, checking and describing it, and writing its manifests.

Coverage from events belongs in `coverage`, sending waiting parts in `sealing`, rebuilding in `loading.rebuild`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform import schema
from kalshi_platform.archive import Archive, File, Manifest, Part, batches, rows_of, table_of
from kalshi_platform.archive.coverage import (
    ANY_CONNECTION,
    CHECKPOINT,
    RELEVANT_KINDS,
    SILENCE,
    Coverage,
    coverage,
)
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
BOOKS_FROM = (ORDERBOOK_EVENTS.name, BOOK_CHECKPOINTS.name, STREAM_EVENTS.name)
"""The datasets that an hour's books are rebuilt from."""
BUILT = tuple(dataset.name for dataset in schema.BUILT)
"""Those of them that are built from frames, and are in ClickHouse, too."""
COUNTED_ROWS = 32_768
"""Rows read at a time: the streamer does this while recording, so its memory must stay bounded."""
COMPACTED = "hour-"
"""Prefix of a compacted hour's file name; the rest is a digest of its bytes."""


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
    """Seconds of the hour in which each market's book is synced."""
    rebuilt_from: str = ""
    """What it was just rebuilt from; empty where its files were left as they are."""


@dataclass(frozen=True)
class _Tally:
    statistics: RowStatistics
    parts: tuple[Part, ...]


def describe(
    archive: Archive, hour: datetime, *, complete: bool, proceed: Callable[[], None] = lambda: None
) -> HourReport:
    """Count and check everything that the archive holds of an hour.

    Reads `COUNTED_ROWS` at a time and calls `proceed` in between.
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
    merged: Mapping[str, Sequence[str]] | None = None,
    proceed: Callable[[], None] = lambda: None,
) -> HourReport:
    """Record that an hour is complete: write a manifest beside each dataset's files. Idempotent.

    `merged`: by dataset, the parts that were just merged into one sorted file. `proceed`: as in `describe`.
    """
    report = describe(archive, hour, complete=True, proceed=proceed)
    for dataset in report.datasets:
        parts = (merged or {}).get(dataset.dataset, ())
        archive.write_manifest(_manifest(archive, dataset, report.verified_by_market, parts))
    return report


def covered(
    archive: Archive, hour: datetime, tickers: Collection[str], *, complete: bool
) -> Coverage:
    """Compute the coverage of some markets in an hour; only their rows are read, and those of no market.

    The other markets' rows are read where these do not show that their connection lived to the hour's end.
    Of an hour that is not complete, a book counts as synced up to the last row of its connection that the archive has.
    """
    read = _Reading(archive, hour, lambda: None, tickers)
    events, signs = _events(read), _last_receive_times(read)
    if complete:
        end = hour + HOUR
        if any(end - signs.get(event["conn_id"], hour) > SILENCE for event in events):
            signs = _last_receive_times(_Reading(archive, hour, lambda: None))
        return coverage(hour, end, events, signs)
    signs = {conn: at + timedelta(microseconds=1) for conn, at in signs.items()}
    end = max(signs.values(), default=hour)
    return coverage(hour, end, events, signs, silence=timedelta())


def is_sealed(archive: Archive, hour: datetime) -> bool:
    """Whether an hour has data and a complete manifest for each of its datasets."""
    present = [name for name in RECORDED if archive.files(name, hour)]
    return bool(present) and all(
        (manifest := archive.read_manifest(name, hour)) is not None and manifest.complete
        for name in present
    )


def content_of(manifests: Iterable[Manifest | None]) -> str:
    """The content of a sealed hour's books, from the manifests of `BOOKS_FROM` that there are; "" if it is not sealed."""
    checksums = {m.dataset: m.checksum for m in manifests if m is not None and m.complete}
    return " ".join(f"{name}:{checksums[name]}" for name in BOOKS_FROM if name in checksums)


def unsealed(archive: Archive, since: datetime, before: datetime) -> list[datetime]:
    """The hours in [since, before) of which some dataset has files and no manifest."""
    return sorted(
        {
            hour
            for name in RECORDED
            for hour, listed in archive.listing(name, since, before).items()
            if hour < before and listed.files and listed.manifest is None
        }
    )


def _manifest(
    archive: Archive, described: DatasetHour, verified: Mapping[str, float], merged: Sequence[str]
) -> Manifest:
    before = archive.read_manifest(described.dataset, described.hour)
    tally_parts = [
        Part(file.name, rows_of(file), file.bytes)
        for file in archive.files(described.dataset, described.hour)
    ]
    return Manifest(
        dataset=described.dataset,
        hour=described.hour.isoformat(),
        complete=described.complete,
        rows=described.rows,
        bytes=described.bytes,
        markets=described.markets,
        gaps=described.gaps,
        verified_seconds=described.verified_seconds,
        coverage=described.coverage,
        verified_by_market=dict(verified),
        first=described.first.isoformat() if described.first else None,
        last=described.last.isoformat() if described.last else None,
        checksum=described.checksum,
        parts=tally_parts,
        compacted=is_compacted([part.file for part in tally_parts]),
        merged=sorted({*merged, *(before.merged if before else [])}),
    )


def is_compacted(names: Sequence[str]) -> bool:
    """Whether these file names are those of a compacted hour: one sorted file."""
    return len(names) == 1 and names[0].startswith(COMPACTED)


@dataclass(frozen=True)
class _Reading:
    """Reads an hour in batches of `COUNTED_ROWS`."""

    archive: Archive
    hour: datetime
    proceed: Callable[[], None]
    tickers: Collection[str] | None = None
    """Only rows of these markets, and of none; None: all."""

    def files(self, dataset: str) -> list[File]:
        return self.archive.files(dataset, self.hour)

    def batches(self, dataset: str, columns: list[str]) -> Iterator[pa.Table]:
        """Yield these columns of a dataset, file by file."""
        for file in self.files(dataset):
            yield from self.of_file(file, dataset, columns)

    def of_file(
        self, file: File, dataset: str, columns: list[str] | None = None
    ) -> Iterator[pa.Table]:
        if self.tickers is not None:
            yield table_of(file, DATASETS[dataset].arrow, columns, {*self.tickers, ""})
            return
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
    """The events for coverage and gap counts, in order: stream events, and the books of the checkpoints."""
    frames = []
    text = pl.col("conn_id", "market_ticker").cast(pl.String)
    for table in read.batches(STREAM_EVENTS.name, _EVENT):
        kind = table["kind"].cast(pa.string())
        rows = pl.DataFrame(table.filter(pc.is_in(kind, pa.array(RELEVANT_KINDS))))
        frames.append(rows.with_columns(text, pl.col("kind").cast(pl.String)))
    books = [
        pl.DataFrame(table).unique(maintain_order=True).with_columns(text)
        for table in read.batches(BOOK_CHECKPOINTS.name, _BOOK)
    ]
    if books:
        checkpoints = pl.concat(books).unique(maintain_order=True)
        frames.append(checkpoints.rename({"ts": "ingest_ts"}).with_columns(kind=pl.lit(CHECKPOINT)))
    if not frames:
        return []
    return _ordered(pl.concat(frames, how="diagonal")).to_dicts()


def _ordered(events: pl.DataFrame) -> pl.DataFrame:
    """Order each shard's events by record, made monotonic in time; merge the shards by these times.

    Within one record, a checkpoint comes first, then events that make a book stale, then the snapshot. Events
    without a record are ordered by time and then as read, checkpoints first.
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
    signs, hour = _last_receive_times(read), read.hour
    last = max(signs.values(), default=hour)
    end = hour + HOUR if complete else max(last, min(datetime.now(UTC), hour + HOUR))
    return coverage(hour, end, events, signs)


def _last_receive_times(read: _Reading) -> dict[str, datetime]:
    """The last receive time of each connection in the hour's files; see `coverage.coverage`."""
    newest: dict[str, datetime] = {}
    hour = read.hour
    for name in (ORDERBOOK_EVENTS.name, STREAM_EVENTS.name):
        for table in read.batches(name, ["conn_id", "ingest_ts"]):
            latest = pl.DataFrame(table).group_by("conn_id").agg(pl.col("ingest_ts").max())
            for conn, at in latest.cast({"conn_id": pl.String}).iter_rows():
                newest[conn] = max(newest.get(conn, hour), at)
    newest.pop(ZERO_UUID, None)  # notes that concern no connection
    columns = ["kind", "conn_id", "detail", "ingest_ts"]
    for table in read.batches(STREAM_EVENTS.name, columns):
        beats = pl.DataFrame(table).filter(
            pl.col("kind").cast(pl.String) == "heartbeat",
            pl.col("conn_id").cast(pl.String) == ZERO_UUID,
            ~pl.col("detail").str.contains(r'"state":"(?:starting|connecting|stopped)"'),
        )
        for at in beats["ingest_ts"].tail(1):
            newest[ANY_CONNECTION] = max(newest.get(ANY_CONNECTION, hour), at)
    return newest
