"""Is every numbered frame accounted for, and did every gap end? Asked of ClickHouse, as it is now.

The proof itself is `infra/queries/lossless_proof.sql`, word for word but for its span of time, which is
given here. What a finding means for a check's colour is not said here.
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
"""Up to so many events everything that is hot is proved each time: some 2 s on two cores."""
WINDOW = timedelta(hours=3)
"""What is proved of a larger table, at least. Only a hole with nothing of its subscription for three
hours on one side of it would be passed over."""
RECENT = timedelta(hours=1)
"""For how long gaps and mismatches are told."""
RECORDED = ("orderbook_events", "trades", "stream_events")
"""Tables of numbered frames."""
EPOCH = datetime(1971, 1, 1, tzinfo=UTC)
"""Where the proof of everything begins."""
_SPAN = re.compile(r"toDateTime64\('[^']+', 6, 'UTC'\)(?= +AS (since|until)\b)")


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
    """Subscriptions with a hole that no gap row names, with rows stored twice, or without levels."""


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


def prove(client: clickhouse.Client, hot: Extent, since: datetime | None = None) -> Proof:
    """Prove what is hot: all of a small table, else the newest `WINDOW` and what is after `since`.

    A finding in a window is a finding only if all that is hot gives it, too: a receive clock that was
    set back can move a frame over the window's edge. Raises what the store raises.
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
    """Receive time before which retention may have taken rows, as lossless_proof.sql has it; None: of none."""
    kept = hot_retention.kept(client)
    days = [d for name in RECORDED if (d := kept.get(name)) is not None]
    ages = [datetime.now(UTC) - timedelta(days=min(days))] if days else []
    with clickhouse.translated():
        ((before,),) = client.query("SELECT max(taken_before) FROM retention_changes").result_rows
    return max([at for at in (*ages, before.astimezone(UTC)) if at > EPOCH], default=None)


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
