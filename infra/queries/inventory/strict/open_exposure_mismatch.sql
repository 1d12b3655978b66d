-- Check B, Open Exposure Mismatch: does the engine count exposure from orders that it does not have?
-- One row for each decision with no open order and an exposure beyond open_epsilon.
--
-- since: the window's first instant. markets: the markets to check; empty means all. total: rows before
-- the limit.
SELECT
    ts,
    market_ticker,
    decision_id,
    open_orders_count,
    pos_open_exposure,
    pos_filled,
    pos_total_est,
    count() OVER () AS total
FROM mm_decisions
WHERE ts >= {since:DateTime64(3, 'UTC')}
    AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
    AND open_orders_count = 0
    AND round(abs(pos_open_exposure), 6) > {open_epsilon:Float64}
ORDER BY ts, market_ticker, decision_id
LIMIT {limit:UInt64}
