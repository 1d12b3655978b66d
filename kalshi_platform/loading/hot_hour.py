"""A dataset's hour as ClickHouse has it, read in pieces that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

import pyarrow as pa

from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.loading.rebuild import as_archived, select_list
from kalshi_platform.schema import Dataset
from kalshi_platform.utc_hours import HOUR

ROWS_AT_A_TIME = 500_000
"""Rows that are in memory at once, unless one minute has more."""


def hours(client: clickhouse.Client, datasets: Sequence[Dataset]) -> list[datetime]:
    """The hours of which ClickHouse has rows of any of the datasets, ascending."""
    found: set[datetime] = set()
    for dataset in datasets:
        with clickhouse.translated():
            rows = client.query(
                f"SELECT DISTINCT toStartOfHour({dataset.time}, 'UTC') FROM {dataset.name}"  # noqa: S608 - the schema's own names
            ).result_rows
        found |= {at.astimezone(UTC) for (at,) in rows}
    return sorted(found)


def tables(
    client: clickhouse.Client, dataset: Dataset, hour: datetime, table: str | None = None
) -> Iterator[pa.Table]:
    """The hour's rows in the archive's own types, some minutes at a time, in no order.

    `table`: another one of the same columns to read them from.
    """
    clock, source = dataset.time, table or dataset.name
    span = f"{clock} >= {{start:DateTime64(6, 'UTC')}} AND {clock} < {{end:DateTime64(6, 'UTC')}}"
    with clickhouse.translated():
        minutes = client.query(
            f"SELECT toMinute({clock}, 'UTC') AS minute, count() FROM {source}"  # noqa: S608 - the schema's own names
            f" WHERE {span} GROUP BY minute ORDER BY minute",
            parameters={"start": hour, "end": hour + HOUR},
        ).result_rows
    for first, end in _pieces(minutes):
        with clickhouse.translated():
            found = client.query_arrow(
                f"SELECT {select_list(dataset)} FROM {source} WHERE {span}",  # noqa: S608
                parameters={
                    "start": hour + timedelta(minutes=first),
                    "end": hour + timedelta(minutes=end),
                },
            )
        yield as_archived(found, dataset)


def _pieces(minutes: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """(first minute, end minute) of spans with about ROWS_AT_A_TIME rows, or one minute."""
    first, held = 0, 0
    for minute, count in minutes:
        if held and held + count > ROWS_AT_A_TIME:
            yield first, minute
            first, held = minute, 0
        held += count
    if held:
        yield first, 60
