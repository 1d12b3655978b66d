"""On a cluster the same files create equivalent tables and views; unknown statements are refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from kalshi_platform.clickhouse import hot_retention, migrations
from kalshi_platform.clickhouse.client import Client, connect, insert_arrow
from kalshi_platform.clickhouse.cluster import DEDUPLICATION_SECONDS, Cluster, place
from kalshi_platform.clickhouse.statements import statements
from kalshi_platform.commands import doctor
from kalshi_platform.errors import StoreRefused
from kalshi_platform_tests.clickhouse import two_shards
from kalshi_platform_tests.clickhouse.tables import settings_for
from kalshi_platform_tests.clickhouse.two_shards import CHECKED, CLUSTER

TABLE = (
    "CREATE TABLE IF NOT EXISTS t (market_ticker String) ENGINE = MergeTree ORDER BY market_ticker"
)
_unused = iter(reversed(two_shards.DATABASES))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an engine that emulates a cluster."""
    with two_shards.running(tmp_path_factory.mktemp("two_shards")) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    """A client of a database that is spread over two shards."""
    settings = settings_for(url, next(_unused), clickhouse_cluster=CLUSTER)
    migrations.migrate(settings)
    with closing(connect(settings)) as client:
        yield client


def every_statement(database: str) -> list[tuple[str, str]]:
    """Each statement of each migration, translated for the cluster, with the migration's name."""
    cluster = Cluster(CLUSTER, database)
    return [
        (str(migration), spread)
        for migration in migrations.available()
        for statement in statements(migration.sql)
        for spread in cluster.spread(statement)
    ]


def test_the_real_parser_accepts_every_cluster_statement(url: str) -> None:
    with closing(connect(settings_for(url, "default"), database=False)) as client:
        for name, statement in every_statement("kalshi"):
            ((formatted,),) = client.query(
                "SELECT formatQuery({sql:String})", parameters={"sql": statement}
            ).result_rows
            assert f"ON CLUSTER {CLUSTER}" in formatted, (name, formatted)


def test_replicated_tables_match_the_statements(url: str) -> None:
    client = connect(settings_for(url, "default"), database=False)
    client.command(f"CREATE DATABASE {CHECKED}")
    made = [s for _, s in every_statement(CHECKED) if s.startswith("CREATE TABLE")]
    for statement in made:
        client.command(statement)
    found = client.query(
        "SELECT name, engine, engine_full FROM system.tables WHERE database = {name:String}",
        parameters={"name": CHECKED},
    ).result_rows
    client.close()
    tables = {name: (engine, full) for name, engine, full in found}
    for table in two_shards.sharded():
        engine, full = tables[table + "_local"]
        assert re.fullmatch(r"Replicated(Replacing)?MergeTree", engine)
        assert f"'/clickhouse/tables/{CLUSTER}/{{shard}}/{CHECKED}/{table}_local'" in full
        assert "'{replica}'" in full
        assert "replicated_deduplication_window = 10000" in full
        assert f"replicated_deduplication_window_seconds = {DEDUPLICATION_SECONDS}" in full
        assert tables[table] == (
            "Distributed",
            f"Distributed('{CLUSTER}', '{CHECKED}', '{table}_local', cityHash64(market_ticker))",
        )


def test_every_table_but_the_records_is_sharded_by_market() -> None:
    cluster = Cluster(CLUSTER, "kalshi")
    for migration in migrations.available():
        for statement in statements(migration.sql):
            cluster.spread(statement)
    assert [table for table, cut in cluster.sharded.items() if not cut] == [
        "recorders",
        "retention_changes",
    ]
    (made,) = cluster.spread(migrations._BOOKKEEPING)
    assert "kalshi.schema_migrations ON CLUSTER 'two'" in made
    assert (
        "ReplicatedReplacingMergeTree('/clickhouse/tables/two/{database}/{table}',"
        " '{shard}-{replica}', applied_at)" in made
    )


