"""A stand-in for a cluster of two shards, in one embedded engine: the real planner, half of the truth.

The engine has a cluster `two` whose shards are both itself, and a row policy gives each shard the
markets that `cityHash64(market_ticker)` puts there: what reads through a Distributed table reads each
shard's own rows and merges them, as on two hosts. What one process cannot do is taken out of the
statements on their way in: ON CLUSTER, the Replicated in front of an engine's name, and the spreading
of an INSERT, which goes into the one table that both shards are. In a database called `checked` the
Replicated tables stay what they are, with the engine's own test Keeper (they are created, and read-only).

Not shown here, and nowhere in the tests: replication, DDL on many hosts, inserts sent to other hosts.

    python -m kalshi_platform_tests.clickhouse.two_shards FOLDER
    CLICKHOUSE_CLUSTER=two pytest kalshi_platform_tests/clickhouse/test_views.py

The second runs a module's tests against it: see the fixtures in conftest.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import click

from kalshi_platform.clickhouse import migrations
from kalshi_platform.clickhouse.cluster import SHARDING_KEY, Cluster
from kalshi_platform.clickhouse.statements import statements
from kalshi_platform.embedded_clickhouse import engine, rights
from kalshi_platform.embedded_clickhouse.server import serve

CLUSTER = "two"
CHECKED = "checked"
DATABASES = tuple(f"shared_{n}" for n in range(60))
"""The sharded databases; row policies name them, so they must be known in advance."""
_SHARD = (
    "<shard><internal_replication>true</internal_replication>"
    "<replica><host>127.0.0.1</host><port>9000</port></replica></shard>"
)
_CONFIG = f"""
  <tcp_port>9000</tcp_port>
  <macros><shard>01</shard><replica>first</replica></macros>
  <zookeeper><implementation>testkeeper</implementation></zookeeper>
  <remote_servers><two>{_SHARD}{_SHARD}</two><one>{_SHARD}</one></remote_servers>
</clickhouse>"""
_ON_CLUSTER = re.compile(r" ON CLUSTER '\w+'")
_REPLICATED = re.compile(r"\bReplicated(\w*MergeTree)\('[^']*', '[^']*'(?:, )?")
_WINDOW = re.compile(r"\breplicated_(deduplication_window\s*=\s*\d+), replicated_\w+ = \d+")


ON_CLUSTER = os.environ.get("CLICKHOUSE_CLUSTER") == CLUSTER
_unused = iter(DATABASES)


def database_name() -> str:
    """The name of an unused database; on the cluster, a sharded one."""
    return next(_unused) if ON_CLUSTER else f"test_{uuid.uuid4().hex}"


def sharded() -> list[str]:
    """The tables that a cluster shards by market."""
    cluster = Cluster(CLUSTER, "any")
    for migration in migrations.available():
        for statement in statements(migration.sql):
            cluster.spread(statement)
    return [table for table, cut in cluster.sharded.items() if cut]


def in_one_process(sql: str, tables: list[str]) -> str:
    """The part of the configuration that one host would have, for an engine that emulates all hosts."""
    if sql.startswith("SYSTEM SYNC REPLICA"):
        return "SELECT 1"
    if (into := re.match(r"INSERT INTO `?(\w+)`?", sql)) and (
        into[1] in tables or "_staging_" in into[1]
    ):
        return f"INSERT INTO {into[1]}_local{sql[into.end() :]}"
    if (lost := re.match(r"(TRUNCATE TABLE|DELETE FROM) (\w+)", sql)) and lost[2] in tables:
        return f"{lost[0]}_local{sql[lost.end() :]}"  # what a test plants
    if not _ON_CLUSTER.search(sql):
        return sql
    sql = _ON_CLUSTER.sub("", sql)
    if f" {CHECKED}." in sql:
        return sql
    return _WINDOW.sub(r"non_replicated_\1", _REPLICATED.sub(r"\1(", sql))


def policies(databases: Iterable[str], tables: list[str]) -> str:
    """Row policies for users.xml: each shard sees its own markets, other users everything."""
    condition = f"shardNum() = 0 OR {SHARDING_KEY} % 2 + 1 = shardNum()"
    filters = "".join(f"<{t}_local><filter>{condition}</filter></{t}_local>" for t in tables)
    return "".join(f"<{name}>{filters}</{name}>" for name in databases)


@contextmanager
def running(folder: Path) -> Iterator[str]:
    """Run the emulated cluster in a process of its own; yields its URL."""
    child = subprocess.Popen(
        [sys.executable, "-m", __name__, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield cast(IO[str], child.stdout).readline().strip()
    finally:
        child.kill()  # its data is thrown away: no need to end in order
        child.communicate()


def main(folder: Path) -> None:
    """Serve until killed."""
    tables = sharded()
    beside = [
        f"{table}_staging_restore" for table in tables
    ]  # which `restore --replace` reads, too
    own = f"<databases>{policies(DATABASES, [*tables, *beside])}</databases></default></users>"
    module: Any = engine
    users = rights.users("").replace("</default></users>", own)
    users = re.sub(
        r"<grants>.*</grants>", "<grants><query>GRANT ALL ON *.*</query></grants>", users
    )
    cast(Any, rights).users = lambda _: re.sub(r"<constraints>.*</constraints>", "", users)
    module._CONFIG = module._CONFIG.replace("</clickhouse>", _CONFIG)
    query, insert = engine.Engine.query, engine.Engine.insert
    rewritten: Any = engine.Engine
    rewritten.permit = lambda *_, **__: None  # a cluster's statements are a server's
    rewritten.query = lambda self, request, statement, sql: query(
        self, request, statement, in_one_process(sql, tables)
    )
    rewritten.insert = lambda self, request, statement, header, data: insert(
        self, request, statement, in_one_process(header, tables), data
    )
    serve(
        path=folder,
        port=0,
        user="default",
        password="",
        ready=lambda port: click.echo(f"http://127.0.0.1:{port}"),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
