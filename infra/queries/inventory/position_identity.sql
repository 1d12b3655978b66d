-- Is pos_total_est = pos_filled + pos_open_exposure, and does pos_open_exposure equal the sum of the resting
-- sizes, if the engine writes them? One row for each decision in which one of the two differs by more than
-- open_epsilon, and for each in which one of the three is not a number, unless the engine writes no position
-- columns.
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
    pos_total_est,
    pos_filled,
    pos_open_exposure,
    open_yes_bid_size + open_no_ask_size - open_yes_ask_size - open_no_bid_size AS resting,
    round(pos_total_est - (pos_filled + pos_open_exposure), 6) AS difference,
    if(open_yes_bid_size + open_no_ask_size + open_yes_ask_size + open_no_bid_size > 0,
        round(pos_open_exposure - resting, 6), 0) AS exposure_difference,
    count() OVER () AS total
FROM mm_decisions
WHERE ts >= {since:DateTime64(3, 'UTC')}
    AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
    AND
    (
        abs(difference) > {open_epsilon:Float64}
        OR abs(exposure_difference) > {open_epsilon:Float64}
        OR (NOT (isFinite(pos_total_est) AND isFinite(pos_filled) AND isFinite(pos_open_exposure))
            AND arrayExists(
                (writer, begun) -> writer = concat(engine_instance_id, ' ', engine_version)
                    AND toUnixTimestamp64Milli(toDateTime64(ts, 3, 'UTC')) >= begun,
                {position_writers:Array(String)}, {writing_since:Array(Int64)}))
    )
ORDER BY ts, market_ticker, engine_instance_id, decision_id
LIMIT {limit:UInt64}
