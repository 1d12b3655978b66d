-- Where a row came from: the shard whose recorder received it, and the number of the journal record that
-- made it. Together they are the order of receipt. Frames of one read of the socket share `ingest_ts`, and
-- a receive clock can be set back, so no time is that order.
--
-- Null in rows that were loaded before this migration. All rows of one snapshot share one record; those of
-- a checkpoint have the record that begins the hour: all records before it are in the book.

ALTER TABLE orderbook_events
    ADD COLUMN IF NOT EXISTS shard  Nullable(UInt32) CODEC(ZSTD(3)),
    ADD COLUMN IF NOT EXISTS record Nullable(UInt64) CODEC(Delta, T64, ZSTD(3));

ALTER TABLE stream_events
    ADD COLUMN IF NOT EXISTS shard  Nullable(UInt32) CODEC(ZSTD(3)),
    ADD COLUMN IF NOT EXISTS record Nullable(UInt64) CODEC(Delta, T64, ZSTD(3));

ALTER TABLE book_checkpoints
    ADD COLUMN IF NOT EXISTS shard  Nullable(UInt32) CODEC(ZSTD(3)),
    ADD COLUMN IF NOT EXISTS record Nullable(UInt64) CODEC(Delta, T64, ZSTD(3));

ALTER TABLE trades
    ADD COLUMN IF NOT EXISTS shard  Nullable(UInt32) CODEC(ZSTD(3)),
    ADD COLUMN IF NOT EXISTS record Nullable(UInt64) CODEC(Delta, T64, ZSTD(3));
