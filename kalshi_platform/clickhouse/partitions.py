"""Replacing a partition, or a span of one, on a single server or on every shard of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import NamedTuple

from kalshi_platform.clickhouse.client import Client, translated
from kalshi_platform.clickhouse.cluster import LOCAL, Cluster, Place, place
from kalshi_platform.clickhouse.migrations import insist_ours
from kalshi_platform.errors import StoreRefused

__all__ = ["Span", "remove_left_over", "replacing", "replacing_span", "synced"]


class Span(NamedTuple):
    """Rows whose `clock` is from `start` to before `end`."""

    clock: str
    start: datetime
    end: datetime


@contextmanager
def replacing(client: Client, table: str, partition: str, staging: str) -> Iterator[str]:
    """Yields a new empty table like `table`; what the body inserts there takes the partition's place.

    Nothing inserted: the partition is dropped. All that is inserted must belong to the partition with that
    id. A table `staging` that an earlier run left behind is made anew. Where the body raises, `table` stays
    as it is. On a cluster each shard changes over at one instant, and so does a market, which is on one
    shard. Raises `StoreRefused` where `table` is another owner's.
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
    """As `replacing`, for the rows of a span within one partition.

    The old rows go, then the new ones come, in two statements: between them, for as long as they take and
    not as long as the body does, the span has no rows, and a kill leaves it so. Rows that are inserted into
    other spans of the partition meanwhile stay.
    """
    with _staged(client, table, staging) as (where, from_table, rows):
        yield staging
        has_rows = rows() > 0
        on = "" if where.cluster is None else f" {where.cluster.clause}"
        name = where.table if where.cluster is None else f"{where.cluster.database}.{where.table}"
        with translated():
            client.command(
                f"DELETE FROM {name}{on}"  # noqa: S608 - names of our own
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
    """Make a table like `table`, and drop it at the end.

    Yields where the rows of `table` are, what to name after FROM, and how to ask for the rows in staging.
    """
    insist_ours(client, table)
    where = _where(client, table)
    tables = [staging] if where.cluster is None else [staging, staging + LOCAL]
    on = "" if where.cluster is None else f" {where.cluster.clause}"
    from_table = tables[-1] if where.cluster is None else f"{where.cluster.database}.{tables[-1]}"

    def rows() -> int:
        with translated():
            if where.cluster is not None:
                # whichever replica does the replacing must have all the rows
                client.command(f"SYSTEM SYNC REPLICA{on} {from_table}")
            ((found,),) = client.query(f"SELECT count() FROM {staging}").result_rows  # noqa: S608 - our names
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
    if any(place(client, each) is not None for each in tables):
        with translated():
            _remove(client, where, tables)


def synced(client: Client, table: str) -> None:
    """On a cluster, let every replica have the rows that any replica has acknowledged."""
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
    if where.cluster is None:
        return [f"CREATE TABLE {staging} AS {table}"]
    cluster: Cluster = where.cluster
    ((engine,),) = client.query(
        "SELECT engine_full FROM system.tables"
        " WHERE database = currentDatabase() AND name = {table:String}",
        parameters={"table": where.table},
    ).result_rows
    # the path in the coordination service is the table's own; {shard} and {replica} stay as they are
    own = str(engine).replace(f"/{where.table}'", f"/{staging}{LOCAL}'", 1)
    return [
        f"CREATE TABLE {cluster.database}.{staging}{LOCAL} {cluster.clause}"
        f" AS {cluster.database}.{where.table} ENGINE = {own}",
        cluster.distributed(staging),
    ]


def _remove(client: Client, where: Place, tables: list[str]) -> None:
    database = "" if where.cluster is None else f"{where.cluster.database}."
    on = "" if where.cluster is None else f" {where.cluster.clause}"
    for each in tables:
        client.command(f"DROP TABLE IF EXISTS {database}{each}{on} SYNC")


def _from_nothing(client: Client) -> dict[str, int]:
    """Version 26 refuses to replace by nothing unless told; older ones know no such setting."""
    name = "allow_replace_partition_from_empty_source"
    return {name: 1} if name in client.server_settings else {}
