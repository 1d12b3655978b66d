-- The first instant at which a row of the analytics may be used. A row of `depth` or `imbalance` is keyed by
-- its second's first instant and holds the state of its end, so that a join on `second` sees up to a second
-- of the future; joined on `known_at` it does not. Rows that were computed before this migration have it, too.

ALTER TABLE spreads
    ADD COLUMN IF NOT EXISTS known_at DateTime64(6, 'UTC') DEFAULT ingest_ts CODEC(Delta, T64, ZSTD(3));

ALTER TABLE depth
    ADD COLUMN IF NOT EXISTS known_at DateTime64(6, 'UTC') DEFAULT second + INTERVAL 1 SECOND CODEC(Delta, T64, ZSTD(3));

ALTER TABLE imbalance
    ADD COLUMN IF NOT EXISTS known_at DateTime64(6, 'UTC') DEFAULT second + INTERVAL 1 SECOND CODEC(Delta, T64, ZSTD(3));
