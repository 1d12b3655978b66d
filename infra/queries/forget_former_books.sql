-- Set the levels of `latest_levels` to size 0 that a market's newest snapshot no longer has, for markets with a
-- snapshot from `since` on.
--
-- The `version` of each level is the receive time of its newest event in ns, also for a level that the snapshot
-- confirmed. So a level that is older than the snapshot belongs to a former book. The loader does this itself for the
-- books of its journal; this statement is for books that another shard, or a journal that is gone, recorded before.
--
-- Run by: the loader into ClickHouse, after a range with snapshots
INSERT INTO latest_levels (market_id, market_ticker, side, price, size, ts, ingest_ts, version)
WITH base AS
(
    SELECT
        market_ticker,
        max(ingest_ts)                                 AS at,
        toUInt64(toUnixTimestamp64Micro(at)) * 1000    AS at_ns
    FROM stream_events
    WHERE kind = 'snapshot' AND ingest_ts >= {since:DateTime64(6, 'UTC')}
    GROUP BY market_ticker
)
SELECT former.market_id, former.market_ticker, former.side, former.price, 0, NULL, base.at, base.at_ns
FROM
(
    SELECT market_id, market_ticker, side, price, version
    FROM latest_levels FINAL
    WHERE size > 0 AND market_ticker IN (SELECT market_ticker FROM base)
) AS former
INNER JOIN base ON base.market_ticker = former.market_ticker
WHERE former.version < base.at_ns
