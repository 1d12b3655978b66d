-- When the retention of a table was changed, and up to which instant its rows may have been deleted by
-- then. The proof of losslessness asks it: a retention that is longer now may have been shorter when a
-- subscription's beginning went. A row for each change, written before it is made.

CREATE TABLE IF NOT EXISTS retention_changes
(
    changed_at   DateTime64(6, 'UTC')            CODEC(ZSTD(3)),
    table_name   LowCardinality(String)          CODEC(ZSTD(3)),
    days_before  Nullable(UInt32)                CODEC(ZSTD(3)) COMMENT 'null: for ever',
    days_after   Nullable(UInt32)                CODEC(ZSTD(3)) COMMENT 'null: for ever',
    rows_deleted UInt64                          CODEC(ZSTD(3)) COMMENT 'rows that the change let go of at once',
    taken_before DateTime64(6, 'UTC')            CODEC(ZSTD(3)) COMMENT 'older rows may have been deleted by then; 1970: none'
)
ENGINE = MergeTree
ORDER BY changed_at
SETTINGS non_replicated_deduplication_window = 10000
COMMENT 'Changes of retention: when, of which table, from how many days to how many.';
