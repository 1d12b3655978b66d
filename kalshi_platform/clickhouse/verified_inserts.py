"""Verified inserts: the check that acknowledged rows are stored, and stored once.

An acknowledged insert may be missing if a proxy answered for ClickHouse or forwarded only a part, or if a single
server was killed after it recorded the insert's token and before the rows were visible: it then drops the same
insert as a repetition. Replicas commit both in one step, but another replica may not have the rows yet. So each
insert is verified where the rows are stored:

    agreement  one SELECT for all tables of a batch: number of rows, and sums over their records and times
    missing    if that differs, a comparison row by row, by key: rows that are not stored although the table still
               keeps rows of their age (TTL)
    repeat     rows that stay missing for a moment are inserted under another token, derived from those rows: the
               first token may be used up, and rows that are still on their way are not stored twice

More rows than were sent are refused, since no insert repairs that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.clickhouse import hot_retention, partitions
from kalshi_platform.clickhouse.cluster import place
from kalshi_platform.errors import StoreRefused
from kalshi_platform.schema import (
    BOOK_CHECKPOINTS,
    BUILT,
    LATEST_LEVELS,
    ORDERBOOK_EVENTS,
    STREAM_EVENTS,
    Key,
)

__all__ = ["KEYS", "Insert", "ensure", "insert", "missing"]

TRIES = 5
"""Repeated inserts before the error: a server is not killed that often by chance."""
SETTLE_S = (0.05, 0.2, 0.8)
"""Waits in seconds between checks for rows that are not visible yet."""
EXPIRES_SOON_S = 2 * 3600
"""Rows that the table's TTL deletes within this time may be deleted already, by the server's clock."""
_DAY_S = 86_400
_OF_REPLICAS = ("Replicated", "Shared")
"""Prefixes of table engines whose rows reach other hosts later."""
_ENGINE = (
    "SELECT engine FROM system.tables WHERE database = currentDatabase() AND name = {name:String}"
)

KEYS: Mapping[str, Key] = {
    **{dataset.name: dataset.key for dataset in BUILT},
    LATEST_LEVELS.name: Key("version", ("market_ticker", "side", "price")),
}
"""Of what a loader writes. The newest version of a level is what counts: a later one may have replaced it."""


@dataclass(frozen=True)
class Insert:
    """Rows that were inserted into a table under a token."""

    name: str
    rows: pa.Table
    token: str
    key: Key

    @cached_property
    def numbers(self) -> Mapping[str, npt.NDArray[np.uint64]]:
        """The columns that are summed: the time, and the record if there is one."""
        columns = [c for c in ("record", self.key.clock) if c in self.rows.column_names]
        return {c: _whole(self.rows[c]).to_numpy().astype(np.uint64) for c in columns}

    @property
    def is_recorded(self) -> bool:
        """Whether the rows have journal records, so that another row with the same key is a duplicate."""
        return "record" in self.rows.column_names

    @property
    def keeps_newest(self) -> bool:
        """Whether rows replace earlier rows of their key."""
        return self.key.clock == "version"

    @cached_property
    def agreement(self) -> tuple[int, ...]:
        """The number of rows, and for each summed column the sum of its differences from the minimum."""
        sums = [int((column - column.min()).sum()) for column in self.numbers.values()]
        return (self.rows.num_rows, *sums)


def insert(client: clickhouse.Client, batch: Insert) -> None:
    """Insert rows, which may have been inserted under this token before, until they are stored.

    Raises `StoreRefused` as `ensure` does.
    """
    clickhouse.insert_arrow(client, batch.name, batch.rows, batch.token)
    _complete(client, batch)


def missing(client: clickhouse.Client, batch: Insert) -> list[int]:
    """The indices of rows that are not stored, under any token, even after a moment."""
    return [int(number) for number in _missing_for_long(client, batch)]


def ensure(client: clickhouse.Client, inserts: Sequence[Insert]) -> None:
    """Ensure that the inserts of a journal range are stored once; a single SELECT if they are.

    Raises `StoreRefused` if rows are stored more than once, or ClickHouse repeatedly acknowledges rows without
    storing them.
    """
    sent = [batch for batch in inserts if batch.rows.num_rows]
    if not sent:
        return
    parameters: dict[str, Any] = {}
    selects = [_select(n, batch, sent, parameters) for n, batch in enumerate(sent)]
    with clickhouse.translated():
        found = client.query(" UNION ALL ".join(selects), parameters=parameters).result_rows
    stored = {int(n): tuple(map(int, sums)) for n, *sums in found}
    for n, batch in enumerate(sent):
        if stored[n][: len(batch.agreement)] != batch.agreement:
            _complete(client, batch)


def _select(n: int, batch: Insert, sent: Sequence[Insert], parameters: dict[str, Any]) -> str:
    """The SELECT of an insert's number and its `agreement`, padded; adds to the parameters."""
    where = _span(batch, f"_{n}", parameters)
    if batch.keeps_newest:  # levels of other shards may have the same versions
        markets = [
            f"SELECT market_ticker FROM {other.name} WHERE {_span(other, f'_{m}', parameters)}"  # noqa: S608 - the schema's own names
            for m, other in enumerate(sent)
            if other.name in {ORDERBOOK_EVENTS.name, STREAM_EVENTS.name}
        ]
        where += f" AND market_ticker IN ({' UNION ALL '.join(markets)})" if markets else ""
    sums = [f"sum({_number(batch, c)} - {{{c}_first_{n}:UInt64}})" for c in batch.numbers]
    columns = ", ".join([str(n), "count()", *sums, *["toInt64(0)"] * (2 - len(sums))])
    return f"SELECT {columns} FROM {batch.name} WHERE {where}"  # noqa: S608 - the schema's own names


