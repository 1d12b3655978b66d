-- Is pos_total_est = pos_filled + pos_open_exposure? One row for each decision where the two differ
-- by more than open_epsilon.
--
-- since: the window's first instant. market_ticker: one market; empty is all. total: rows before the
-- limit.
SELECT
    ts,
    market_ticker,
    decision_id,
    pos_total_est,
    pos_filled,
    pos_open_exposure,
    round(pos_total_est - (pos_filled + pos_open_exposure), 6) AS difference,
    count() OVER () AS total
FROM mm_decisions
WHERE ts >= {since:DateTime64(3, 'UTC')}
    AND (empty({market_ticker:String}) OR market_ticker = {market_ticker:String})
    AND abs(difference) > {open_epsilon:Float64}
ORDER BY ts, market_ticker, decision_id
LIMIT {limit:UInt64}
