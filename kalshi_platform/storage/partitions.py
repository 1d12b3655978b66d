"""Replacing a partition whole, at one instant, on a single server or on every shard of a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kalshi_platform.storage.clickhouse import Client, translated
from kalshi_platform.storage.cluster import LOCAL, Cluster, Place, place
from kalshi_platform.storage.errors import StoreRefused
from kalshi_platform.storage.migrations import insist_ours

__all__ = ["replacing"]


@contextmanager
def replacing(client: Client, table: str, partition: str, staging: str) -> Iterator[str]:
    """Yields a new empty table like `table`; what the body inserts there takes the partition's place.

    Nothing inserted: the partition is dropped. All that is inserted must belong to the partition with that
    id. A table `staging` that an earlier run left behind is made anew. Where the body raises, `table` stays
    as it is. On a cluster each shard changes over at one instant, and so does a market, which is on one
    shard.
    """
    insist_ours(client, table)
    where = _where(client, table)
    tables = [staging] if where.cluster is None else [staging, staging + LOCAL]
    on = "" if where.cluster is None else f" {where.cluster.clause}"
    from_table = tables[-1] if where.cluster is None else f"{where.cluster.database}.{tables[-1]}"
    with translated():
        _remove(client, where, tables)
        for statement in _like(client, where, table, staging):
            client.command(statement)
    yield staging
    with translated():
        if where.cluster is not None:
            # whichever replica does the replacing must have all the rows
            client.command(f"SYSTEM SYNC REPLICA{on} {from_table}")
        ((rows,),) = client.query(f"SELECT count() FROM {staging}").result_rows  # noqa: S608 - our names
        if rows:
            client.command(
                f"ALTER TABLE {where.target} REPLACE PARTITION ID '{partition}' FROM {from_table}",
                # a shard with no row of the new partition must lose its old ones, too
                settings=_from_nothing(client) if where.cluster is not None else None,
            )
        else:
            client.command(f"ALTER TABLE {where.target} DROP PARTITION ID '{partition}'")
        _remove(client, where, tables)


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
