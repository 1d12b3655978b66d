-- The order book: every event, everything else that came or happened, the book of every hour's
-- first instant, and the book now. Columns are those of kalshi_platform/storage/schema.py; a test
-- compares them. The database is the connection's own, and the retention (TTL) is set by `migrate`
-- from HOT_RETENTION_DAYS.
--
-- The order serves "this market, that span of time". Snapshot levels share one ingest_ts and seq,
-- hence side and price at the end; they are no part of the primary key, which stays in memory.
--
-- non_replicated_deduplication_window makes insert_deduplication_token work on a single server,
-- where its default is 0: a batch that is sent twice is stored once. ttl_only_drop_parts lets
-- whole days go at once instead of rewriting them.
--
-- Codecs were chosen by measurement, on two sets of rows, each loaded into the ClickHouse engine 26.9
-- as one wide part (OPTIMIZE FINAL, system.parts_columns, bytes of compressed data for each row):
--   one    the recorded production flow of one market: 63 snapshot levels and 7,662 deltas over 108
--          minutes, with its real exchange and receive times; too small for a part of real size
--   64     a construction from it, no recording: the same flow for 64 markets on one sid, each with its
--          own start, stretch of time (0.5 to 2), latency (0.8 to 1.25), sizes (0.3 to 3) and prices,
--          so that no copy compresses against another; 494,400 rows
--
--   codec, set 64    ZSTD(1)  ZSTD(3)  ZSTD(6)  Delta,ZSTD(3)  Delta,T64,ZSTD(3)  DoubleDelta,ZSTD(1)
--     seq               1.29     1.33     1.28       0.96            0.91               1.19
--     price             0.10     0.09     0.09       0.08            0.15               0.14
--     qty               0.34     0.29     0.26       0.37            0.73               0.59
--     size              0.46     0.34     0.31       0.38            0.73               0.57
--     ts                3.52     3.14     3.11       3.16            2.76               3.95
--     ingest_ts         3.38     3.16     3.11       2.91            2.50               3.73
--
-- T64('bit') was worse than T64, ZSTD(9) gained nothing over ZSTD(6), and Gorilla is refused on whole
-- numbers. The two times are most of a row: both clocks have microseconds of real noise.
-- This table, all columns: 5.8 bytes for each row of set "one", 6.8 of set "64" (6.9 on disk with
-- marks and index). With 1,500 quiet markets of some 200 rows each, mostly snapshots: 7.6.

CREATE TABLE IF NOT EXISTS orderbook_events
(
    type            Enum8('snapshot' = 1, 'delta' = 2) CODEC(ZSTD(3)),
    conn_id         UUID                               CODEC(ZSTD(3)),
    sid             UInt32                             CODEC(ZSTD(3)),
    seq             UInt64                             CODEC(Delta, T64, ZSTD(3)),
    market_id       UUID                               CODEC(ZSTD(3)),
    market_ticker   LowCardinality(String)             CODEC(ZSTD(3)),
    side            Enum8('yes' = 1, 'no' = 2)         CODEC(ZSTD(3)),
    price           Decimal(9, 4)                      CODEC(Delta, ZSTD(3)),
    qty             Decimal(18, 2)                     CODEC(ZSTD(6)),
    size            Decimal(18, 2)                     CODEC(ZSTD(6)),
    ts              Nullable(DateTime64(6, 'UTC'))     CODEC(Delta, T64, ZSTD(3)),
    ingest_ts       DateTime64(6, 'UTC')               CODEC(Delta, T64, ZSTD(3)),
    client_order_id String                             CODEC(ZSTD(3))
)
ENGINE = MergeTree
PARTITION BY toDate(ingest_ts)
PRIMARY KEY (market_ticker, ingest_ts)
ORDER BY (market_ticker, ingest_ts, seq, side, price)
SETTINGS
    non_replicated_deduplication_window = 10000,
    ttl_only_drop_parts = 1,
    materialize_ttl_recalculate_only = 1
COMMENT 'Every order-book event: one row per level of a snapshot, one per delta.';

CREATE TABLE IF NOT EXISTS stream_events
(
    ingest_ts     DateTime64(6, 'UTC')   CODEC(Delta, ZSTD(3)),
    conn_id       UUID                   CODEC(ZSTD(3)),
    sid           UInt32                 CODEC(ZSTD(3)),
    seq           UInt64                 CODEC(Delta, ZSTD(3)),
    kind          LowCardinality(String) CODEC(ZSTD(3)),
    market_ticker LowCardinality(String) CODEC(ZSTD(3)),
    detail        String                 CODEC(ZSTD(3))
)
ENGINE = MergeTree
PARTITION BY toDate(ingest_ts)
PRIMARY KEY (market_ticker, ingest_ts)
ORDER BY (market_ticker, ingest_ts, conn_id, sid, seq)
SETTINGS
    non_replicated_deduplication_window = 10000,
    ttl_only_drop_parts = 1,
    materialize_ttl_recalculate_only = 1
COMMENT 'Everything else that came from the exchange or happened to the recording.';

CREATE TABLE IF NOT EXISTS book_checkpoints
(
    ts            DateTime64(6, 'UTC')                  CODEC(Delta, ZSTD(3)),
    conn_id       UUID                                  CODEC(ZSTD(3)),
    sid           UInt32                                CODEC(ZSTD(3)),
    seq           UInt64                                CODEC(Delta, ZSTD(3)),
    market_id     UUID                                  CODEC(ZSTD(3)),
    market_ticker LowCardinality(String)                CODEC(ZSTD(3)),
    verified      Bool                                  CODEC(ZSTD(3)),
    side          Nullable(Enum8('yes' = 1, 'no' = 2))  CODEC(ZSTD(3)),
    price         Nullable(Decimal(9, 4))               CODEC(Delta, ZSTD(3)),
    size          Nullable(Decimal(18, 2))              CODEC(ZSTD(6))
)
ENGINE = MergeTree
PARTITION BY toDate(ts)
ORDER BY (market_ticker, ts)
SETTINGS
    non_replicated_deduplication_window = 10000,
    ttl_only_drop_parts = 1,
    materialize_ttl_recalculate_only = 1
COMMENT 'Every live book at the first instant of each hour: one row per level, at least one per market.';

-- No retention: a level that has not moved for a month is still on the book.
CREATE TABLE IF NOT EXISTS latest_levels
(
    market_id     UUID                           CODEC(ZSTD(3)),
    market_ticker LowCardinality(String)         CODEC(ZSTD(3)),
    side          Enum8('yes' = 1, 'no' = 2)     CODEC(ZSTD(3)),
    price         Decimal(9, 4)                  CODEC(Delta, ZSTD(3)),
    size          Decimal(18, 2)                 CODEC(ZSTD(3)),
    ts            Nullable(DateTime64(6, 'UTC')) CODEC(ZSTD(3)),
    ingest_ts     DateTime64(6, 'UTC')           CODEC(ZSTD(3)),
    version       UInt64                         CODEC(ZSTD(3))
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (market_ticker, side, price)
SETTINGS non_replicated_deduplication_window = 10000
COMMENT 'The book now: SELECT … FROM latest_levels FINAL WHERE size > 0.';
