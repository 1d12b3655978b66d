"""Is every numbered frame accounted for, and did every gap end? Asked of ClickHouse, as it is now.

The proof itself is `infra/queries/lossless_proof.sql`, word for word; here it is only told which span
of time to read. What a finding means for a check's colour is not said here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from kalshi_platform.storage import clickhouse, queries

Row = Mapping[str, Any]
WHOLE_EVENTS = 10_000_000
"""Up to so many events everything that is hot is proved each time: 1.5 s on two cores."""
WINDOW = timedelta(hours=3)
"""What is proved of a larger table, at least. Only a hole with nothing of its subscription for three
hours on one side of it would be passed over."""
RECENT = timedelta(hours=1)
"""For how long gaps and mismatches are told."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BEGIN = "\nWITH\n"
_SPAN = (
    "{table} AS (SELECT * FROM {{database:Identifier}}.{table}"
    " WHERE ingest_ts >= {{since:DateTime64(6, 'UTC')}}"
    " AND ingest_ts <= {{until:DateTime64(6, 'UTC')}}),\n"
)


@dataclass(frozen=True)
class Extent:
    """What is hot. `whole_until`: both tables have everything up to then."""

    events: int
    stream_rows: int
    first: datetime
    whole_until: datetime
    newest: datetime

    @property
    def empty(self) -> bool:
        """Whether nothing has been loaded yet."""
        return not self.stream_rows


@dataclass(frozen=True)
class Proof:
    """What the proof found between two receive times."""

    since: datetime
    until: datetime
    subscriptions: int
    frames: int
    named_holes: int
    offenders: tuple[Row, ...]
    """Subscriptions with a hole that no gap row names, or with a doubled number."""


@dataclass(frozen=True)
class Gaps:
    """What the recording itself noticed lately."""

    named: tuple[Row, ...]
    """Gaps, the longest first, as in infra/queries/checks/gaps.sql."""
    mismatches: tuple[Row, ...]
    """Levels that differed from the exchange's, newest first."""


def extent(client: clickhouse.Client) -> Extent:
    """What ClickHouse has. Costs nothing: no row is read."""
    (row,) = ask(client, "checks/extent")
    return Extent(**row)


def prove(
    client: clickhouse.Client, hot: Extent, retention_days: int, since: datetime | None = None
) -> Proof:
    """Prove what is hot: all of a small table, else the newest `WINDOW` and what is after `since`.

    A finding in a window is a finding only if all that is hot gives it, too: a receive clock that was
    set back can move a frame over the window's edge. What retention may be taking at this moment is
    left out. Raises what the store raises.
    """
    until = hot.whole_until
    kept = max(hot.first, EPOCH, until - timedelta(days=min(retention_days, 20_000)))
    begin = kept
    if hot.events > WHOLE_EVENTS:
        begin = max(kept, min(until - WINDOW, since or until))
    rows = _proof(client, begin, until)
    if begin > kept and any(_offends(row) for row in rows):
        begin = kept
        rows = _proof(client, begin, until)
    return Proof(
        since=begin,
        until=until,
        subscriptions=len(rows),
        frames=sum(row["frames"] for row in rows),
        named_holes=sum(row["named_holes"] for row in rows),
        offenders=tuple(row for row in rows if _offends(row)),
    )


def gaps(client: clickhouse.Client, until: datetime) -> Gaps:
    """Gaps and mismatches of the hour before `until`."""
    span = {"since": until - RECENT, "until": until}
    return Gaps(
        named=tuple(ask(client, "checks/gaps", span)),
        mismatches=tuple(ask(client, "checks/mismatches", span)),
    )


def ask(
    client: clickhouse.Client, name: str, parameters: Mapping[str, Any] | None = None
) -> Sequence[dict[str, Any]]:
    """The rows of one of the project's queries, by column."""
    return _rows(client, queries.text(name), parameters)


def _proof(client: clickhouse.Client, since: datetime, until: datetime) -> Sequence[Row]:
    text = queries.text("lossless_proof")
    if text.count(_BEGIN) != 1:
        raise ValueError("lossless_proof.sql no longer begins with one WITH at the left margin")
    tables = ("orderbook_events", "trades", "stream_events")
    spans = "".join(_SPAN.format(table=table) for table in tables)
    parameters = {"database": client.database, "since": since, "until": until}
    return _rows(client, text.replace(_BEGIN, _BEGIN + spans), parameters)


def _rows(
    client: clickhouse.Client, text: str, parameters: Mapping[str, Any] | None
) -> Sequence[dict[str, Any]]:
    with clickhouse.translated():
        answer = client.query(text, parameters=dict(parameters or {}))
    return [dict(zip(answer.column_names, row, strict=True)) for row in answer.result_rows]


def _offends(row: Row) -> bool:
    return bool(row["unexplained_holes"] or row["doubled"])
