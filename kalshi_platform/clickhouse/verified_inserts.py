"""Whether rows that ClickHouse has acknowledged are really there, and once.

An acknowledged insert is not there where something between here and ClickHouse answered for it, or sent a part
of it on; and where a single server was killed after it had written the insert's token down and before its rows
were visible: it then takes the same insert for a repetition. Replicas commit both in one step, but another
replica may not have the rows yet. So each insert is looked for at the place that keeps it:

    agree      one SELECT for all tables of a batch: rows, and sums over their records and times
    missing    where that differs, row by row, by key: what is not there, of what the table still keeps (TTL)
               has to be there
    again      what stays missing for a moment is inserted under another token, which names those rows: the first
               token may be taken, and the same rows that are still on their way are not added a second time

More rows than were sent are refused: no insert repairs that.
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
    LATEST_LEVELS,
    ORDERBOOK_EVENTS,
    RECORDED,
    STREAM_EVENTS,
    Key,
)

__all__ = ["KEYS", "Insert", "ensure", "insert", "missing"]

TRIES = 5
"""New tokens before a person is asked: a server cannot be killed that often by chance."""
SETTLE_S = (0.05, 0.2, 0.8)
"""Rows whose token is taken may become visible a moment later: they are looked for again after these."""
EXPIRES_SOON_S = 2 * 3600
"""Rows that the table's TTL takes within this time may be gone already, by the server's clock."""
_DAY_S = 86_400
_OF_REPLICAS = ("Replicated", "Shared")
"""How the names of table engines begin whose rows come to other hosts later."""
_ENGINE = (
    "SELECT engine FROM system.tables WHERE database = currentDatabase() AND name = {name:String}"
)

KEYS: Mapping[str, Key] = {
    **{dataset.name: dataset.key for dataset in RECORDED},
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
        """What is summed up, by column: the clock, and the record where there is one."""
        columns = [c for c in ("record", self.key.clock) if c in self.rows.column_names]
        return {c: _whole(self.rows[c]).to_numpy().astype(np.uint64) for c in columns}

    @property
    def is_recorded(self) -> bool:
        """Whether rows are of a journal's records: what else has their key is the same row once more."""
        return "record" in self.rows.column_names

    @property
    def keeps_newest(self) -> bool:
        """Whether rows replace earlier ones of their key."""
        return self.key.clock == "version"

    @cached_property
    def agreement(self) -> tuple[int, ...]:
        """Rows, and for each of the numbers the sum of what it is beyond the smallest."""
        sums = [int((column - column.min()).sum()) for column in self.numbers.values()]
        return (self.rows.num_rows, *sums)


def insert(client: clickhouse.Client, it: Insert) -> None:
    """Insert rows that may have been inserted under this token before, until they are there.

    Raises `StoreRefused` as `ensure` does.
    """
    clickhouse.insert_arrow(client, it.name, it.rows, it.token)
    _complete(client, it)


def missing(client: clickhouse.Client, it: Insert) -> list[int]:
    """Which rows are not there, nor come within a moment, under whatever token they were sent: their numbers."""
    return [int(number) for number in _missing_for_long(client, it)]


def ensure(client: clickhouse.Client, inserts: Sequence[Insert]) -> None:
    """See to it that what a loader inserted of a range is there, once. One SELECT where it is.

    Raises `StoreRefused` where rows are there more than once, or ClickHouse goes on acknowledging rows that
    it does not have.
    """
    sent = [it for it in inserts if it.rows.num_rows]
    if not sent:
        return
    parameters: dict[str, Any] = {}
    selects = [_select(n, it, sent, parameters) for n, it in enumerate(sent)]
    with clickhouse.translated():
        found = client.query(" UNION ALL ".join(selects), parameters=parameters).result_rows
    there = {int(n): tuple(map(int, sums)) for n, *sums in found}
    for n, it in enumerate(sent):
        if there[n][: len(it.agreement)] != it.agreement:
            _complete(client, it)


def _select(n: int, it: Insert, sent: Sequence[Insert], parameters: dict[str, Any]) -> str:
    """The SELECT that gives an insert's number and `agreement`, padded; adds to the parameters."""
    where = _span(it, f"_{n}", parameters)
    if it.keeps_newest:  # other shards' levels have such versions, too
        markets = [
            f"SELECT market_ticker FROM {each.name} WHERE {_span(each, f'_{m}', parameters)}"  # noqa: S608 - the schema's own names
            for m, each in enumerate(sent)
            if each.name in {ORDERBOOK_EVENTS.name, STREAM_EVENTS.name}
        ]
        where += f" AND market_ticker IN ({' UNION ALL '.join(markets)})" if markets else ""
    sums = [f"sum({_number(it, c)} - {{{c}_first_{n}:UInt64}})" for c in it.numbers]
    columns = ", ".join([str(n), "count()", *sums, *["toInt64(0)"] * (2 - len(sums))])
    return f"SELECT {columns} FROM {it.name} WHERE {where}"  # noqa: S608 - the schema's own names


