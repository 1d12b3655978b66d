-- Check A, Drift Without Actions: did the estimated position move although nothing was asked of
-- the exchange? A fill does not move it: what it adds to pos_filled it takes from
-- pos_open_exposure. Only placing, cancelling and replacing orders does, and those are actions.
--
-- One row for each one-second bucket of a ticker in which pos_total_est moved by at least
-- drift_threshold and mm_order_actions has no action:
--
--   moved_within   highest minus lowest of the bucket; counts where the bucket has no action
--   moved_since    furthest from the ticker's last decision before the bucket; counts where there is
--                  no action from that decision's second up to and including the bucket
--   total          rows before the limit
--
-- since: the window's first second. markets: the markets to check; empty means all.
WITH
    buckets AS
    (
        SELECT
            market_ticker,
            toStartOfSecond(toDateTime64(ts, 3, 'UTC'))                         AS bucket,
            count()                                     AS decisions,
            min(pos_total_est)                          AS lowest,
            max(pos_total_est)                          AS highest,
            argMax(pos_total_est, (ts, decision_id))    AS last_total
        FROM mm_decisions
        WHERE ts >= {since:DateTime64(3, 'UTC')}
            AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
            AND isFinite(pos_total_est)
        GROUP BY market_ticker, bucket
        UNION ALL
        SELECT
            market_ticker,
            toStartOfSecond(toDateTime64(max(ts), 3, 'UTC')),
            1,
            argMax(pos_total_est, (ts, decision_id)) AS before_total,
            before_total,
            before_total
        FROM mm_decisions
        WHERE ts < {since:DateTime64(3, 'UTC')}
            AND market_ticker IN
            (
                SELECT market_ticker FROM mm_decisions
                WHERE ts >= {since:DateTime64(3, 'UTC')}
                    AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
            )
            AND isFinite(pos_total_est)
        GROUP BY market_ticker
    ),
    steps AS
    (
        SELECT
            *,
            lagInFrame(bucket) OVER by_time     AS previous_bucket,
            lagInFrame(last_total) OVER by_time AS previous_total,
            row_number() OVER by_time > 1       AS has_previous
        FROM buckets
        WINDOW by_time AS
        (
            PARTITION BY market_ticker ORDER BY bucket
            ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING
        )
    ),
    acted AS
    (
        SELECT market_ticker, toStartOfSecond(toDateTime64(ts, 3, 'UTC')) AS action_bucket
        FROM mm_order_actions
        WHERE ts >= (SELECT min(bucket) FROM buckets)
            AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
        GROUP BY market_ticker, action_bucket
    )
SELECT
    steps.bucket        AS bucket,
    steps.market_ticker AS market_ticker,
    steps.decisions     AS decisions,
    if(has_previous, previous_total, NULL) AS previous_total_est,
    lowest              AS lowest_total_est,
    highest             AS highest_total_est,
    round(highest - lowest, 6) AS moved_within,
    if(has_previous, round(greatest(abs(highest - previous_total), abs(lowest - previous_total)), 6), 0)
                        AS moved_since,
    -- no action at all before the bucket: the join leaves 1970
    if(action_bucket > 0, action_bucket, NULL) AS last_action_bucket,
    count() OVER ()     AS total
FROM steps
ASOF LEFT JOIN acted
    ON steps.market_ticker = acted.market_ticker AND steps.bucket >= acted.action_bucket
WHERE bucket >= {since:DateTime64(3, 'UTC')}
    AND action_bucket < bucket
    AND
    (
        moved_within >= {drift_threshold:Float64}
        OR (has_previous AND moved_since >= {drift_threshold:Float64} AND action_bucket < previous_bucket)
    )
ORDER BY bucket, market_ticker
LIMIT {limit:UInt64}
