-- Spreads, depth and imbalance by the hour, and what can be asked of the live book: its depth, its
-- imbalance, and the last minutes of a market. Columns are those of kalshi_platform/storage/schema.py;
-- a test compares them. Formulas are in the docstrings of kalshi_platform/analytics.
--
-- An hour is computed from its own files alone and may be computed again: it is replaced whole. That is
-- why a partition is an hour: ALTER TABLE ... REPLACE PARTITION puts all its rows in the place of the old
-- ones at one instant. No reader sees an hour twice or in part, and a kill leaves the old or the new one.
-- 30 days are 720 partitions of one part each; parts expire whole (ttl_only_drop_parts).

CREATE TABLE IF NOT EXISTS spreads
(
    market_ticker LowCardinality(String)         CODEC(ZSTD(3)),
    ts            Nullable(DateTime64(6, 'UTC')) CODEC(Delta, T64, ZSTD(3)),
    ingest_ts     DateTime64(6, 'UTC')           CODEC(Delta, T64, ZSTD(3)),
    conn_id       UUID                           CODEC(ZSTD(3)),
    sid           UInt32                         CODEC(ZSTD(3)),
    seq           UInt64                         CODEC(Delta, T64, ZSTD(3)),
    cause         Enum8('checkpoint' = 1, 'snapshot' = 2, 'delta' = 3, 'doubt' = 4) CODEC(ZSTD(3)),
    verified      Bool                           CODEC(ZSTD(3)),
    yes_bid       Nullable(Decimal(9, 4))        CODEC(Delta, ZSTD(3)),
    yes_bid_size  Nullable(Decimal(18, 2))       CODEC(ZSTD(3)),
    yes_ask       Nullable(Decimal(9, 4))        CODEC(Delta, ZSTD(3)),
    yes_ask_size  Nullable(Decimal(18, 2))       CODEC(ZSTD(3)),
    spread        Nullable(Decimal(9, 4))        CODEC(Delta, ZSTD(3)),
    mid           Nullable(Decimal(9, 5))        CODEC(Delta, ZSTD(3)),
    microprice    Nullable(Float64)              CODEC(ZSTD(3))
)
ENGINE = MergeTree
PARTITION BY toStartOfHour(ingest_ts)
PRIMARY KEY (market_ticker, ingest_ts)
ORDER BY (market_ticker, ingest_ts, seq)
SETTINGS
    non_replicated_deduplication_window = 10000,
    ttl_only_drop_parts = 1,
    materialize_ttl_recalculate_only = 1
COMMENT 'Every change of a market''s best prices or their sizes, with the frame that caused it.';

CREATE TABLE IF NOT EXISTS depth
(
    market_ticker LowCardinality(String)  CODEC(ZSTD(3)),
    second        DateTime64(6, 'UTC')    CODEC(Delta, T64, ZSTD(3)),
    verified      Bool                    CODEC(ZSTD(3)),
    yes_bid       Nullable(Decimal(9, 4)) CODEC(Delta, ZSTD(3)),
    bid_size      Decimal(18, 2)          CODEC(ZSTD(3)),
    bid_size_1c   Decimal(18, 2)          CODEC(ZSTD(3)),
    bid_size_2c   Decimal(18, 2)          CODEC(ZSTD(3)),
    bid_size_5c   Decimal(18, 2)          CODEC(ZSTD(3)),
    bid_size_10c  Decimal(18, 2)          CODEC(ZSTD(3)),
    bid_size_all  Decimal(18, 2)          CODEC(Delta, ZSTD(3)),
    bid_levels    UInt32                  CODEC(Delta, ZSTD(3)),
    bid_notional  Decimal(18, 6)          CODEC(Delta, ZSTD(3)),
    yes_ask       Nullable(Decimal(9, 4)) CODEC(Delta, ZSTD(3)),
    ask_size      Decimal(18, 2)          CODEC(ZSTD(3)),
    ask_size_1c   Decimal(18, 2)          CODEC(ZSTD(3)),
    ask_size_2c   Decimal(18, 2)          CODEC(ZSTD(3)),
    ask_size_5c   Decimal(18, 2)          CODEC(ZSTD(3)),
    ask_size_10c  Decimal(18, 2)          CODEC(ZSTD(3)),
    ask_size_all  Decimal(18, 2)          CODEC(Delta, ZSTD(3)),
    ask_levels    UInt32                  CODEC(Delta, ZSTD(3)),
    ask_notional  Decimal(18, 6)          CODEC(Delta, ZSTD(3))
)
ENGINE = MergeTree
PARTITION BY toStartOfHour(second)
ORDER BY (market_ticker, second)
SETTINGS
    non_replicated_deduplication_window = 10000,
    ttl_only_drop_parts = 1,
    materialize_ttl_recalculate_only = 1
COMMENT 'What rests on both sides of a market, at the end of every second in which that changed.';

CREATE TABLE IF NOT EXISTS imbalance
(
    market_ticker      LowCardinality(String) CODEC(ZSTD(3)),
    second             DateTime64(6, 'UTC')   CODEC(Delta, T64, ZSTD(3)),
    verified           Bool                   CODEC(ZSTD(3)),
    imbalance_best     Nullable(Float64)      CODEC(ZSTD(3)),
    imbalance_5_levels Nullable(Float64)      CODEC(ZSTD(3)),
    imbalance_5c       Nullable(Float64)      CODEC(ZSTD(3)),
    ofi                Decimal(18, 2)         CODEC(ZSTD(3))
)
ENGINE = MergeTree
PARTITION BY toStartOfHour(second)
ORDER BY (market_ticker, second)
SETTINGS
    non_replicated_deduplication_window = 10000,
    ttl_only_drop_parts = 1,
    materialize_ttl_recalculate_only = 1
COMMENT 'Which side is the heavier, and the order flow, for every second in which there is news of either.';