def _span(batch: Insert, suffix: str, parameters: dict[str, Any]) -> str:
    """The condition on an insert's shard, records and times, with which ClickHouse skips parts and granules."""
    conditions = []
    if batch.is_recorded:
        conditions.append(f"shard = {{shard{suffix}:UInt32}}")
        parameters[f"shard{suffix}"] = batch.rows["shard"][0].as_py()
    if batch.name == BOOK_CHECKPOINTS.name:
        # an hour's checkpoints are inserted in groups of markets
        markets = pc.min_max(batch.rows["market_ticker"].cast(pa.string())).as_py()
        parameters[f"market_first{suffix}"] = markets["min"]
        parameters[f"market_last{suffix}"] = markets["max"]
        conditions.append(f"market_ticker >= {{market_first{suffix}:String}}")
        conditions.append(f"market_ticker <= {{market_last{suffix}:String}}")
    for column, numbers in batch.numbers.items():
        first, last = f"{column}_first{suffix}", f"{column}_last{suffix}"
        parameters[first], parameters[last] = int(numbers.min()), int(numbers.max())
        if batch.keeps_newest:  # later rows may have replaced these
            conditions.append(f"{column} >= {{{first}:UInt64}}")
        elif pa.types.is_timestamp(batch.rows[column].type):
            at = "fromUnixTimestamp64Micro(toInt64({{{}:UInt64}}), 'UTC')"
            conditions.append(f"{column} >= {at.format(first)} AND {column} <= {at.format(last)}")
        else:
            conditions.append(f"{column} >= {{{first}:UInt64}} AND {column} <= {{{last}:UInt64}}")
    return " AND ".join(conditions)


def _number(batch: Insert, column: str) -> str:
    """A column as an integer, in SQL; equal to `_whole`."""
    if not pa.types.is_timestamp(batch.rows[column].type):
        return f"assumeNotNull({column})"
    return f"toUInt64(toUnixTimestamp64Micro(toDateTime64({column}, 6, 'UTC')))"


