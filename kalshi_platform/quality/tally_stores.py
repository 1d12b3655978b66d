"""An hour of a store, added to what is known of its subscriptions (`tally`).

The same for ClickHouse and the archive: both give their rows in tables of the same columns. What counts as
a frame, a level or a gap is as in infra/queries/lossless_proof.sql.
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
from kalshi_platform.quality.tally import DELTA, NOT_FRAMES, OTHER, SNAPSHOT, TRADE, Place
from kalshi_platform.schema import ORDERBOOK_EVENTS, STREAM_EVENTS, TRADES, Dataset

ROWS_AT_A_TIME = 262_144
_FRAME = ("conn_id", "sid", "seq", "shard", "record", "ingest_ts")
_SNAPSHOT = ["conn_id", "sid", "seq"]
_LEVELS = pl.Schema({"conn_id": pl.String, "sid": pl.UInt32, "seq": pl.UInt64, "n": pl.UInt32})
Read = Callable[[Dataset], Iterator[pa.Table]]


class _Gap(msgspec.Struct):
    """What is looked at of a gap row's detail."""

    expected: int | None = None
    got: int | None = None


def hot(client: clickhouse.Client, hour: datetime) -> Place:
    """What ClickHouse has of an hour. Raises what ClickHouse raises."""
    return _place(lambda dataset: hot_hour.tables(client, dataset, hour))


def cold(archive: Archive, hour: datetime) -> Place:
    """What the archive has of an hour. Raises `StoreRefused` for a file that cannot be read."""

    def read(dataset: Dataset) -> Iterator[pa.Table]:
        for file in archive.files(dataset.name, hour):
            yield from batches(
                file, dataset.arrow, ROWS_AT_A_TIME, columns=[c.name for c in dataset.columns]
            )

    return _place(read)


def _place(read: Read) -> Place:
    place = Place()
    kept = [pl.DataFrame(schema=_LEVELS)]
    said = [pl.DataFrame(schema=_LEVELS)]
    # In this order: what stream_events has, the others had before it.
    for rows in _frames(read, STREAM_EVENTS, "kind", "detail"):
        frames = rows.filter(~pl.col("kind").is_in(NOT_FRAMES))
        snapshots = frames.filter(pl.col("kind") == "snapshot")
        place.add(_numbered(snapshots, SNAPSHOT))
        place.add(_numbered(frames.filter(pl.col("kind") != "snapshot"), OTHER))
        place.add_records(rows["shard"], rows["record"])
        said.append(_levels_said(snapshots))
        _add_happenings(place, rows)
    for rows in _frames(read, TRADES):
        place.add(_numbered(rows, TRADE))
        place.add_records(rows["shard"], rows["record"])
    for rows in _frames(read, ORDERBOOK_EVENTS, "type"):
        place.add(_numbered(rows.filter(pl.col("type") == "delta"), DELTA))
        levels = rows.filter(pl.col("type") == "snapshot")
        kept.append(levels.group_by(_SNAPSHOT).agg(pl.len().alias("n").cast(pl.UInt32)))
        place.add_records(rows["shard"], rows["record"])
    _add_levels(place, pl.concat(kept), pl.concat(said))
    return place


def _frames(read: Read, dataset: Dataset, *columns: str) -> Iterator[pl.DataFrame]:
    """The wanted columns of a dataset's rows, texts as texts."""
    wanted = tuple(c for c in dataset.columns if c.name in {*_FRAME, *columns})
    for table in read(dataclasses.replace(dataset, columns=wanted)):
        texts = [pl.col(name).cast(pl.String) for name in ("conn_id", *columns)]
        yield pl.DataFrame(table).with_columns(texts)


def _numbered(rows: pl.DataFrame, kind: int) -> pl.DataFrame:
    """Numbered rows as `Place.add` takes them."""
    return rows.filter(pl.col("seq") > 0).select(
        pl.col("conn_id").alias("conn"),
        "sid",
        "seq",
        "record",
        pl.lit(kind, pl.Int64).alias("kind"),
        "ingest_ts",
    )


def _levels_said(snapshots: pl.DataFrame) -> pl.DataFrame:
    """How many levels each snapshot had, by its own row; a row that is there twice says it once."""
    return (
        snapshots.unique(subset=[*_SNAPSHOT, "record"])
        .with_columns(pl.col("detail").str.extract(r'"levels":\s*(\d+)').cast(pl.UInt32).alias("n"))
        .group_by(_SNAPSHOT)
        .agg(pl.col("n").fill_null(0).sum().cast(pl.UInt32))
    )


def _add_levels(place: Place, kept: pl.DataFrame, said: pl.DataFrame) -> None:
    """Count levels that are missing, or there more often, of snapshots whose own row is there."""
    both = (
        said.group_by(_SNAPSHOT)
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
        place.of[conn, sid].missing_levels += missing
        place.of[conn, sid].doubled_levels += doubled


def _add_happenings(place: Place, rows: pl.DataFrame) -> None:
    """Add what the recording's own notes say: beginnings, and the numbers that gaps name."""
    notes = rows.filter(pl.col("kind").is_in(["connected", "subscribed", "gap"]))
    for conn, sid, kind, detail in notes.select("conn_id", "sid", "kind", "detail").iter_rows():
        if kind == "connected":
            place.opened.add(conn)
        elif kind == "subscribed":
            place.of[conn, sid].begun = True
        else:
            place.add_gaps(named_by(conn, sid, detail))


def named_by(conn: str, sid: int, detail: str | bytes) -> Sequence[tuple[str, int, int, int]]:
    """The numbers that a gap's detail names, as `Place.add_gaps` takes them; nothing where it names none."""
    try:
        gap = typed_json.decode(detail if isinstance(detail, bytes) else detail.encode(), _Gap)
    except msgspec.DecodeError:
        return ()
    if gap.expected is None or gap.got is None:
        return ()
    return ((conn, sid, gap.expected, gap.got),)
