-- Compute the current books from the events alone, to fill an empty latest_levels after a restore.
--
-- From each market's newest snapshot on (by its row in stream_events, which an empty snapshot has, too), take the
-- last size of each level of its subscription; levels from before that snapshot get size 0. The newest snapshot has
-- the greatest record of the shard that recorded the market last; without records, the latest receive time and seq.
-- `version` is the receive time in ns, as the loader sets it, so that later events replace these rows.
--
-- Run by: kalshi-platform restore
INSERT INTO latest_levels (market_id, market_ticker, side, price, size, ts, ingest_ts, version)
WITH base AS
(
    SELECT market_ticker, argMax(of_shard, (of IS NOT NULL, last_ts, of)) AS newest
    FROM
    (
        SELECT
            market_ticker,
            shard                                                      AS of,
            max(ingest_ts)                                             AS last_ts,
            max((ifNull(record, 0), ingest_ts, seq, conn_id, sid))     AS of_shard
        FROM stream_events
        WHERE kind = 'snapshot'
        GROUP BY market_ticker, shard
    )
    GROUP BY market_ticker
)
SELECT
    argMax(e.market_id, (e.ingest_ts, e.seq)),
    e.market_ticker,
    e.side,
    e.price,
    argMaxIf
    (
        e.size,
        (ifNull(e.record, 0), e.ingest_ts, e.seq),
        e.conn_id = b.newest.4 AND e.sid = b.newest.5
        AND if(b.newest.1 = 0, e.seq >= b.newest.3, ifNull(e.record, 0) >= b.newest.1)
    ),
    argMax(e.ts, (e.ingest_ts, ifNull(e.record, 0), e.seq)),
    max(e.ingest_ts),
    toUInt64(toUnixTimestamp64Micro(max(e.ingest_ts))) * 1000
FROM orderbook_events AS e
INNER JOIN base AS b ON b.market_ticker = e.market_ticker
GROUP BY e.market_ticker, e.side, e.price