def _whole(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A time column in microseconds since the epoch; integers unchanged."""
    if pa.types.is_timestamp(column.type):
        return column.cast(pa.timestamp("us", "UTC")).cast(pa.int64())
    return column


# -- row by row --------------------------------------------------------------------------------


def _complete(client: clickhouse.Client, batch: Insert) -> None:
    """Insert the missing rows under other tokens until they are stored."""
    attempt = 0
    while len(missing := _missing_for_long(client, batch)):
        attempt += 1
        if attempt > TRIES:
            raise StoreRefused(
                f"ClickHouse at {client.uri} acknowledged {batch.rows.num_rows:,} rows of {batch.name} ({_records(batch)})"
                f" {attempt} times, and {len(missing):,} of them are not stored. Check the proxies between here and"
                " ClickHouse, and ClickHouse's own log. The loader sends them again at intervals."
            )
        which = blake2b(missing.to_numpy().astype(np.uint32).tobytes(), digest_size=8).hexdigest()
        rows = batch.rows.take(missing.to_arrow())
        clickhouse.insert_arrow(client, batch.name, rows, f"{batch.token}:{which}:{attempt}")


def _missing_for_long(client: clickhouse.Client, batch: Insert) -> pl.Series:
    """The indices of rows that stay missing for a moment and after a sync of the replicas."""
    missing = _missing(client, batch)
    for wait_s in SETTLE_S:
        if not len(missing):
            return missing
        time.sleep(wait_s)
        missing = _missing(client, batch)
    if len(missing) and _synced(client, batch.name):
        missing = _missing(client, batch)
    return missing


def _synced(client: clickhouse.Client, name: str) -> bool:
    """Wait until every replica has what any has acknowledged; False for a table without replicas."""
    where = place(client, name)
    if where is not None and where.cluster is not None:
        partitions.synced(client, name)
        return True
    with clickhouse.translated():
        found = client.query(_ENGINE, parameters={"name": name}).result_rows
        if not any(str(engine).startswith(_OF_REPLICAS) for (engine,) in found):
            return False
        client.command(f"SYSTEM SYNC REPLICA {name}")
    return True


def _missing(client: clickhouse.Client, batch: Insert) -> pl.Series:
    """The indices of rows that are not stored although the table still keeps rows of their age, ascending.

    Raises `StoreRefused` for doubled rows.
    """
    parameters: dict[str, Any] = {}
    columns = ", ".join(_selected(batch))
    sql = f"SELECT {columns} FROM {batch.name} WHERE {_span(batch, '', parameters)}"  # noqa: S608 - names of our own
    with clickhouse.translated():
        found = client.query_arrow(sql, parameters=parameters)
    sent = _keyed(batch, batch.rows).with_row_index("row")
    stored = _keyed(batch, found.rename_columns([*batch.key.columns, batch.key.clock]))
    rows, doubled = _apart(batch, sent, stored)
    if (len(rows) or doubled) and batch.name in hot_retention.RETAINED:
        kept_from = _kept_from(client, batch.name)
        kept = pl.col("at") >= kept_from
        rows, doubled = _apart(batch, sent.filter(kept), stored.filter(kept))
    if doubled:
        raise _doubled(client, batch, doubled)
    return rows.sort()


def _apart(batch: Insert, sent: pl.DataFrame, stored: pl.DataFrame) -> tuple[pl.Series, int]:
    """The indices of sent rows that are not stored, and the number of rows stored more often than sent."""
    keys = list(batch.key.columns)
    if batch.keeps_newest:
        newest = stored.group_by(keys).agg(pl.col("at").max().alias("newest"))
        joined = sent.join(newest, on=keys, how="left", nulls_equal=True)
        behind = pl.col("newest").is_null() | (pl.col("newest") < pl.col("at"))
        return joined.filter(behind)["row"], 0
    keys.append("at")
    counted = stored.group_by(keys).agg(pl.len().cast(pl.Int64).alias("there"))
    numbered = sent.with_columns(
        pl.int_range(pl.len(), dtype=pl.Int64).over(keys).alias("nth"),
        pl.len().cast(pl.Int64).over(keys).alias("sent"),
    )
    joined = numbered.join(counted, on=keys, how="left", nulls_equal=True)
    joined = joined.with_columns(pl.col("there").fill_null(0))
    once = joined.filter(pl.col("nth") == 0)
    doubled = int((once["there"] - once["sent"]).clip(0).sum()) if batch.is_recorded else 0
    return joined.filter(pl.col("nth") >= pl.col("there"))["row"], doubled


def _kept_from(client: clickhouse.Client, table: str) -> int:
    """Microseconds since the epoch from which the table still keeps rows."""
    days = hot_retention.kept(client).get(table)
    if days is None:
        return 0
    with clickhouse.translated():
        ((now_s,),) = client.query("SELECT toUnixTimestamp(now())").result_rows
    return max((int(now_s) - days * _DAY_S + EXPIRES_SOON_S) * 1_000_000, 0)


def _selected(batch: Insert) -> Iterator[str]:
    """The key's columns and the time, in SQL: UUIDs and enums as text, since Arrow has neither."""
    for column in batch.key.columns:
        kind = batch.rows.schema.field(column).type
        is_text = pa.types.is_dictionary(kind) or pa.types.is_string(kind)
        yield f"toString({column})" if is_text else column
    yield _number(batch, batch.key.clock)


def _keyed(batch: Insert, table: pa.Table) -> pl.DataFrame:
    """The key's columns as text, and the time as the integer column `at`."""
    columns = {}
    for column in batch.key.columns:
        kind = batch.rows.schema.field(column).type
        plain = pa.string() if pa.types.is_dictionary(kind) else kind
        columns[column] = table[column].cast(plain).cast(pa.string())
    columns["at"] = _whole(table[batch.key.clock]).cast(pa.uint64())
    return pl.DataFrame(pa.table(columns))


def _doubled(client: clickhouse.Client, batch: Insert, rows: int) -> StoreRefused:
    where = place(client, batch.name)
    shard = batch.rows["shard"][0].as_py()
    first, last = pc.min_max(batch.rows["record"]).as_py().values()
    since, until = pc.min_max(batch.rows[batch.key.clock]).as_py().values()
    connections = ", ".join(
        repr(conn) for conn in sorted(batch.rows["conn_id"].unique().to_pylist())
    )
    return StoreRefused(
        f"ClickHouse at {client.uri} has {rows:,} rows of {batch.name} ({_records(batch)}) more than once, and loading"
        " stops until that is repaired. Delete them, and the loader inserts them again by itself:"
        f' kalshi-platform sql "ALTER TABLE {where.target if where else batch.name} DELETE WHERE'
        f" shard = {shard} AND record BETWEEN {first} AND {last} AND conn_id IN ({connections})"
        f" AND {batch.key.clock} BETWEEN '{since:%Y-%m-%d %H:%M:%S.%f}' AND '{until:%Y-%m-%d %H:%M:%S.%f}'"
        ' SETTINGS mutations_sync = 2"'
    )


def _records(batch: Insert) -> str:
    """The records or the token of an insert, for a sentence."""
    if not batch.is_recorded:
        return f"token {batch.token}"
    first, last = pc.min_max(batch.rows["record"]).as_py().values()
    return f"shard {batch.rows['shard'][0].as_py()}, records {first} to {last}"
