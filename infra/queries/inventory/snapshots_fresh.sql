-- Are the exchange's position reports recent? One row for each market with decisions in the window whose newest
-- decision is more than stale_after_s newer than its newest snapshot; for a market without a snapshot that time
-- counts from its first decision.
--
-- since: the window's first instant. markets: the markets to check; empty means all. total: rows before
-- the limit.
SELECT
    last_decision_ts AS ts,
    market_ticker,
    decisions,
    if(snapshot > 0, snapshot, NULL) AS last_snapshot_ts,
    dateDiff('millisecond', greatest(snapshot, first_decision_ts), last_decision_ts) / 1000
        AS without_snapshot_s,
    count() OVER () AS total
FROM
(
    SELECT
        market_ticker,
        min(ts) AS first_decision_ts,
        max(ts) AS last_decision_ts,
        count() AS decisions
    FROM mm_decisions
    WHERE ts >= {since:DateTime64(3, 'UTC')}
        AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
    GROUP BY market_ticker
) AS d
LEFT JOIN
(
    SELECT market_ticker, max(ts) AS snapshot
    FROM mm_position_snapshots
    WHERE empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)}
    GROUP BY market_ticker
) AS s USING (market_ticker)
WHERE without_snapshot_s > {stale_after_s:UInt32}
ORDER BY ts, market_ticker
LIMIT {limit:UInt64}
