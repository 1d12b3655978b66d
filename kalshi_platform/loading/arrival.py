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
)

TRIES = 5
"""New tokens before the server is taken to be away: it cannot be killed that often by chance."""
_OF_ONE_SERVER = frozenset({"MergeTree", "ReplacingMergeTree"})
_DAY_US = 86_400_000_000
_BEGINNING = 200
"""Characters of a text that are compared: parameters travel in the URL."""
_FRAME: Mapping[str, str] = {
    "conn_id": "UUID",
    "sid": "UInt32",
    "seq": "UInt64",
    "market_ticker": "String",
}
_KEYS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    ORDERBOOK_EVENTS.name: ("ingest_ts", _FRAME),
    TRADES.name: ("ingest_ts", {**_FRAME, "trade_id": "String"}),
    STREAM_EVENTS.name: ("ingest_ts", {**_FRAME, "kind": "String", "detail": "String"}),
    BOOK_CHECKPOINTS.name: ("ts", _FRAME),
}
"""Clock, and the columns with their types, that no row of another insert has in common."""


def insist(client: clickhouse.Client, name: str, table: pa.Table, token: str) -> None:
    """Insert rows that may have been inserted under this token before, until they are there, once.

    Raises `StoreUnavailable` where the server goes on acknowledging rows that it does not have.
    """
    clickhouse.insert_arrow(client, name, table, token)
    if not _keeps_tokens_apart(client, name):
        return
    for again in range(1, TRIES + 1):
        missing = [part for part in _days(name, table) if not _is_there(client, name, part)]
        if not missing:
            return
        for part in missing:
            day = part[_KEYS[name][0]][0].as_py().date()
            clickhouse.insert_arrow(client, name, part, f"{token}:{day}:{again}")
    raise StoreUnavailable(
        f"ClickHouse acknowledged {table.num_rows:,} rows of {name} {TRIES + 1} times, and has not got them."
    )


def _keeps_tokens_apart(client: clickhouse.Client, name: str) -> bool:
    """Whether the table is of one server alone, which keeps tokens in a file beside the rows."""
    with clickhouse.translated():
        found = client.query(
            "SELECT engine FROM system.tables WHERE database = currentDatabase() AND name = {name:String}",
            parameters={"name": name},
        )
    return bool(found.result_rows) and str(found.result_rows[0][0]) in _OF_ONE_SERVER


def _days(name: str, table: pa.Table) -> Iterator[pa.Table]:
    """The rows of each day, which become one part."""
    clock, _ = _KEYS[name]
    day = pc.divide(table[clock].cast(pa.int64()), _DAY_US)
    for one in np.unique(day.to_numpy()):
        yield table.filter(pc.equal(day, one))


def _is_there(client: clickhouse.Client, name: str, part: pa.Table) -> bool:
    """Whether the part's first numbered row is in the table, or its first one where none has a number."""
    clock, types = _KEYS[name]
    numbered = part.filter(pc.greater(part["seq"], 0))
    row = (numbered if numbered.num_rows else part).slice(0, 1)
    values: dict[str, Any] = {column: row[column][0].as_py() for column in types}
    if "detail" in values:  # a whole frame perhaps
        values["detail"] = values["detail"][:_BEGINNING]
    told = {"detail": f"leftUTF8(detail, {_BEGINNING})"}
    same = " AND ".join(f"{told.get(c, c)} = {{{c}:{of}}}" for c, of in types.items())
    with clickhouse.translated():
        found = client.query(
            f"SELECT count() FROM {name} WHERE {same}"  # noqa: S608 - names of our own
            f" AND {clock} = fromUnixTimestamp64Micro({{at:Int64}}, 'UTC')",
            parameters=values | {"at": row[clock].cast(pa.int64())[0].as_py()},
        )
    return bool(found.result_rows[0][0])
