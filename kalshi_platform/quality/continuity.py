"""Check in ClickHouse that every numbered frame is stored or named by a gap row, and list recent gaps.

The proof is `infra/queries/lossless_proof.sql`, word for word except for its time span, which is a parameter
here. What a finding means for the colour of an asset check is in `orchestration.checks`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.clickhouse import hot_retention, queries

Row = Mapping[str, Any]
WHOLE_EVENTS = 10_000_000
"""Up to this many events, everything in ClickHouse is proved each time: some 2 s on two cores."""
WINDOW = timedelta(hours=3)
"""The span that is proved of a larger table, at least. Only a gap without any row of its subscription within three
hours on one side of it would be missed."""
RECENT = timedelta(hours=1)
"""How long gaps and mismatches are reported."""
DRIFT_LASTS = timedelta(hours=25)
"""How long drift is reported: while it goes on, it has a row on each day."""
RECORDED = ("orderbook_events", "trades", "stream_events")
"""Tables of numbered frames."""
EPOCH = datetime(1971, 1, 1, tzinfo=UTC)
"""Start of a proof of everything."""
_SPAN = re.compile(r"toDateTime64\('[^']+', 6, 'UTC'\)(?= +AS (since|until)\b)")


@dataclass(frozen=True)
class Extent:
    """The extent of ClickHouse's tables. `whole_until`: both tables have everything up to then."""

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
    """The proof's result between two receive times."""

    since: datetime
    until: datetime
    subscriptions: int
    frames: int
    named_holes: int
    offenders: tuple[Row, ...]
    """Subscriptions with a gap that no row names, with rows stored twice, or with missing levels."""


@dataclass(frozen=True)
class Gaps:
    """Recent gaps and mismatches that the recorder itself noticed."""

    named: tuple[Row, ...]
    """Gaps, the longest first, as in infra/queries/checks/gaps.sql."""
    mismatches: tuple[Row, ...]
    """Levels that differed from the exchange's, newest first."""


@dataclass(frozen=True)
class Clocks:
    """What the exchange's clocks showed in the last hour."""

    fell: tuple[Row, ...]
    """Clocks that fell, newest first, as in infra/queries/checks/clocks.sql."""
    markets: int
    """Markets with a snapshot after a gap or a reconnect; one counts each time."""
    unchanged: int
    changed: int


def extent(client: clickhouse.Client) -> Extent:
    """Return the extent of ClickHouse's tables. Cheap: no row is read."""
    (row,) = ask(client, "checks/extent")
    return Extent(**row)


def prove(client: clickhouse.Client, hot: Extent, since: datetime | None = None) -> Proof:
    """Prove ClickHouse's tables: a small table completely, else the newest `WINDOW` and everything after `since`.

    A finding in a window is confirmed on everything, because a receive clock that was set back can move a
    frame across the window's edge. Raises `StoreError` as the store does.
    """
    until = hot.whole_until
    begin = EPOCH
    if hot.events > WHOLE_EVENTS:
        begin = max(hot.first, min(until - WINDOW, since or until))
    rows = _proof(client, begin, until)
    if begin > EPOCH and any(_offends(row) for row in rows):
        begin = EPOCH
        rows = _proof(client, begin, until)
    return Proof(
        since=max(begin, hot.first),
        until=until,
        subscriptions=len(rows),
        frames=sum(row["frames"] for row in rows),
        named_holes=sum(row["named_holes"] for row in rows),
        offenders=tuple(row for row in rows if _offends(row)),
    )


def taken_before(client: clickhouse.Client) -> datetime | None:
    """Return the receive time before which retention may have deleted rows, as in lossless_proof.sql; None if it
    deletes nothing."""
    kept = hot_retention.kept(client)
    days = [d for name in RECORDED if (d := kept.get(name)) is not None]
    ages = [datetime.now(UTC) - timedelta(days=min(days))] if days else []
    with clickhouse.translated():
        ((before,),) = client.query("SELECT max(taken_before) FROM retention_changes").result_rows
    return max([at for at in (*ages, before.astimezone(UTC)) if at > EPOCH], default=None)


def gaps(client: clickhouse.Client, until: datetime) -> Gaps:
    """Return the gaps and mismatches of the hour before `until`."""
    span = {"since": until - RECENT, "until": until}
    return Gaps(
        named=tuple(ask(client, "checks/gaps", span)),
        mismatches=tuple(ask(client, "checks/mismatches", span)),
    )


def clocks(client: clickhouse.Client, until: datetime) -> Clocks:
    """Return the clocks that fell in the hour before `until`, and what the clocks showed after its gaps."""
    span = {"since": until - RECENT, "until": until}
    (counts,) = ask(client, "checks/resyncs", span)
    return Clocks(fell=tuple(ask(client, "checks/clocks", span)), **counts)


def drift(client: clickhouse.Client, until: datetime) -> Sequence[Row]:
    """Return what drifted on the wire in the day before `until`, newest first; see infra/queries/checks/drift.sql."""
    return ask(client, "checks/drift", {"since": until - DRIFT_LASTS, "until": until})


def ask(
    client: clickhouse.Client, name: str, parameters: Mapping[str, Any] | None = None
) -> Sequence[dict[str, Any]]:
    """Run one of the project's queries; return its rows as dictionaries by column."""
    return _rows(client, queries.text(name), parameters)


def _proof(client: clickhouse.Client, since: datetime, until: datetime) -> Sequence[Row]:
    text, found = _SPAN.subn(r"{\1:DateTime64(6, 'UTC')}", queries.text("lossless_proof"))
    if found != 2:
        raise ValueError("lossless_proof.sql no longer names its span as `since` and `until`")
    return _rows(client, text, {"since": since, "until": until})


def _rows(
    client: clickhouse.Client, text: str, parameters: Mapping[str, Any] | None
) -> Sequence[dict[str, Any]]:
    with clickhouse.translated():
        answer = client.query(text, parameters=dict(parameters or {}))
    return [dict(zip(answer.column_names, row, strict=True)) for row in answer.result_rows]


def _offends(row: Row) -> bool:
    return bool(row["unexplained_holes"] or row["missing_levels"] or row["doubled"])
