"""Tally an hour of a store by subscription (`tally`).

The code is the same for ClickHouse and the archive, since both return tables of the same columns. What counts
as a frame, a level or a gap is defined by infra/queries/lossless_proof.sql.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime

import msgspec
import polars as pl
import pyarrow as pa

from kalshi_platform import typed_json
from kalshi_platform.archive import Archive, batches
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.loading import hot_hour
from kalshi_platform.quality.tally import DELTA, NOT_FRAMES, OTHER, SNAPSHOT, TRADE, Holdings
from kalshi_platform.schema import ORDERBOOK_EVENTS, STREAM_EVENTS, TRADES, Dataset

ROWS_AT_A_TIME = 262_144
_FRAME = ("conn_id", "sid", "seq", "shard", "record", "ingest_ts")
_SNAPSHOT = ["conn_id", "sid", "seq"]
_LEVELS = pl.Schema({"conn_id": pl.String, "sid": pl.UInt32, "seq": pl.UInt64, "n": pl.UInt32})
Read = Callable[[Dataset], Iterator[pa.Table]]


class _Gap(msgspec.Struct):
    """The fields of a gap row's detail that are used."""

    expected: int | None = None
    got: int | None = None


def hot(client: clickhouse.Client, hour: datetime) -> Holdings:
    """Tally an hour of ClickHouse. Raises `StoreError` as ClickHouse does."""
    return _tally(lambda dataset: hot_hour.tables(client, dataset, hour))


def cold(archive: Archive, hour: datetime) -> Holdings:
    """Tally an hour of the archive. Raises `StoreRefused` for a file that cannot be read."""

    def read(dataset: Dataset) -> Iterator[pa.Table]:
        for file in archive.files(dataset.name, hour):
            yield from batches(
                file, dataset.arrow, ROWS_AT_A_TIME, columns=[c.name for c in dataset.columns]
            )

    return _tally(read)


def _tally(read: Read) -> Holdings:
    held = Holdings()
    kept = [pl.DataFrame(schema=_LEVELS)]
    recorded = [pl.DataFrame(schema=_LEVELS)]
    # In this order: stream_events is written last, so the other tables have every row that it implies.
    for rows in _frames(read, STREAM_EVENTS, "kind", "detail"):
        frames = rows.filter(~pl.col("kind").is_in(NOT_FRAMES))
        snapshots = frames.filter(pl.col("kind") == "snapshot")
        held.add(_numbered(snapshots, SNAPSHOT))
        held.add(_numbered(frames.filter(pl.col("kind") != "snapshot"), OTHER))
        held.add_records(rows["shard"], rows["record"])
        recorded.append(_recorded_levels(snapshots))
        _add_notes(held, rows)
    for rows in _frames(read, TRADES):
        held.add(_numbered(rows, TRADE))
        held.add_records(rows["shard"], rows["record"])
    for rows in _frames(read, ORDERBOOK_EVENTS, "type"):
        held.add(_numbered(rows.filter(pl.col("type") == "delta"), DELTA))
        levels = rows.filter(pl.col("type") == "snapshot")
        kept.append(levels.group_by(_SNAPSHOT).agg(pl.len().alias("n").cast(pl.UInt32)))
        held.add_records(rows["shard"], rows["record"])
    _add_levels(held, pl.concat(kept), pl.concat(recorded))
    return held


def _frames(read: Read, dataset: Dataset, *columns: str) -> Iterator[pl.DataFrame]:
    """Yield the wanted columns of a dataset's rows, dictionaries decoded."""
    wanted = tuple(c for c in dataset.columns if c.name in {*_FRAME, *columns})
    for table in read(dataclasses.replace(dataset, columns=wanted)):
        texts = [pl.col(name).cast(pl.String) for name in ("conn_id", *columns)]
        yield pl.DataFrame(table).with_columns(texts)


def _numbered(rows: pl.DataFrame, kind: int) -> pl.DataFrame:
    """Return numbered rows with the columns of `Holdings.add`."""
    return rows.filter(pl.col("seq") > 0).select(
        pl.col("conn_id").alias("conn"),
        "sid",
        "seq",
        "record",
        pl.lit(kind, pl.Int64).alias("kind"),
        "ingest_ts",
    )


def _recorded_levels(snapshots: pl.DataFrame) -> pl.DataFrame:
    """Return how many levels each snapshot had, from its own row; a row that is stored twice counts once."""
    return (
        snapshots.unique(subset=[*_SNAPSHOT, "record"])
        .with_columns(pl.col("detail").str.extract(r'"levels":\s*(\d+)').cast(pl.UInt32).alias("n"))
        .group_by(_SNAPSHOT)
        .agg(pl.col("n").fill_null(0).sum().cast(pl.UInt32))
    )


def _add_levels(held: Holdings, kept: pl.DataFrame, recorded: pl.DataFrame) -> None:
    """Count missing and doubled levels of snapshots whose own row is there."""
    both = (
        recorded.group_by(_SNAPSHOT)
        .agg(pl.col("n").sum().cast(pl.Int64))
        .join(
            kept.group_by(_SNAPSHOT).agg(pl.col("n").sum().cast(pl.Int64).alias("kept")),
            on=_SNAPSHOT,
            how="left",
        )
        .with_columns((pl.col("n") - pl.col("kept").fill_null(0)).alias("short"))
        .group_by("conn_id", "sid")
        .agg(
            pl.col("short").clip(lower_bound=0).sum().alias("missing"),
            (-pl.col("short")).clip(lower_bound=0).sum().alias("doubled"),
        )
    )
    for conn, sid, missing, doubled in both.iter_rows():
        held.subscriptions[conn, sid].missing_levels += missing
        held.subscriptions[conn, sid].doubled_levels += doubled


def _add_notes(held: Holdings, rows: pl.DataFrame) -> None:
    """Add the recorder's own notes: starts of connections and subscriptions, and the numbers that gaps name."""
    notes = rows.filter(pl.col("kind").is_in(["connected", "subscribed", "gap"]))
    for conn, sid, kind, detail in notes.select("conn_id", "sid", "kind", "detail").iter_rows():
        if kind == "connected":
            held.opened.add(conn)
        elif kind == "subscribed":
            held.subscriptions[conn, sid].begun = True
        else:
            held.add_gaps(named_by(conn, sid, detail))


def named_by(conn: str, sid: int, detail: str | bytes) -> Sequence[tuple[str, int, int, int]]:
    """Return the numbers that a gap's detail names, for `Holdings.add_gaps`; empty if it names none."""
    try:
        gap = typed_json.decode(detail if isinstance(detail, bytes) else detail.encode(), _Gap)
    except msgspec.DecodeError:
        return ()
    if gap.expected is None or gap.got is None:
        return ()
    return ((conn, sid, gap.expected, gap.got),)
