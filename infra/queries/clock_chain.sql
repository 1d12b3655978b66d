-- Where did a market miss nothing, although frames were missed or the connection was replaced? One row for each
-- snapshot that follows another frame of its market, by the exchange's clocks:
--
--   record, at          the snapshot's journal record and receive time
--   since               when the frame before it was received
--   same_connection     whether that came on the same connection
--   after, clock        the clock of the frame before, and that of the snapshot
--   link                same: the market did not change in between. higher: it changed, and what it may have missed is
--                       between `after` (exclusive) and `clock` (inclusive). lower: the clock fell, as it may across
--                       maintenance
--   unchanged           1 where the recorder found the book stale before the snapshot, and complete: the clock of its
--                       last complete change and all its levels are those of the snapshot. `link` compares with the
--                       last frame, which may have come after the missing ones; `unchanged` does not
--
-- Frames without a clock, and rows of versions without `record`, are not compared. The clocks of a market are the
-- same on every connection, so those of the shards and of several recorders may be compared with each other.
--
-- `since` and `until` bound the receive times.
--
-- Run: kalshi-platform sql --file infra/queries/clock_chain.sql
WITH
    toDateTime64('1971-01-01 00:00:00', 6, 'UTC') AS seen_from,
    toDateTime64('2299-01-01 00:00:00', 6, 'UTC') AS seen_until,
    snapshots AS
    (
        SELECT
            assumeNotNull(shard)                AS shard_id,
            toString(market_ticker)             AS market,
            assumeNotNull(record)               AS n,
            conn_id,
            ingest_ts,
            JSONExtractUInt(detail, 'clock')    AS clock,
            JSONExtractBool(detail, 'unchanged') AS unchanged
        FROM stream_events
        WHERE kind = 'snapshot' AND isNotNull(record) AND JSONHas(detail, 'clock')
            AND ingest_ts >= seen_from AND ingest_ts <= seen_until
    ),
    frames AS
    (
        SELECT
            assumeNotNull(shard)    AS shard_id,
            toString(market_ticker) AS market,
            assumeNotNull(record)   AS n,
            conn_id,
            ingest_ts,
            assumeNotNull(clock)    AS clock
        FROM orderbook_events
        WHERE type = 'delta' AND isNotNull(record) AND isNotNull(clock)
            AND ingest_ts >= seen_from AND ingest_ts <= seen_until
        UNION ALL
        SELECT shard_id, market, n, conn_id, ingest_ts, clock FROM snapshots
    )
SELECT
    market                                              AS market_ticker,
    shard_id                                            AS shard,
    next_n                                              AS record,
    any(next_ts)                                        AS at,
    argMax(frame_ts, frame_n)                           AS since,
    argMax(frame_conn, frame_n) = any(next_conn)        AS same_connection,
    argMax(frame_clock, frame_n)                        AS after,
    any(next_clock)                                     AS clock,
    multiIf(clock = after, 'same', clock > after, 'higher', 'lower') AS link,
    any(next_unchanged)                                 AS unchanged
FROM
(
    SELECT
        f.market AS market, f.shard_id AS shard_id, f.n AS frame_n, f.conn_id AS frame_conn,
        f.ingest_ts AS frame_ts, f.clock AS frame_clock,
        s.n AS next_n, s.conn_id AS next_conn, s.ingest_ts AS next_ts, s.clock AS next_clock,
        s.unchanged AS next_unchanged
    FROM frames AS f
    ASOF INNER JOIN snapshots AS s
        ON f.shard_id = s.shard_id AND f.market = s.market AND f.n < s.n
)
GROUP BY market, shard_id, next_n
ORDER BY market_ticker, shard, record