def _span(it: Insert, suffix: str, parameters: dict[str, Any]) -> str:
    """The condition for an insert's shard, records and times, by which parts and granules are left out."""
    conditions = []
    if it.is_recorded:
        conditions.append(f"shard = {{shard{suffix}:UInt32}}")
        parameters[f"shard{suffix}"] = it.rows["shard"][0].as_py()
    if it.name == BOOK_CHECKPOINTS.name:  # an hour's are inserted some markets at a time
        markets = pc.min_max(it.rows["market_ticker"].cast(pa.string())).as_py()
        parameters[f"market_first{suffix}"] = markets["min"]
        parameters[f"market_last{suffix}"] = markets["max"]
        conditions.append(f"market_ticker >= {{market_first{suffix}:String}}")
        conditions.append(f"market_ticker <= {{market_last{suffix}:String}}")
    for column, numbers in it.numbers.items():
        first, last = f"{column}_first{suffix}", f"{column}_last{suffix}"
        parameters[first], parameters[last] = int(numbers.min()), int(numbers.max())
        if it.keeps_newest:  # later rows may have taken the place of these
            conditions.append(f"{column} >= {{{first}:UInt64}}")
        elif pa.types.is_timestamp(it.rows[column].type):
            at = "fromUnixTimestamp64Micro(toInt64({{{}:UInt64}}), 'UTC')"
            conditions.append(f"{column} >= {at.format(first)} AND {column} <= {at.format(last)}")
        else:
            conditions.append(f"{column} >= {{{first}:UInt64}} AND {column} <= {{{last}:UInt64}}")
    return " AND ".join(conditions)


def _number(it: Insert, column: str) -> str:
    """A column as a whole number, in SQL; the same as `_whole`."""
    if not pa.types.is_timestamp(it.rows[column].type):
        return f"assumeNotNull({column})"
    return f"toUInt64(toUnixTimestamp64Micro(toDateTime64({column}, 6, 'UTC')))"


