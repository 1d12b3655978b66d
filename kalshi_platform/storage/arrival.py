"""Whether rows that a single ClickHouse server has acknowledged are really there.

A server writes an insert's token down before it makes the rows visible. One that is killed in between
knows the token of rows that it does not have: it takes the same insert for a repetition, acknowledges
it, and the rows are nowhere. So after a kill, and after any insert that failed, a repeated insert is
looked for, and sent again under another token where it is missing. An insert's rows of one day become
one part, which is there whole or not at all: one row of each day answers for all.

Replicated tables commit token and rows in one step (Keeper), and another replica may not have them yet:
of those nothing is looked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform.storage import clickhouse
from kalshi_platform.storage.errors import StoreUnavailable
from kalshi_platform.storage.schema import (
    BOOK_CHECKPOINTS,
    ORDERBOOK_EVENTS,
    STREAM_EVENTS,
    TRADES,
    Key,
)

TRIES = 5
"""New tokens before the server is taken to be away: it cannot be killed that often by chance."""
_OF_ONE_SERVER = frozenset({"MergeTree", "ReplacingMergeTree"})
_DAY_US = 86_400_000_000
_BEGINNING = 200
"""Characters of a text that are compared: parameters travel in the URL."""
_FRAME = ("conn_id", "sid", "seq", "market_ticker")
KEYS: Mapping[str, Key] = {
    ORDERBOOK_EVENTS.name: Key("ingest_ts", (*_FRAME, "type", "side", "price")),
    TRADES.name: Key("ingest_ts", (*_FRAME, "trade_id")),
    STREAM_EVENTS.name: Key("ingest_ts", (*_FRAME, "kind", "detail")),
    BOOK_CHECKPOINTS.name: Key("ts", (*_FRAME, "side", "price")),
}
"""Of what is recorded."""


def insist(client: clickhouse.Client, name: str, table: pa.Table, token: str, key: Key) -> None:
    """Insert rows that may have been inserted under this token before, until they are there, once.

    Raises `StoreUnavailable` where the server goes on acknowledging rows that it does not have.
    """
    clickhouse.insert_arrow(client, name, table, token)
    if not _keeps_tokens_apart(client, name):
        return
    for again in range(1, TRIES + 1):
        missing = [
            (day, part) for day, part in _days(table, key) if not _is_there(client, name, part, key)
        ]
        if not missing:
            return
        for day, part in missing:
            clickhouse.insert_arrow(client, name, part, f"{token}:{day}:{again}")
    raise StoreUnavailable(
        f"ClickHouse acknowledged {table.num_rows:,} rows of {name} {TRIES + 1} times, and has not got"
        " them. Recorded rows that are older than HOT_RETENTION_DAYS it lets go of at once."
    )


def _keeps_tokens_apart(client: clickhouse.Client, name: str) -> bool:
    """Whether the table is of one server alone, which keeps tokens in a file beside the rows."""
    with clickhouse.translated():
        found = client.query(
            "SELECT engine FROM system.tables WHERE database = currentDatabase() AND name = {name:String}",
            parameters={"name": name},
        )
    return bool(found.result_rows) and str(found.result_rows[0][0]) in _OF_ONE_SERVER


def _days(table: pa.Table, key: Key) -> Iterator[tuple[str, pa.Table]]:
    """The rows of each day, which become one part."""
    day = pc.divide(_microseconds(table[key.clock]), _DAY_US)
    for one in np.unique(day.to_numpy()):
        yield str(np.datetime64(int(one), "D")), table.filter(pc.equal(day, one))


def _microseconds(clock: pa.ChunkedArray) -> pa.ChunkedArray:
    """Since the epoch."""
    return clock.cast(pa.timestamp("us", "UTC")).cast(pa.int64())


def _is_there(client: clickhouse.Client, name: str, part: pa.Table, key: Key) -> bool:
    """Whether the part's first numbered row is in the table, or its first one where none has a number."""
    row = part.slice(0, 1)
    if "seq" in part.column_names:
        numbered = part.filter(pc.greater(part["seq"], 0))
        row = numbered.slice(0, 1) if numbered.num_rows else row
    same = [f"{key.clock} = fromUnixTimestamp64Micro({{at:Int64}}, 'UTC')"]
    values: dict[str, Any] = {"at": _microseconds(row[key.clock])[0].as_py()}
    for column in key.columns:
        value = row[column][0].as_py()
        if value is None:
            same.append(f"isNull({column})")
            continue
        its = column
        if isinstance(value, Decimal):
            its, value = f"toString({column})", f"{value.normalize():f}"
        elif isinstance(value, int):
            its, value = f"toString({column})", str(value)
        elif len(value) > _BEGINNING:  # a whole frame perhaps
            its, value = f"leftUTF8({column}, {_BEGINNING})", value[:_BEGINNING]
        same.append(f"{its} = {{{column}:String}}")
        values[column] = value
    with clickhouse.translated():
        found = client.query(
            f"SELECT count() FROM {name} WHERE {' AND '.join(same)}",  # noqa: S608 - names of our own
            parameters=values,
        )
    return bool(found.result_rows[0][0])
