"""Compare the stored rows with the journal, and the books with the exchange's.

Counted here without the platform's code for it, whose own verdict (`kalshi-platform proof`) has to agree. The
streamers must have ended: every journal is read whole, of every shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform.archive import open_archive
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.embedded_clickhouse import running as clickhouse_running
from kalshi_platform.exchange.frames import decode_head
from kalshi_platform.exchange.numbers import contracts, dollars
from kalshi_platform.journal import reader
from kalshi_platform.journal.kind import Kind
from kalshi_platform.quality import proof as own_proof
from kalshi_platform.settings import Settings
from kalshi_platform.simulator.server import Simulator

PROOF = Path(__file__).resolve().parents[2] / "infra" / "queries" / "lossless_proof.sql"

DELTAS, TRADES, LIVES = "order-book deltas", "trades", "market lives"
_LIVES = ("market_lifecycle_v2", "event_lifecycle", "event_fee_update")
_ROWS = {
    DELTAS: ("orderbook_events", "type = 'delta'"),
    TRADES: ("trades", "true"),
    LIVES: ("stream_events", f"kind IN {_LIVES}"),
}
"""The rows that are built from a kind of frame, one each."""
_KEYS = {
    "orderbook_events": ("conn_id", "sid", "seq", "side", "price"),
    "trades": ("trade_id",),
    "stream_events": ("ingest_ts", "conn_id", "sid", "seq", "kind", "market_ticker", "detail"),
}
"""Columns that identify a row of a dataset."""


@dataclass(frozen=True)
class Kept:
    """Frames of one kind: in the journal, and as rows in each store."""

    journalled: int
    hot: int
    cold: int

    @property
    def lost(self) -> int:
        """Number of rows by which the stores differ from the journal."""
        return abs(self.journalled - self.hot) + abs(self.journalled - self.cold)


@dataclass(frozen=True)
class Proof:
    """The results."""

    frames: int
    kept: Mapping[str, Kept]
    """By kind of frame."""
    rows_hot: Mapping[str, int]
    rows_cold: Mapping[str, int]
    """Rows of each dataset."""
    doubled: int
    unexplained: int
    """Numbers missing without a gap row."""
    books_differ: int
    """Levels that differ from the exchange's books of the markets that are open."""
    connections: int
    ends: int
    """`disconnected` rows."""
    spans: int
    """Those of them that give cause and span."""
    gaps: int
    verdict: str
    """The verdict of `kalshi-platform proof`."""

    @property
    def lost(self) -> int:
        """Journalled frames that a store does not have."""
        return sum(kept.lost for kept in self.kept.values())

    @property
    def sound(self) -> bool:
        """Whether every promise was kept."""
        broken = self.lost or self.doubled or self.unexplained or self.books_differ
        return not broken and self.connections == self.ends and self.verdict == "whole"


def prove(settings: Settings, simulator: Simulator) -> Proof:
    """Start the ClickHouse of the data folder alone, and compare."""
    with clickhouse_running(settings.data_dir / "clickhouse") as url:
        return compare(settings.model_copy(update={"clickhouse_url": str(url)}), simulator)


def compare(settings: Settings, simulator: Simulator) -> Proof:
    """Read everything and compare. The simulator must have been paused before the last frame."""
    frames, journalled = _journalled(settings)
    cold = {what: _cold_rows(settings, dataset, where) for what, (dataset, where) in _ROWS.items()}
    rows_cold = {dataset: _cold_rows(settings, dataset, "true") for dataset in _KEYS}
    open_markets = simulator.open_markets()
    client = clickhouse.connect(settings)

    def query(sql: str) -> list[Any]:
        return list(client.query(sql).result_rows)

    def count(table: str, where: str = "true") -> int:
        return int(query(f"SELECT count() FROM {table} WHERE {where}")[0][0])

    hot = {what: count(*of) for what, of in _ROWS.items()}
    rows_hot = {dataset: count(dataset) for dataset in _KEYS}
    proof = client.query(PROOF.read_text().strip().rstrip(";"))
    subscriptions = [dict(zip(proof.column_names, r, strict=True)) for r in proof.result_rows]
    kinds = dict(query("SELECT kind, count() FROM stream_events GROUP BY kind"))
    spans = count("stream_events", "kind = 'disconnected' AND detail LIKE '%\"span_s\"%'")
    levels = {
        (ticker, side, f"{price:.4f}", f"{size:.2f}")
        for ticker, side, price, size in query(
            "SELECT market_ticker, side, price, size FROM latest_levels FINAL WHERE size > 0"
        )
        if ticker in open_markets
    }
    return Proof(
        frames=frames,
        kept={what: Kept(journalled[what], hot[what], cold[what]) for what in _ROWS},
        rows_hot=rows_hot,
        rows_cold=rows_cold,
        doubled=sum(subscription["doubled"] for subscription in subscriptions)
        + sum(doubled(settings, dataset) for dataset in _KEYS)
        + sum(abs(rows_hot[dataset] - rows_cold[dataset]) for dataset in _KEYS),
        unexplained=sum(subscription["unexplained_holes"] for subscription in subscriptions),
        books_differ=len(levels ^ _truth(simulator, open_markets)),
        connections=kinds.get("connected", 0),
        ends=kinds.get("disconnected", 0),
        spans=spans,
        gaps=kinds.get("gap", 0),
        verdict=own_proof.prove(settings, open_archive(settings), None, lambda *_: None).verdict,
    )


def archived(settings: Settings, dataset: str) -> pl.LazyFrame:
    """Every row of a dataset in Parquet."""
    return pl.scan_parquet(
        f"{settings.archive_dir}/{dataset}/**/*.parquet", hive_partitioning=False
    )


def _journalled(settings: Settings) -> tuple[int, Counter[str]]:
    """Frames in all journals, and how many of each kind that becomes a row."""
    kinds = np.zeros(len(Kind), np.int64)
    found: Counter[str] = Counter()
    for folder in sorted(settings.journals_dir.glob("shard-*")):
        for block in reader.record_ranges(folder, reader.oldest_offset(folder)):
            of = block.batch.column("kind").cast(pa.int64())
            kinds += np.bincount(of.to_numpy(), minlength=len(Kind))
            others = block.batch.column("frame").filter(pc.equal(of, int(Kind.CONTROL)))
            found[LIVES] += sum(decode_head(f).type in _LIVES for f in others.to_pylist())
    found[DELTAS], found[TRADES] = int(kinds[Kind.DELTA]), int(kinds[Kind.TRADE])
    return int(kinds.sum() - kinds[Kind.NOTE]), found


def _cold_rows(settings: Settings, dataset: str, where: str) -> int:
    rows = archived(settings, dataset).filter(pl.sql_expr(where)).select(pl.len())
    return int(rows.collect().item())


def doubled(settings: Settings, dataset: str) -> int:
    """Rows of the archive that are there once more."""
    repeated = archived(settings, dataset).group_by(_KEYS[dataset]).len()
    extra = repeated.select((pl.col("len") - 1).cast(pl.Int64).sum())
    return int(extra.collect(engine="streaming").item() or 0)


def _truth(simulator: Simulator, tickers: frozenset[str]) -> set[tuple[str, str, str, str]]:
    return {
        (ticker, side, dollars(price), contracts(size))
        for ticker, book in simulator.books().items()
        if ticker in tickers
        for side, ladder in (("yes", book.yes), ("no", book.no))
        for price, size in ladder.items()
    }
