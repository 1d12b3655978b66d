-- Roles and their rights in ClickHouse. Run it as a user with access management, and again after an upgrade:
-- every statement may run again. users.sql creates the users of these roles.
--
--   kalshi_reader    people and Grafana: reads, with bounded memory and time; changes nothing
--   kalshi_writer    a streamer, a market maker: reads, and inserts into the tables that it records
--   kalshi_operator  Dagster's code location: the writer's rights, and those for computing an hour
--   kalshi_admin     migrations: tables, views and retention of the database kalshi, and nothing else
--
-- The database is `kalshi`; if CLICKHOUSE_DATABASE is another one, replace the name. Names that end in
-- _local are a cluster's tables behind the Distributed ones. `*` at the end of a name needs ClickHouse
-- 24.10. On a cluster run cluster.sql too.

CREATE ROLE IF NOT EXISTS kalshi_reader;
CREATE ROLE IF NOT EXISTS kalshi_writer;
CREATE ROLE IF NOT EXISTS kalshi_operator;
CREATE ROLE IF NOT EXISTS kalshi_admin;

-- readonly = 2: a query may have settings (log_comment, Grafana's time-out) within these bounds.
-- MIN 1, because 0 means no bound.
CREATE SETTINGS PROFILE IF NOT EXISTS kalshi_reader SETTINGS
    readonly = 2 CONST,
    max_memory_usage = 4000000000 MIN 1 MAX 4000000000,
    max_execution_time = 30 MIN 1 MAX 120,
    max_result_rows = 1000000 MIN 1 MAX 10000000,
    result_overflow_mode = 'throw' CONST,
    max_threads = 4 MIN 1 MAX 8,
    distributed_product_mode = 'global'
TO kalshi_reader;

-- An insert is acknowledged when every shard has its rows; without a cluster it has no effect.
CREATE SETTINGS PROFILE IF NOT EXISTS kalshi_writer SETTINGS
    distributed_foreground_insert = 1,
    distributed_product_mode = 'global'
TO kalshi_writer, kalshi_operator, kalshi_admin;

-- No query is compiled: the fourth run of a query would take 2.5 to 5 times as long, to save a tenth of long
-- scans (docs/performance.md). A query that scans much may set them to 1.
CREATE SETTINGS PROFILE IF NOT EXISTS kalshi_no_compiling SETTINGS
    compile_expressions = 0,
    compile_aggregate_expressions = 0,
    compile_sort_description = 0
TO kalshi_reader, kalshi_writer, kalshi_operator;

GRANT SELECT, SHOW ON kalshi.* TO kalshi_reader;

GRANT SELECT, SHOW ON kalshi.* TO kalshi_writer;
GRANT INSERT ON kalshi.orderbook_events TO kalshi_writer;
GRANT INSERT ON kalshi.orderbook_events_local TO kalshi_writer;
GRANT INSERT ON kalshi.stream_events TO kalshi_writer;
GRANT INSERT ON kalshi.stream_events_local TO kalshi_writer;
GRANT INSERT ON kalshi.book_checkpoints TO kalshi_writer;
GRANT INSERT ON kalshi.book_checkpoints_local TO kalshi_writer;
GRANT INSERT ON kalshi.latest_levels TO kalshi_writer;
GRANT INSERT ON kalshi.latest_levels_local TO kalshi_writer;
GRANT INSERT ON kalshi.trades TO kalshi_writer;
GRANT INSERT ON kalshi.trades_local TO kalshi_writer;
GRANT INSERT ON kalshi.market_catalog TO kalshi_writer;
GRANT INSERT ON kalshi.market_catalog_local TO kalshi_writer;
GRANT INSERT, SYSTEM SYNC REPLICA ON kalshi.recorders TO kalshi_writer;
GRANT INSERT, SYSTEM SYNC REPLICA ON kalshi.recorders_local TO kalshi_writer;
GRANT INSERT ON kalshi.mm_decisions TO kalshi_writer;
GRANT INSERT ON kalshi.mm_decisions_local TO kalshi_writer;
GRANT INSERT ON kalshi.mm_order_actions TO kalshi_writer;
GRANT INSERT ON kalshi.mm_order_actions_local TO kalshi_writer;
GRANT INSERT ON kalshi.mm_order_responses TO kalshi_writer;
GRANT INSERT ON kalshi.mm_order_responses_local TO kalshi_writer;
GRANT INSERT ON kalshi.mm_fills TO kalshi_writer;
GRANT INSERT ON kalshi.mm_fills_local TO kalshi_writer;
GRANT INSERT ON kalshi.mm_position_snapshots TO kalshi_writer;
GRANT INSERT ON kalshi.mm_position_snapshots_local TO kalshi_writer;

-- An hour of analytics is written to a staging table (spreads_staging_2026112214), which then replaces the
-- partition. DROP is granted on staging tables only.
GRANT kalshi_writer TO kalshi_operator;
GRANT INSERT ON kalshi.mm_inventory_breaks TO kalshi_operator;
GRANT INSERT ON kalshi.mm_inventory_breaks_local TO kalshi_operator;
GRANT INSERT ON kalshi.retention_changes TO kalshi_operator;
GRANT INSERT ON kalshi.retention_changes_local TO kalshi_operator;
GRANT INSERT, ALTER DELETE ON kalshi.spreads TO kalshi_operator;
GRANT INSERT, ALTER DELETE ON kalshi.spreads_local TO kalshi_operator;
GRANT INSERT, ALTER DELETE ON kalshi.depth TO kalshi_operator;
GRANT INSERT, ALTER DELETE ON kalshi.depth_local TO kalshi_operator;
GRANT INSERT, ALTER DELETE ON kalshi.imbalance TO kalshi_operator;
GRANT INSERT, ALTER DELETE ON kalshi.imbalance_local TO kalshi_operator;
GRANT INSERT, CREATE TABLE, DROP TABLE, SYSTEM SYNC REPLICA ON kalshi.spreads_staging_* TO kalshi_operator;
GRANT INSERT, CREATE TABLE, DROP TABLE, SYSTEM SYNC REPLICA ON kalshi.depth_staging_* TO kalshi_operator;
GRANT INSERT, CREATE TABLE, DROP TABLE, SYSTEM SYNC REPLICA ON kalshi.imbalance_staging_* TO kalshi_operator;

GRANT SELECT, INSERT, SHOW, CREATE DATABASE, CREATE TABLE, CREATE VIEW, ALTER, DROP TABLE, DROP VIEW, TRUNCATE, OPTIMIZE, SYSTEM SYNC REPLICA ON kalshi.* TO kalshi_admin;