def _whole(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A time in microseconds since the epoch; whole numbers as they are."""
    if pa.types.is_timestamp(column.type):
        return column.cast(pa.timestamp("us", "UTC")).cast(pa.int64())
    return column


# -- row by row --------------------------------------------------------------------------------


def _complete(client: clickhouse.Client, it: Insert) -> None:
    """Insert what is missing, again under other tokens, until it is there."""
    attempt = 0
    while len(missing := _missing_for_long(client, it)):
        attempt += 1
        if attempt > TRIES:
            raise StoreRefused(
                f"ClickHouse at {client.uri} acknowledged {it.rows.num_rows:,} rows of {it.name} ({_records(it)})"
                f" {attempt} times, and {len(missing):,} of them are not there. Look at what is between here and"
                " ClickHouse, and at ClickHouse's own log. They are sent again from time to time."
            )
        which = blake2b(missing.to_numpy().astype(np.uint32).tobytes(), digest_size=8).hexdigest()
        rows = it.rows.take(missing.to_arrow())
        clickhouse.insert_arrow(client, it.name, rows, f"{it.token}:{which}:{attempt}")


def _missing_for_long(client: clickhouse.Client, it: Insert) -> pl.Series:
    """Rows that are not there, and do not come within a moment, nor from another replica: their numbers."""
    missing = _missing(client, it)
    for wait_s in SETTLE_S:
        if not len(missing):
            return missing
        time.sleep(wait_s)
        missing = _missing(client, it)
    if len(missing) and _synced(client, it.name):
        missing = _missing(client, it)
    return missing


def _synced(client: clickhouse.Client, name: str) -> bool:
    """Let every replica have what any has acknowledged; False where the table is of one server alone."""
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


def _missing(client: clickhouse.Client, it: Insert) -> pl.Series:
    """Rows that are not there although the table must still have them: their numbers, ascending.

    Raises `StoreRefused` for doubled ones.
    """
    parameters: dict[str, Any] = {}
    columns = ", ".join(_selected(it))
    sql = f"SELECT {columns} FROM {it.name} WHERE {_span(it, '', parameters)}"  # noqa: S608 - names of our own
    with clickhouse.translated():
        found = client.query_arrow(sql, parameters=parameters)
    sent = _keyed(it, it.rows).with_row_index("row")
    there = _keyed(it, found.rename_columns([*it.key.columns, it.key.clock]))
    rows, doubled = _apart(it, sent, there)
    if (len(rows) or doubled) and it.name in hot_retention.RETAINED:
        kept_from = _kept_from(client, it.name)
        kept = pl.col("at") >= kept_from
        rows, doubled = _apart(it, sent.filter(kept), there.filter(kept))
    if doubled:
        raise _doubled(client, it, doubled)
    return rows.sort()


def _apart(it: Insert, sent: pl.DataFrame, there: pl.DataFrame) -> tuple[pl.Series, int]:
    """(the numbers of the sent rows that are not there, how many are there more often than they were sent)"""
    keys = list(it.key.columns)
    if it.keeps_newest:
        newest = there.group_by(keys).agg(pl.col("at").max().alias("newest"))
        joined = sent.join(newest, on=keys, how="left", nulls_equal=True)
        behind = pl.col("newest").is_null() | (pl.col("newest") < pl.col("at"))
        return joined.filter(behind)["row"], 0
    keys.append("at")
    counted = there.group_by(keys).agg(pl.len().cast(pl.Int64).alias("there"))
    numbered = sent.with_columns(
        pl.int_range(pl.len(), dtype=pl.Int64).over(keys).alias("nth"),
        pl.len().cast(pl.Int64).over(keys).alias("sent"),
    )
    joined = numbered.join(counted, on=keys, how="left", nulls_equal=True)
    joined = joined.with_columns(pl.col("there").fill_null(0))
    once = joined.filter(pl.col("nth") == 0)
    doubled = int((once["there"] - once["sent"]).clip(0).sum()) if it.is_recorded else 0
    return joined.filter(pl.col("nth") >= pl.col("there"))["row"], doubled


def _kept_from(client: clickhouse.Client, table: str) -> int:
    """Microseconds since the epoch from which on the table still has what was put there."""
    days = hot_retention.kept(client).get(table)
    if days is None:
        return 0
    with clickhouse.translated():
        ((now_s,),) = client.query("SELECT toUnixTimestamp(now())").result_rows
    return max((int(now_s) - days * _DAY_S + EXPIRES_SOON_S) * 1_000_000, 0)


def _selected(it: Insert) -> Iterator[str]:
    """The key's columns and the clock, in SQL: UUIDs and names of enum values as text, for Arrow has neither."""
    for column in it.key.columns:
        kind = it.rows.schema.field(column).type
        is_text = pa.types.is_dictionary(kind) or pa.types.is_string(kind)
        yield f"toString({column})" if is_text else column
    yield _number(it, it.key.clock)


def _keyed(it: Insert, table: pa.Table) -> pl.DataFrame:
    """The key's columns as text, and the clock as `at`: a whole number."""
    columns = {}
    for column in it.key.columns:
        kind = it.rows.schema.field(column).type
        plain = pa.string() if pa.types.is_dictionary(kind) else kind
        columns[column] = table[column].cast(plain).cast(pa.string())
    columns["at"] = _whole(table[it.key.clock]).cast(pa.uint64())
    return pl.DataFrame(pa.table(columns))


def _doubled(client: clickhouse.Client, it: Insert, rows: int) -> StoreRefused:
    where = place(client, it.name)
    shard = it.rows["shard"][0].as_py()
    first, last = pc.min_max(it.rows["record"]).as_py().values()
    since, until = pc.min_max(it.rows[it.key.clock]).as_py().values()
    connections = ", ".join(repr(conn) for conn in sorted(it.rows["conn_id"].unique().to_pylist()))
    return StoreRefused(
        f"ClickHouse at {client.uri} has {rows:,} rows of {it.name} ({_records(it)}) more than once, and nothing"
        " more is loaded before they are there once. Delete them, and the load inserts them again by itself:"
        f' kalshi-platform sql "ALTER TABLE {where.target if where else it.name} DELETE WHERE'
        f" shard = {shard} AND record BETWEEN {first} AND {last} AND conn_id IN ({connections})"
        f" AND {it.key.clock} BETWEEN '{since:%Y-%m-%d %H:%M:%S.%f}' AND '{until:%Y-%m-%d %H:%M:%S.%f}'"
        ' SETTINGS mutations_sync = 2"'
    )


def _records(it: Insert) -> str:
    """What an insert's rows come from, for a sentence."""
    if not it.is_recorded:
        return f"token {it.token}"
    first, last = pc.min_max(it.rows["record"]).as_py().values()
    return f"shard {it.rows['shard'][0].as_py()}, records {first} to {last}"
