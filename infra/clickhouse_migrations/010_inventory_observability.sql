-- What the engine believes to hold, on every row of mm_decisions: the filled position, what its
-- resting orders could add to it, the resting inventory itself, and whether it was allowed to quote.
--
-- It runs on a database that holds an older mm_decisions, with rows or without, and on one that has
-- none. Nothing is rewritten: a row that was written before has `nan` for a position, which is
-- "not known", not zero, and no check judges it. An engine that still writes the older columns only
-- goes on as it is.
--
-- Run: kalshi-platform migrate
--  or: kalshi-platform sql "SOURCE infra/clickhouse_migrations/010_inventory_observability.sql"

CREATE TABLE IF NOT EXISTS mm_decisions
(
    ts                 DateTime64(3, 'UTC')   CODEC(Delta, ZSTD(3)),
    decision_id        UUID                   CODEC(ZSTD(3)),
    engine_instance_id LowCardinality(String) CODEC(ZSTD(3)),
    engine_version     LowCardinality(String) CODEC(ZSTD(3)),
    market_ticker      LowCardinality(String) CODEC(ZSTD(3)),
    bb_px              Float64                CODEC(ZSTD(3)) COMMENT 'best YES bid, dollars',
    ba_px              Float64                CODEC(ZSTD(3)) COMMENT 'best YES ask, dollars',
    mid                Float64                CODEC(ZSTD(3)),
    spread             Float64                CODEC(ZSTD(3)),
    fair               Float64                CODEC(ZSTD(3)),
    target_bid_px      Float64                CODEC(ZSTD(3)),
    target_ask_px      Float64                CODEC(ZSTD(3)),
    target_bid_sz      Float64                CODEC(ZSTD(3)) COMMENT 'contracts',
    target_ask_sz      Float64                CODEC(ZSTD(3)) COMMENT 'contracts',
    inv_before         Float64                CODEC(ZSTD(3)) COMMENT 'the filled position, never the last estimate',
    inv_after_est      Float64                CODEC(ZSTD(3)) COMMENT 'an estimate; nothing follows from it',
    params_json        String                 CODEC(ZSTD(3))
)
ENGINE = MergeTree
PARTITION BY toDate(ts)
ORDER BY (market_ticker, ts)
SETTINGS non_replicated_deduplication_window = 10000
COMMENT 'Every decision of the market maker, one row for each loop and market.';

ALTER TABLE mm_decisions
    ADD COLUMN IF NOT EXISTS pos_filled         Float64 DEFAULT nan CODEC(ZSTD(3)) COMMENT 'reconciled, fill-based position from the exchange; YES positive, NO negative; nan: not known',
    ADD COLUMN IF NOT EXISTS pos_open_exposure  Float64 DEFAULT nan CODEC(ZSTD(3)) COMMENT 'what the orders live at this moment add when all of them fill',
    ADD COLUMN IF NOT EXISTS pos_total_est      Float64 DEFAULT nan CODEC(ZSTD(3)) COMMENT 'pos_filled + pos_open_exposure',
    ADD COLUMN IF NOT EXISTS open_orders_count  UInt32              CODEC(ZSTD(3)) COMMENT 'orders live at this moment',
    ADD COLUMN IF NOT EXISTS open_yes_bid_size  Float64             CODEC(ZSTD(3)) COMMENT 'contracts resting as YES bids',
    ADD COLUMN IF NOT EXISTS open_yes_ask_size  Float64             CODEC(ZSTD(3)) COMMENT 'contracts resting as YES asks',
    ADD COLUMN IF NOT EXISTS open_no_bid_size   Float64             CODEC(ZSTD(3)) COMMENT 'contracts resting as NO bids',
    ADD COLUMN IF NOT EXISTS open_no_ask_size   Float64             CODEC(ZSTD(3)) COMMENT 'contracts resting as NO asks',
    ADD COLUMN IF NOT EXISTS allowed            UInt8 DEFAULT 1     CODEC(ZSTD(3)) COMMENT 'whether quoting was permitted',
    ADD COLUMN IF NOT EXISTS block_stage        LowCardinality(String) CODEC(ZSTD(3)) COMMENT 'where it was refused',
    ADD COLUMN IF NOT EXISTS block_codes        Array(LowCardinality(String)) CODEC(ZSTD(3)) COMMENT 'why it was refused: authoritative',
    ADD COLUMN IF NOT EXISTS reason_codes       Array(LowCardinality(String)) CODEC(ZSTD(3)) COMMENT 'legacy, possibly partial: read block_codes',
    ADD COLUMN IF NOT EXISTS inv_convention     LowCardinality(String) CODEC(ZSTD(3)) COMMENT 'the normalisation used when reconciling fills';

-- An older table may have been made without it: then a batch that is sent again would be stored twice.
ALTER TABLE mm_decisions MODIFY SETTING non_replicated_deduplication_window = 10000;
