-- Which markets were decided on since `since`, and how much of that can be judged? One row for each.
--
--   unknown      decisions without a position: written by an engine that does not fill the columns of
--                migration 010, or by one that does not know its position
--   engines      who decided
--
-- market_ticker: one market; empty is all.
SELECT
    market_ticker,
    count()                                         AS decisions,
    countIf(isNaN(pos_filled) AND isNaN(pos_open_exposure) AND isNaN(pos_total_est)) AS unknown,
    toDateTime64(min(ts), 3, 'UTC')                 AS first_ts,
    toDateTime64(max(ts), 3, 'UTC')                 AS last_ts,
    groupUniqArray(toString(engine_instance_id))    AS engines
FROM mm_decisions
WHERE ts >= {since:DateTime64(3, 'UTC')}
    AND (empty({market_ticker:String}) OR market_ticker = {market_ticker:String})
GROUP BY market_ticker
ORDER BY market_ticker