def test_a_second_run_on_a_cluster_applies_nothing(client: Client, url: str) -> None:
    database = client.database
    assert database
    settings = settings_for(url, database, clickhouse_cluster=CLUSTER, hot_retention_days=7)
    assert migrations.migrate(settings) == []
    kept = client.query(
        "SELECT name FROM system.tables WHERE database = currentDatabase()"
        " AND create_table_query LIKE '%toIntervalDay(7)%' ORDER BY name"
    ).result_rows
    assert [name for (name,) in kept] == sorted(f"{t}_local" for t in hot_retention.RETAINED)
    assert migrations.differences(client) == []


def test_a_database_is_of_one_kind_for_good(client: Client, url: str) -> None:
    assert client.database
    with pytest.raises(StoreRefused, match="CLICKHOUSE_CLUSTER is not set"):
        migrations.migrate(settings_for(url, client.database))
    alone = settings_for(url, next(_unused))
    migrations.migrate(alone)
    with pytest.raises(StoreRefused, match="made for a single server"):
        migrations.migrate(alone.model_copy(update={"clickhouse_cluster": CLUSTER}))


@pytest.mark.parametrize("name", ["trades", "trades_local", "book_at"])
def test_a_table_of_another_owner_is_refused_on_the_cluster_too(url: str, name: str) -> None:
    database = next(_unused)
    settings = settings_for(url, database, clickhouse_cluster=CLUSTER)
    with closing(connect(settings_for(url, "default"), database=False)) as client:
        client.command(f"CREATE DATABASE {database}")
        client.command(
            f"CREATE TABLE {database}.{name} (ingest_ts DateTime) ENGINE = MergeTree ORDER BY ()"
        )
        with pytest.raises(StoreRefused, match=rf": {name} \(a MergeTree.*ON CLUSTER 'two'\.$"):
            migrations.migrate(settings)
        listing = "SELECT name FROM system.tables WHERE database = {name:String}"
        assert client.query(listing, parameters={"name": database}).result_rows == [(name,)]


def test_an_unknown_cluster_is_refused_with_the_known_ones(url: str) -> None:
    with pytest.raises(StoreRefused, match=r"'three', but the server knows .*one, two"):
        migrations.migrate(settings_for(url, "nowhere", clickhouse_cluster="three"))


def test_an_insert_through_a_distributed_table_is_stored_once(url: str) -> None:
    """One shard, itself: tokens pass through the Distributed table to the table behind it."""
    with closing(connect(settings_for(url, "default"), database=False)) as client:
        client.command(
            "CREATE TABLE default.once_local (market_ticker String) ENGINE = MergeTree"
            " ORDER BY market_ticker SETTINGS non_replicated_deduplication_window = 100"
        )
        client.command(
            "CREATE TABLE default.once AS default.once_local"
            " ENGINE = Distributed('one', 'default', 'once_local', cityHash64(market_ticker))"
        )
        rows = pa.table({"market_ticker": ["A", "B", "C"]})
        for token in ("a", "a", "b", "a"):
            insert_arrow(client, "default.once", rows, token)
        assert client.query("SELECT count() FROM default.once_local").first_row == (6,)


def test_one_market_is_on_one_shard(client: Client) -> None:
    tickers = [f"T{n % 50}" for n in range(500)]
    now = pa.scalar(datetime.now(UTC), pa.timestamp("us", "UTC"))
    rows = pa.table({"market_ticker": tickers, "ingest_ts": pa.repeat(now, len(tickers))})
    insert_arrow(client, "stream_events", rows, "by hand")
    found = client.query(
        "SELECT market_ticker, uniqExact(shardNum()), count() FROM stream_events GROUP BY market_ticker"
    ).result_rows
    assert {(shards, count) for _, shards, count in found} == {(1, 10)}
    shards = client.query("SELECT DISTINCT shardNum() FROM stream_events").result_rows
    assert {number for (number,) in shards} == {1, 2}


