-- Check C, Decision vs Snapshot Divergence: does the engine's position differ from the exchange's? One row for
-- each decision whose pos_filled differs by at least filled_threshold from the snapshot that it is compared with.
--
-- snapshot: 'as_of' is the latest snapshot at or before the decision, 'latest' the newest of all. A decision
-- without a snapshot to compare with has no row.
-- since: the window's first instant. markets: the markets to check; empty means all. total: rows before
-- the limit.
WITH
    snapshots AS
    (
        SELECT
            market_ticker,
            if({snapshot:String} = 'latest', toDateTime64(0, 3, 'UTC'), ts) AS valid_from,
            ts AS snapshot_ts,
            argMax(pos_filled, (source, engine_instance_id, pos_filled)) AS snapshot_pos_filled,
            max(source) AS snapshot_source
        FROM mm_position_snapshots
        WHERE (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
            AND isFinite(pos_filled)
            AND
            (
                if({snapshot:String} = 'latest', 0, ts >= {since:DateTime64(3, 'UTC')})
                OR (market_ticker, ts) IN
                (
                    SELECT market_ticker, max(ts)
                    FROM mm_position_snapshots
                    WHERE isFinite(pos_filled)
                        AND ({snapshot:String} = 'latest' OR ts < {since:DateTime64(3, 'UTC')})
                    GROUP BY market_ticker
                )
            )
        GROUP BY market_ticker, ts
    )
SELECT
    d.ts            AS ts,
    d.market_ticker AS market_ticker,
    d.decision_id   AS decision_id,
    d.pos_filled    AS pos_filled,
    snapshot_pos_filled,
    round(d.pos_filled - snapshot_pos_filled, 6) AS difference,
    snapshot_ts,
    dateDiff('millisecond', snapshot_ts, d.ts) / 1000 AS snapshot_age_s,
    snapshot_source,
    count() OVER () AS total
FROM
(
    SELECT ts, market_ticker, decision_id, pos_filled
    FROM mm_decisions
    WHERE ts >= {since:DateTime64(3, 'UTC')}
        AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
        AND isFinite(pos_filled)
) AS d
ASOF INNER JOIN snapshots AS s ON d.market_ticker = s.market_ticker AND d.ts >= s.valid_from
WHERE abs(difference) >= {filled_threshold:Float64}
ORDER BY ts, market_ticker, decision_id
LIMIT {limit:UInt64}
