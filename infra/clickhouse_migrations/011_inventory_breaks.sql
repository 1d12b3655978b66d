-- Breaks: what the inventory checks found, each counted once while it lasts.
--
-- A row for each state of a break; the newest wins: SELECT … FROM mm_inventory_breaks FINAL. It is
-- open while closed_at is null, and closes when the market's decisions have been in order for a while.

CREATE TABLE IF NOT EXISTS mm_inventory_breaks
(
    break_id      UUID                          CODEC(ZSTD(3)),
    check_name    LowCardinality(String)        CODEC(ZSTD(3)) COMMENT 'the check that found it',
    market_ticker LowCardinality(String)        CODEC(ZSTD(3)),
    kind          LowCardinality(String)        CODEC(ZSTD(3)) COMMENT 'timing, missing fill, unknown order, rolled inventory, wrong convention, stale snapshot, unexplained',
    opened_at     DateTime64(3, 'UTC')          CODEC(ZSTD(3)) COMMENT 'its first finding',
    last_seen_at  DateTime64(3, 'UTC')          CODEC(ZSTD(3)) COMMENT 'its last finding so far',
    closed_at     Nullable(DateTime64(3, 'UTC')) CODEC(ZSTD(3)) COMMENT 'null while it is open',
    findings      UInt64                        CODEC(ZSTD(3)) COMMENT 'rows of the check that belong to it, as far as they have been looked at',
    worst         Float64                       CODEC(ZSTD(3)) COMMENT 'the largest difference, contracts; seconds for a stale snapshot',
    explanation   String                        CODEC(ZSTD(3)),
    updated_at    DateTime64(3, 'UTC')          CODEC(ZSTD(3))
)
ENGINE = ReplacingMergeTree(updated_at)
ORDER BY (market_ticker, check_name, opened_at, break_id)
SETTINGS non_replicated_deduplication_window = 10000
COMMENT 'Inventory breaks, open and closed: SELECT … FROM mm_inventory_breaks FINAL.';