def test_where_rows_are_stored_is_read_from_the_server(client: Client, url: str) -> None:
    found = place(client, "spreads")
    assert found is not None
    assert found.target == f"{client.database}.spreads_local ON CLUSTER '{CLUSTER}'"
    assert place(client, "no_such_table") is None


def test_doctor_names_the_cluster_or_those_that_there_are(url: str) -> None:
    check, _ = doctor.CHECKS["ClickHouse"]
    settings = settings_for(url, "default", clickhouse_cluster=CLUSTER)
    assert check(settings).text.endswith("; cluster two: 2 shards on 2 hosts")
    with pytest.raises(StoreRefused, match="the server knows"):
        check(settings.model_copy(update={"clickhouse_cluster": "three"}))


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE t (market_ticker String) ENGINE = Memory",
        "CREATE TABLE t (market_ticker String) ENGINE = ReplicatedMergeTree ORDER BY market_ticker",
        "CREATE TABLE t (market_ticker String) ENGINE = MergeTree ORDER BY 1 AS SELECT 1",
        "CREATE TABLE t AS other",
        "CREATE DICTIONARY d (a String) PRIMARY KEY a",
        "CREATE MATERIALIZED VIEW v ENGINE = MergeTree ORDER BY 1 AS SELECT 1",
        "ALTER TABLE unheard_of ADD COLUMN a Int8",
        "RENAME TABLE a TO b",
        "OPTIMIZE TABLE t FINAL",
    ],
)
def test_unknown_statements_are_refused_by_name(statement: str) -> None:
    with pytest.raises(StoreRefused, match=re.escape(statement[:20])):
        Cluster(CLUSTER, "kalshi").spread(statement)


def test_an_alter_of_columns_reaches_both_tables() -> None:
    cluster = Cluster(CLUSTER, "kalshi")
    cluster.spread(TABLE)
    local, shown = cluster.spread(
        "ALTER TABLE t ADD COLUMN IF NOT EXISTS a Decimal(9, 4) DEFAULT 1 CODEC(ZSTD(3)),\n"
        "  MODIFY SETTING non_replicated_deduplication_window = 5, ttl_only_drop_parts = 1, DROP COLUMN b"
    )
    assert local.startswith(
        "ALTER TABLE kalshi.t_local ON CLUSTER 'two' ADD COLUMN IF NOT EXISTS a"
    )
    assert " replicated_deduplication_window = 5" in local
    assert local.endswith("ttl_only_drop_parts = 1, DROP COLUMN b")
    assert shown == (
        "ALTER TABLE kalshi.t ON CLUSTER 'two' ADD COLUMN IF NOT EXISTS a Decimal(9, 4) DEFAULT 1"
        " CODEC(ZSTD(3)), DROP COLUMN b"
    )


def test_a_materialized_view_stays_on_its_shard() -> None:
    cluster = Cluster(CLUSTER, "kalshi")
    cluster.spread(TABLE)
    cluster.spread(TABLE.replace(" t ", " u "))
    (made,) = cluster.spread(
        "CREATE MATERIALIZED VIEW IF NOT EXISTS v TO u AS SELECT market_ticker AS t FROM t"
    )
    assert made == (
        "CREATE MATERIALIZED VIEW IF NOT EXISTS kalshi.v ON CLUSTER 'two' TO kalshi.u_local"
        " AS SELECT market_ticker AS t FROM kalshi.t_local"
    )


