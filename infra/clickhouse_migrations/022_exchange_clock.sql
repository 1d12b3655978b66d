-- What the exchange says of a frame since October 2026. `clock` counts the changes of one market and is the
-- same on every connection: the changes of one action share it, and a snapshot has that of the newest change in
-- it. `sent_ts` is when the exchange queued the frame for sending. `ts` is when it matched: sent_ts - ts is the
-- time that the exchange took, ingest_ts - sent_ts that of the network, between two machines' clocks.
--
-- Null where the frame has none: in frames of before, in trades that were fetched by REST, and in rows that were
-- loaded before this migration.

ALTER TABLE orderbook_events
    ADD COLUMN IF NOT EXISTS clock   Nullable(UInt64)               CODEC(Delta, T64, ZSTD(3)),
    ADD COLUMN IF NOT EXISTS sent_ts Nullable(DateTime64(3, 'UTC')) CODEC(Delta, T64, ZSTD(3));

ALTER TABLE trades
    ADD COLUMN IF NOT EXISTS sent_ts Nullable(DateTime64(3, 'UTC')) CODEC(Delta, T64, ZSTD(3));
