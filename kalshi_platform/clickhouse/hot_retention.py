"""Retention of the hot tables: a TTL for each, from HOT_RETENTION_DAYS.

An existing retention is changed only if the setting is given (in the environment, in `.env`, or by
`migrate --apply-retention`): a command that found no `.env` has the default, which must not delete rows.
The rows that a change deletes are counted before it is applied.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from kalshi_platform.clickhouse.client import Client, translated
from kalshi_platform.clickhouse.cluster import LOCAL, Place, place_of
from kalshi_platform.schema import DATASETS

__all__ = [
    "FOR_EVER_DAYS",
    "RETAINED",
    "Change",
    "apply",
    "changes",
    "in_words",
    "kept",
    "set_days",
]

RETAINED: Mapping[str, str] = {
    dataset.name: dataset.time for dataset in DATASETS.values() if dataset.archived and dataset.hot
}
"""The tables with HOT_RETENTION_DAYS, with the column that holds a row's time."""

FOR_EVER_DAYS = 20_000
"""Days (54 years) from which no TTL is set: ClickHouse's DateTime ends in 2106 and would wrap around."""

_NOTHING = datetime(1970, 1, 1, tzinfo=UTC)
_TTL = re.compile(r"\bTTL toDateTime\(\w+\) \+ toIntervalDay\((\d+)\)")


@dataclass(frozen=True)
class Change:
    """A table whose retention differs from the setting. Days are None for "for ever"."""

    table: str
    now: int | None
    wanted: int | None
    rows: int
    """Rows older than the wanted days, which the change deletes."""
    days: int
    """Number of calendar days (UTC) of these rows."""

    @property
    def shortens(self) -> bool:
        """Whether the change shortens the retention."""
        return self.wanted is not None and (self.now is None or self.wanted < self.now)

    def __str__(self) -> str:
        text = f"{self.table}: {in_words([self.now])} → {in_words([self.wanted])}"
        if self.rows:
            text += f", which deletes {self.rows:,} rows of {_counted(self.days, 'day')}"
        return text


def kept(client: Client) -> Mapping[str, int | None]:
    """The retention of each existing table in days, according to the server; None: for ever."""
    return {table: days for table, (_, days) in _existing(client, RETAINED).items()}


def changes(
    client: Client, days: int, tables: Collection[str] = tuple(RETAINED)
) -> Sequence[Change]:
    """The tables whose retention is not `days`, with the rows that a change would delete."""
    wanted = days if days < FOR_EVER_DAYS else None
    return [
        Change(table, now, wanted, *_expired(client, table, wanted))
        for table, (_, now) in _existing(client, tables).items()
        if now != wanted
    ]


def apply(client: Client, wanted: Iterable[Change], notify: Callable[[str], None]) -> None:
    """Apply the changes; each is reported to `notify` and recorded in `retention_changes` before."""
    for change in wanted:
        notify(str(change))
        _record(client, change)
        set_days(client, change)


def set_days(client: Client, *changes: Change) -> None:
    """Set tables' retention without a report or record: for new tables."""
    for change in changes:
        with translated():
            ((where, _),) = _existing(client, [change.table]).values()
            ttl = (
                "REMOVE TTL"
                if change.wanted is None
                else f"MODIFY TTL toDateTime({RETAINED[change.table]}) + toIntervalDay({change.wanted:d})"
            )
            client.command(f"ALTER TABLE {where.target} {ttl}")


def _record(client: Client, change: Change) -> None:
    """Record a change: the lossless proof must know which rows the former retention may have deleted."""
    now = datetime.now(UTC)
    taken_before = _NOTHING if change.now is None else now - timedelta(days=change.now)
    with translated():
        client.command(
            "INSERT INTO retention_changes"
            " (changed_at, table_name, days_before, days_after, rows_deleted, taken_before)"
            " SELECT {at:DateTime64(6, 'UTC')}, {table:String}, {before:Nullable(UInt32)},"
            " {after:Nullable(UInt32)}, {rows:UInt64}, {taken:DateTime64(6, 'UTC')}",
            parameters={
                "at": now,
                "table": change.table,
                "before": change.now,
                "after": change.wanted,
                "rows": change.rows,
                "taken": taken_before,
            },
        )


def in_words(days: Iterable[int | None]) -> str:
    """`30 days`, `7 to 30 days`, `for ever`."""
    different = sorted({FOR_EVER_DAYS if number is None else number for number in days})
    if not different:
        return "nothing"
    if different[0] >= FOR_EVER_DAYS:
        return "for ever"
    least = _counted(different[0], "day")
    if len(different) == 1:
        return least
    most = different[-1]
    return f"{different[0]:,} to {'for ever' if most >= FOR_EVER_DAYS else _counted(most, 'day')}"


def _existing(client: Client, tables: Iterable[str]) -> Mapping[str, tuple[Place, int | None]]:
    """Where the rows of each existing table are stored, and its retention in days."""
    wanted = list(tables)
    with translated():
        answer = client.query(
            "SELECT name, engine_full, database, create_table_query FROM system.tables"
            " WHERE database = currentDatabase() AND name IN {names:Array(String)}",
            parameters={"names": [*wanted, *(table + LOCAL for table in wanted)]},
        ).result_rows
    created = {
        str(name): (str(engine), str(database), str(sql)) for name, engine, database, sql in answer
    }
    found = {}
    for table in wanted:
        if table not in created:
            continue  # the applied migrations do not create it
        engine, database, _ = created[table]
        where = place_of(table, engine, database)
        ttl = _TTL.search(created[where.table][2])
        found[table] = (where, int(ttl[1]) if ttl else None)
    return found


def _expired(client: Client, table: str, days: int | None) -> tuple[int, int]:
    """(rows, calendar days) of a table that are older than `days`."""
    if days is None:
        return 0, 0
    clock = RETAINED[table]
    with translated():
        ((rows, day_count),) = client.query(
            f"SELECT count(), uniqExact(toDate({clock})) FROM {table}"  # noqa: S608 - constants, no user text
            f" WHERE {clock} < {{before:DateTime64(6, 'UTC')}}",
            parameters={"before": datetime.now(UTC) - timedelta(days=days)},
        ).result_rows
    return int(rows), int(day_count)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