@pytest.mark.parametrize(
    ("statement", "meaning"),
    [
        (
            "CREATE OR REPLACE VIEW v AS SELECT 1",
            ["CREATE OR REPLACE VIEW kalshi.v ON CLUSTER 'two' AS SELECT 1"],
        ),
        ("DROP VIEW IF EXISTS v", ["DROP VIEW IF EXISTS kalshi.v ON CLUSTER 'two'"]),
        (
            "DROP TABLE IF EXISTS t",
            [
                "DROP TABLE IF EXISTS kalshi.t ON CLUSTER 'two' SYNC",
                "DROP TABLE IF EXISTS kalshi.t_local ON CLUSTER 'two' SYNC",
            ],
        ),
        ("INSERT INTO t SELECT * FROM t", ["INSERT INTO t SELECT * FROM t"]),
    ],
)
def test_other_statements_reach_every_host(statement: str, meaning: list[str]) -> None:
    cluster = Cluster(CLUSTER, "kalshi")
    cluster.spread(TABLE)
    assert cluster.spread(statement) == meaning


def test_names_in_texts_and_comments_are_left_alone() -> None:
    made, over = Cluster(CLUSTER, "kalshi").spread(
        "CREATE TABLE IF NOT EXISTS t -- ENGINE = Memory\n(\n    market_ticker String COMMENT 'ENGINE ='\n)"
        "\nENGINE = ReplacingMergeTree(v)\nORDER BY market_ticker\nCOMMENT 'as, before: (t)'"
    )
    assert made.endswith("ORDER BY market_ticker\nCOMMENT 'as, before: (t)'")
    assert "-- ENGINE = Memory\n" in made
    assert "COMMENT 'ENGINE ='" in made
    assert over.startswith("CREATE TABLE IF NOT EXISTS kalshi.t ON CLUSTER 'two' AS kalshi.t_local")


ASKED = [
    "clickhouse/test_live_views.py::test_live_depth_and_imbalance_are_those_of_the_definitions",
    "clickhouse/test_live_views.py::test_rolling_statistics_are_those_of_the_definitions[5-0]",
    "clickhouse/test_views.py::test_book_at_is_the_book_that_a_reader_of_every_event_had[0]",
    "clickhouse/test_views.py::test_an_hour_stands_on_its_checkpoint_alone",
    "clickhouse/test_views.py::test_top_of_book_turns_no_bids_into_yes_asks",
    "clickhouse/test_lossless_proof.py::test_a_gap_row_explains_no_other_gap",
    "clickhouse/test_lossless_proof.py::test_random_losses_are_counted_as_in_python[1]",
    "inventory/test_checks.py::test_each_test_has_empty_tables",
    "inventory/test_checks.py::test_a_spike_that_returns_within_the_second_is_a_drift",
    "inventory/test_checks.py::test_an_action_of_another_market_explains_nothing",
    "inventory/test_checks.py::test_the_last_decision_may_lie_before_the_window",
    "inventory/test_checks.py::test_a_decision_is_held_against_the_snapshot_at_or_before_it",
    "inventory/test_checks.py::test_a_roll_is_found_for_as_long_as_it_lasts",
    "inventory/test_checks.py::test_an_engine_that_has_just_begun_needs_no_snapshot_yet",
    "quality/test_parity.py::test_equal_stores_are_equal_and_an_hour_is_compared_once",
    "quality/test_parity.py::test_a_row_that_clickhouse_lost_is_found",
    "analytics/test_hourly.py::test_computing_an_hour_again_gives_the_same_rows_in_both_stores",
    "analytics/test_hourly.py::test_an_hour_is_replaced_and_its_neighbours_stay",
    "loading/test_restore.py::test_a_repeated_restore_stores_each_row_once",
    "loading/test_restore.py::test_other_rows_are_refused_with_the_replace_command[one doubled]",
]
"""A choice: `CLICKHOUSE_CLUSTER=two pytest FILE` runs any module on two shards."""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_queries_for_one_server_work_on_two_shards(tmp_path: Path) -> None:
    """Tests of views, checks and hours, again, on Distributed tables over two shards."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--basetemp={tmp_path / 'cluster'}", *(f"{root}/{name}" for name in ASKED)],
        env={**os.environ, "CLICKHOUSE_CLUSTER": CLUSTER},
        cwd=root.parent,
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
