-- Check B, Open Exposure Mismatch: does the engine count exposure from orders that it does not have?
-- One row for each decision with no open order and an exposure beyond open_epsilon, and for each whose
-- exposure is not a number, unless the engine writes no position columns.
--
-- position_writers, writing_since: engines, with their versions, that write position columns, and
-- since when.
-- since: the window's first instant. markets: the markets to check; empty means all. total: rows before
-- the limit.
SELECT
    ts,
    market_ticker,
    engine_instance_id,
    decision_id,
    open_orders_count,
    pos_open_exposure,
    pos_filled,
    pos_total_est,
    count() OVER () AS total
FROM mm_decisions
WHERE ts >= {since:DateTime64(3, 'UTC')}
    AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
    AND
    (
        (open_orders_count = 0 AND isFinite(pos_open_exposure)
            AND round(abs(pos_open_exposure), 6) > {open_epsilon:Float64})
        OR (NOT isFinite(pos_open_exposure) AND arrayExists(
                (writer, begun) -> writer = concat(engine_instance_id, ' ', engine_version)
                    AND toUnixTimestamp64Milli(toDateTime64(ts, 3, 'UTC')) >= begun,
                {position_writers:Array(String)}, {writing_since:Array(Int64)}))
    )
ORDER BY ts, market_ticker, engine_instance_id, decision_id
LIMIT {limit:UInt64}
