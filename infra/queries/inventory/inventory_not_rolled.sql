-- Is inventory rolled forward (inv_before := inv_after_est of the decision before)? One row for each
-- decision whose inv_before is what the engine's last decision of that market expected, while
-- pos_filled is at least filled_threshold away from it.
--
-- An expectation that came true is no roll. Neither is one of no change to nothing: an engine that
-- leaves both columns at zero rolls nothing.
--
-- since: the window's first instant. markets: those to look at; empty is all. total: rows before the
-- limit.
SELECT
    ts,
    market_ticker,
    engine_instance_id,
    decision_id,
    inv_before,
    previous_inv_after_est,
    pos_filled,
    round(inv_before - pos_filled, 6) AS difference,
    count() OVER () AS total
FROM
(
    SELECT
        ts,
        market_ticker,
        engine_instance_id,
        decision_id,
        inv_before,
        pos_filled,
        lagInFrame(inv_before) OVER by_time    AS previous_inv_before,
        lagInFrame(inv_after_est) OVER by_time AS previous_inv_after_est,
        row_number() OVER by_time > 1          AS has_previous
    FROM mm_decisions
    WHERE ts >= {since:DateTime64(3, 'UTC')}
        AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
        -- where inv_before is pos_filled all along, no decision before needs to be found
        AND (market_ticker, engine_instance_id) IN
        (
            SELECT market_ticker, engine_instance_id
            FROM mm_decisions
            WHERE ts >= {since:DateTime64(3, 'UTC')}
                AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
                AND abs(round(inv_before - pos_filled, 6)) >= {filled_threshold:Float64}
            GROUP BY market_ticker, engine_instance_id
        )
    WINDOW by_time AS
    (
        PARTITION BY market_ticker, engine_instance_id ORDER BY ts, decision_id
        ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING
    )
)
WHERE has_previous
    AND round(abs(inv_before - previous_inv_after_est), 6) = 0
    AND (round(abs(previous_inv_after_est - previous_inv_before), 6) > 0 OR previous_inv_after_est != 0)
    AND isFinite(difference) AND abs(difference) >= {filled_threshold:Float64}
ORDER BY ts, market_ticker, decision_id
LIMIT {limit:UInt64}
