"""Reads a dataset's hour from ClickHouse in batches that fit into memory. Comparing it belongs in `restore`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

import pyarrow as pa

from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.loading.rebuild import as_archived, select_list
from kalshi_platform.schema import Dataset
from kalshi_platform.utc_hours import HOUR

BATCH_ROWS = 500_000
"""Maximum number of rows in memory, unless one minute has more."""


def hours(client: clickhouse.Client, datasets: Sequence[Dataset]) -> list[datetime]:
    """The hours for which ClickHouse has rows of any of the datasets, ascending."""
    result: set[datetime] = set()
    for dataset in datasets:
        with clickhouse.translated():
            rows = client.query(
                f"SELECT DISTINCT toStartOfHour({dataset.time}, 'UTC') FROM {dataset.name}"  # noqa: S608 - the schema's own names
            ).result_rows
        result |= {at.astimezone(UTC) for (at,) in rows}
    return sorted(result)


def tables(
    client: clickhouse.Client, dataset: Dataset, hour: datetime, table: str | None = None
) -> Iterator[pa.Table]:
    """Yield the hour's rows with the archive's types, some minutes at a time, unordered.

    `table`: read from this table with the same columns instead.
    """
    clock, source = dataset.time, table or dataset.name
    span = f"{clock} >= {{start:DateTime64(6, 'UTC')}} AND {clock} < {{end:DateTime64(6, 'UTC')}}"
    with clickhouse.translated():
        minutes = client.query(
            f"SELECT toMinute({clock}, 'UTC') AS minute, count() FROM {source}"  # noqa: S608 - the schema's own names
            f" WHERE {span} GROUP BY minute ORDER BY minute",
            parameters={"start": hour, "end": hour + HOUR},
        ).result_rows
    for first, end in _minute_spans(minutes):
        with clickhouse.translated():
            rows = client.query_arrow(
                f"SELECT {select_list(dataset)} FROM {source} WHERE {span}",  # noqa: S608
                parameters={
                    "start": hour + timedelta(minutes=first),
                    "end": hour + timedelta(minutes=end),
                },
            )
        yield as_archived(rows, dataset)


def _minute_spans(minutes: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Yield (first minute, end minute) of spans with at most `BATCH_ROWS` rows, or of one minute."""
    first, rows = 0, 0
    for minute, count in minutes:
        if rows and rows + count > BATCH_ROWS:
            yield first, minute
            first, rows = minute, 0
        rows += count
    if rows:
        yield first, 60
