-- Trades, and what the markets are. Columns are those of kalshi_platform/storage/schema.py; a test
-- compares them. Codecs are those that 001_order_book.sql measured for columns of the same kind. Retention
-- of `trades` is HOT_RETENTION_DAYS, as of the other recorded tables.

-- Numbers of the trade channel count per sid, as those of the books do. A trade without one (seq 0) was
-- fetched from the exchange's REST interface, after the stream had missed it.
CREATE TABLE IF NOT EXISTS trades
(
    conn_id            UUID                         CODEC(ZSTD(3)),
    sid                UInt32                       CODEC(ZSTD(3)),
    seq                UInt64                       CODEC(Delta, ZSTD(3)),
    trade_id           String                       CODEC(ZSTD(3)),
    market_ticker      LowCardinality(String)       CODEC(ZSTD(3)),
    yes_price          Decimal(9, 4)                CODEC(Delta, ZSTD(3)),
    no_price           Decimal(9, 4)                CODEC(Delta, ZSTD(3)),
    qty                Decimal(18, 2)               CODEC(ZSTD(6)),
    taker_outcome_side Enum8('yes' = 1, 'no' = 2)   CODEC(ZSTD(3)),
    taker_book_side    Enum8('bid' = 1, 'ask' = 2)  CODEC(ZSTD(3)),
    is_block_trade     Bool                         CODEC(ZSTD(3)),
    ts                 DateTime64(3, 'UTC')         CODEC(Delta, ZSTD(3)),
    ingest_ts          DateTime64(6, 'UTC')         CODEC(Delta, T64, ZSTD(3))
)
ENGINE = MergeTree
PARTITION BY toDate(ingest_ts)
PRIMARY KEY (market_ticker, ingest_ts)
ORDER BY (market_ticker, ingest_ts, conn_id, sid, seq)
SETTINGS
    non_replicated_deduplication_window = 10000,
    ttl_only_drop_parts = 1,
    materialize_ttl_recalculate_only = 1
COMMENT 'Every trade of the followed markets, as everybody sees it.';

-- A row for each time that a market was read; the newest wins: SELECT … FROM market_catalog FINAL. A
-- market stays when it is settled: what was recorded of it is there for good, too.
CREATE TABLE IF NOT EXISTS market_catalog
(
    market_ticker          LowCardinality(String)         CODEC(ZSTD(3)),
    event_ticker           LowCardinality(String)         CODEC(ZSTD(3)),
    series_ticker          LowCardinality(String)         CODEC(ZSTD(3)),
    title                  String                         CODEC(ZSTD(3)),
    yes_sub_title          String                         CODEC(ZSTD(3)),
    market_type            LowCardinality(String)         CODEC(ZSTD(3)),
    status                 LowCardinality(String)         CODEC(ZSTD(3)),
    result                 LowCardinality(String)         CODEC(ZSTD(3)),
    open_time              Nullable(DateTime64(6, 'UTC')) CODEC(ZSTD(3)),
    close_time             Nullable(DateTime64(6, 'UTC')) CODEC(ZSTD(3)),
    latest_expiration_time Nullable(DateTime64(6, 'UTC')) CODEC(ZSTD(3)),
    settlement_ts          Nullable(DateTime64(6, 'UTC')) CODEC(ZSTD(3)),
    settlement_value       Nullable(Decimal(9, 4))        CODEC(ZSTD(3)),
    price_level_structure  LowCardinality(String)         CODEC(ZSTD(3)),
    price_ranges           Array(Tuple(start Decimal(9, 4), end Decimal(9, 4), step Decimal(9, 4))) CODEC(ZSTD(3)),
    last_price             Nullable(Decimal(9, 4))        CODEC(ZSTD(3)),
    volume                 Nullable(Decimal(18, 2))       CODEC(ZSTD(3)),
    open_interest          Nullable(Decimal(18, 2))       CODEC(ZSTD(3)),
    as_of                  DateTime64(6, 'UTC')           CODEC(ZSTD(3))
)
ENGINE = ReplacingMergeTree(as_of)
ORDER BY market_ticker
SETTINGS non_replicated_deduplication_window = 10000
COMMENT 'What the followed markets are: SELECT … FROM market_catalog FINAL.';
