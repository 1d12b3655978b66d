-- What is the book now, told from the events alone? Fills an empty latest_levels after a restore.
--
-- Of each market's newest snapshot on (by its row in stream_events, which an empty snapshot has too)
-- the last size of each level; levels from before that snapshot get size 0. `version` is the receive
-- time in ns, as the load itself sets it, so that what is recorded later wins.
--
-- Run by: kalshi-platform restore
INSERT INTO latest_levels (market_id, market_ticker, side, price, size, ts, ingest_ts, version)
WITH base AS
(
    SELECT
        market_ticker,
        argMax((conn_id, seq), (ingest_ts, seq)) AS newest
    FROM stream_events
    WHERE kind = 'snapshot'
    GROUP BY market_ticker
)
SELECT
    argMax(e.market_id, (e.ingest_ts, e.seq)),
    e.market_ticker,
    e.side,
    e.price,
    argMaxIf(e.size, (e.ingest_ts, e.seq), e.conn_id = b.newest.1 AND e.seq >= b.newest.2),
    argMax(e.ts, (e.ingest_ts, e.seq)),
    max(e.ingest_ts),
    toUInt64(toUnixTimestamp64Micro(max(e.ingest_ts))) * 1000
FROM orderbook_events AS e
INNER JOIN base AS b ON b.market_ticker = e.market_ticker
GROUP BY e.market_ticker, e.side, e.price
