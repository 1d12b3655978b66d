"""Replacement of a partition, or of a time span in one, on a single server or on every shard of a cluster.

New rows are first inserted into a staging table. Whether the new rows are right is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import NamedTuple

from kalshi_platform.clickhouse.client import Client, translated
from kalshi_platform.clickhouse.cluster import LOCAL, Cluster, Place, place
from kalshi_platform.clickhouse.migrations import require_ours
from kalshi_platform.errors import StoreRefused

__all__ = ["Span", "remove_left_over", "replacing", "replacing_span", "synced"]


class Span(NamedTuple):
    """Rows whose `clock` is from `start` to before `end`."""

    clock: str
    start: datetime
    end: datetime


@contextmanager
def replacing(client: Client, table: str, partition: str, staging: str) -> Iterator[str]:
    """Context manager: yield an empty table like `table`; its rows replace the partition at the end.

    If the body inserts nothing, the partition is dropped. All inserted rows must belong to the partition with
    that id. A `staging` table left by an earlier run is recreated. If the body raises, `table` stays as it is. On a
    cluster each shard, and so each market, switches atomically. Raises `StoreRefused` if `table` belongs to
    another owner.
    """
    with _staged(client, table, staging) as (where, from_table, rows):
        yield staging
        if rows():
            command = f"REPLACE PARTITION ID '{partition}' FROM {from_table}"
            # a shard with no row of the new partition must lose its old ones, too
            settings = _from_nothing(client) if where.cluster is not None else None
        else:
            command, settings = f"DROP PARTITION ID '{partition}'", None
        with translated():
            client.command(f"ALTER TABLE {where.target} {command}", settings=settings)


@contextmanager
def replacing_span(
    client: Client, table: str, partition: str, span: Span, staging: str
) -> Iterator[str]:
    """Like `replacing`, for the rows of a time span within one partition.

    The old rows are deleted and the new ones attached in two statements after the body: between these two the span
    has no rows, and a kill there leaves it empty. Rows inserted into other spans of the partition meanwhile stay.
    """
    with _staged(client, table, staging) as (where, from_table, rows):
        yield staging
        has_rows = rows() > 0
        on = "" if where.cluster is None else f" {where.cluster.clause}"
        name = where.table if where.cluster is None else f"{where.cluster.database}.{where.table}"
        with translated():
            client.command(
                f"DELETE FROM {name}{on}"  # noqa: S608 - constants, no user text
                f" WHERE {span.clock} >= {{start:DateTime64(6, 'UTC')}}"
                f" AND {span.clock} < {{end:DateTime64(6, 'UTC')}}",
                parameters={"start": span.start, "end": span.end},
            )
            if has_rows:
                client.command(
                    f"ALTER TABLE {where.target} ATTACH PARTITION ID '{partition}' FROM {from_table}"
                )


@contextmanager
def _staged(
    client: Client, table: str, staging: str
) -> Iterator[tuple[Place, str, Callable[[], int]]]:
    """Context manager: create a staging table like `table`, and drop it at the end.

    Yields where the rows of `table` are stored, the table to name after FROM, and a function that counts the rows in
    the staging table.
    """
    require_ours(client, table)
    where = _where(client, table)
    tables = [staging] if where.cluster is None else [staging, staging + LOCAL]
    on = "" if where.cluster is None else f" {where.cluster.clause}"
    from_table = tables[-1] if where.cluster is None else f"{where.cluster.database}.{tables[-1]}"

    def rows() -> int:
        with translated():
            if where.cluster is not None:
                # the replica that executes the replacement must have all rows
                client.command(f"SYSTEM SYNC REPLICA{on} {from_table}")
            ((found,),) = client.query(f"SELECT count() FROM {staging}").result_rows  # noqa: S608 - constants, no user text
        return int(found)

    with translated():
        _remove(client, where, tables)
        for statement in _like(client, where, table, staging):
            client.command(statement)
    yield where, from_table, rows
    with translated():
        _remove(client, where, tables)


def remove_left_over(client: Client, table: str, staging: str) -> None:
    """Drop the `staging` table of a replacement of `table` that was killed, if it is there."""
    where = _where(client, table)
    tables = [staging] if where.cluster is None else [staging, staging + LOCAL]
    if any(place(client, name) is not None for name in tables):
        with translated():
            _remove(client, where, tables)


def synced(client: Client, table: str) -> None:
    """On a cluster, wait until every replica has the rows that any replica has acknowledged."""
    where = _where(client, table)
    if where.cluster is not None:
        name = f"{where.cluster.database}.{where.table}"
        with translated():
            client.command(f"SYSTEM SYNC REPLICA {where.cluster.clause} {name}")


def _where(client: Client, table: str) -> Place:
    found = place(client, table)
    if found is None:
        raise StoreRefused(f"There is no table {table}. Create it: kalshi-platform migrate.")
    return found


def _like(client: Client, where: Place, table: str, staging: str) -> list[str]:
    """The statements that create `staging` with the structure of `table`."""
    if where.cluster is None:
        return [f"CREATE TABLE {staging} AS {table}"]
    cluster: Cluster = where.cluster
    ((engine,),) = client.query(
        "SELECT engine_full FROM system.tables"
        " WHERE database = currentDatabase() AND name = {table:String}",
        parameters={"table": where.table},
    ).result_rows
    # the path in the coordination service must be the staging table's; {shard} and {replica} stay as they are
    staged = str(engine).replace(f"/{where.table}'", f"/{staging}{LOCAL}'", 1)
    return [
        f"CREATE TABLE {cluster.database}.{staging}{LOCAL} {cluster.clause}"
        f" AS {cluster.database}.{where.table} ENGINE = {staged}",
        cluster.distributed(staging),
    ]


def _remove(client: Client, where: Place, tables: list[str]) -> None:
    database = "" if where.cluster is None else f"{where.cluster.database}."
    on = "" if where.cluster is None else f" {where.cluster.clause}"
    for name in tables:
        client.command(f"DROP TABLE IF EXISTS {database}{name}{on} SYNC")


def _from_nothing(client: Client) -> dict[str, int]:
    """The setting that version 26 requires to replace a partition by an empty one; older versions lack it."""
    name = "allow_replace_partition_from_empty_source"
    return {name: 1} if name in client.server_settings else {}
