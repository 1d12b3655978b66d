"""Tables whose rows are changes: of the top of the book, of depth and of imbalance, over hours.

An hour's rows are the archive's own where a computed dataset has them and names the very content of the sealed hour as
its origin; else they are computed here from the recorded rows, by the same functions. Between two rows of a market
nothing changed: the state at an instant is the newest row whose `known_at` is at or before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

import polars as pl

from kalshi_platform.analytics import replay
from kalshi_platform.analytics.computed import COMPUTED
from kalshi_platform.archive import Archive
from kalshi_platform.reading.covered import Condition, Period, RecordedHour
from kalshi_platform.reading.rows import KNOWN, TICKER, VERIFIED, for_each, frame, manifest, read
from kalshi_platform.schema import DATASETS, PLACE


def changes(
    archive: Archive,
    dataset: str,
    there: Sequence[RecordedHour],
    tickers: Sequence[str],
    *,
    start: datetime,
    end: datetime,
) -> pl.DataFrame:
    """Read the changes of a span; the first row of each market is its state at `start`, with its own `known_at`.

    Args:
        archive: The archive.
        dataset: A name of `COMPUTED`.
        there: The hours of the span, and for a dataset of seconds the one before.
        tickers: The markets.
        start: The first instant.
        end: The instant after the last.

    Returns:
        The rows in their order, with the dataset's columns.
    """
    if not there:
        return frame([], DATASETS[dataset].arrow)
    listed = archive.listing(dataset, there[0].hour, there[-1].hour)
    may_be = [
        (one, file)
        for one in there
        if one.sealed and one.hour in listed and (file := listed[one.hour].manifest) is not None
    ]
    manifests = for_each(
        archive, lambda of: manifest(archive, dataset, of[0].hour, of[1].version), may_be
    )
    current = {
        one.hour
        for (one, _), found in zip(may_be, manifests, strict=True)
        if found is not None and found.computed_from == one.content
    }
    compute = COMPUTED[dataset]
    parts = [
        read(archive, dataset, {hour: listed[hour] for hour in sorted(current)}, tickers),
        *(
            frame([compute(replay.read(archive, one.hour, tickers))], DATASETS[dataset].arrow)
            for one in there
            if one.hour not in current
        ),
    ]
    rows = pl.concat(parts).filter(pl.col(KNOWN) < end)
    rows = rows.sort(TICKER, KNOWN, maintain_order=True)
    newest = (pl.col(KNOWN) <= start).sum().over(TICKER).cast(pl.Int64) - 1
    number = pl.int_range(pl.len()).over(TICKER)
    return _without_repeats(rows.filter(number >= newest))


def _without_repeats(rows: pl.DataFrame) -> pl.DataFrame:
    """Leave out the state with which an hour begins, where the row before already has it."""
    said = [name for name in rows.columns if name not in _NOT_STATE]
    if "cause" in rows.columns:
        may_repeat = pl.col("cause") == "checkpoint"
    else:
        may_repeat = pl.col("second") == pl.col("second").dt.truncate("1h")
        if "ofi" in said:
            may_repeat &= pl.col("ofi") == 0
            said.remove("ofi")
    same = [pl.col(name).eq_missing(pl.col(name).shift()) for name in [TICKER, *said]]
    return rows.filter(~(may_repeat & pl.all_horizontal(same)))


_NOT_STATE = {TICKER, KNOWN, "ts", "ingest_ts", "conn_id", "sid", "seq", "cause", "second", *PLACE}
"""Columns that say which row it is, not what the book was."""


def marked(rows: pl.DataFrame, found: Mapping[str, Sequence[Period]]) -> pl.DataFrame:
    """Clear `verified` wherever a book is not covered, with a row where that begins and one where it ends.

    The added rows repeat the state of the row before; their `known_at` is the instant.
    """
    edges = pl.DataFrame(
        [
            (ticker, period.start, period.condition is Condition.SYNCED, bool(number))
            for ticker, periods in found.items()
            for number, period in enumerate(periods)
        ],
        schema={
            TICKER: pl.String,
            KNOWN: rows.schema[KNOWN],
            "covered": pl.Boolean,
            "added": pl.Boolean,
        },
        orient="row",
    ).sort(KNOWN)
    if edges["covered"].all():
        return rows
    ordered = rows.sort(KNOWN, maintain_order=True)
    # The state at the span's start may have become known before.
    since = pl.max_horizontal(pl.col(KNOWN), pl.lit(edges[KNOWN][0])).alias("since")
    kept = ordered.with_columns(since).join_asof(
        edges.select(TICKER, pl.col(KNOWN).alias("since"), "covered"),
        on="since",
        by=TICKER,
        check_sortedness=False,
    )
    before = ordered.with_columns(pl.lit(True).alias("had"))
    edges = edges.filter("added").join_asof(before, on=KNOWN, by=TICKER, check_sortedness=False)
    edges = edges.filter("had").select(*rows.columns, "covered")
    columns = [*rows.columns, "covered"]
    both = pl.concat([kept.select(columns), edges.select(columns)])
    both = both.sort(TICKER, KNOWN, maintain_order=True)
    covered = pl.col("covered").fill_null(value=False)
    both = both.with_columns((pl.col(VERIFIED) & covered).alias(VERIFIED)).drop("covered")
    said = [TICKER, *(name for name in rows.columns if name not in _NOT_STATE)]
    same = [pl.col(name).eq_missing(pl.col(name).shift()) for name in said]
    ofi = pl.col("ofi") != 0 if "ofi" in rows.columns else pl.lit(value=False)
    return both.filter(~pl.all_horizontal(same) | ofi)


def sampled(rows: pl.DataFrame, tickers: Sequence[str], instants: pl.Series) -> pl.DataFrame:
    """Take the state at each instant, in a column `at` after the ticker; null where none was known yet."""
    grid = pl.DataFrame({TICKER: sorted(tickers)}).join(pl.DataFrame({"at": instants}), how="cross")
    found = grid.join_asof(
        rows.sort(KNOWN, maintain_order=True),
        left_on="at",
        right_on=KNOWN,
        by=TICKER,
        check_sortedness=False,
        coalesce=False,
    )
    return found.with_columns(pl.col(VERIFIED).fill_null(value=False)).sort(TICKER, "at")
