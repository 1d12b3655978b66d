-- Which engines have decided since `since`, and how long has each been silent by the server's clock?
-- One row for each engine_instance_id. Those of the market maker on paper are one engine, `paper`: it has
-- another id after each start.
--
--   silent_s             from its newest decision until now; negative where its clock is ahead
--   exposed              decisions with exposure from open orders
--   most_open_orders     the largest open_orders_count
--   blank                decisions with nothing but zeros for a position, and no convention
--   precise              decisions at another moment than a whole second
--
-- market_ticker: one market; empty is all.
SELECT
    if(startsWith(engine_instance_id, 'paper-'), 'paper', toString(engine_instance_id)) AS engine,
    min(ts)                                     AS first_ts,
    max(ts)                                     AS last_ts,
    count()                                     AS decisions,
    uniqExact(market_ticker)                    AS markets,
    dateDiff('millisecond', toDateTime64(last_ts, 3, 'UTC'), now64(3, 'UTC')) / 1000 AS silent_s,
    countIf(isFinite(pos_open_exposure) AND pos_open_exposure != 0) AS exposed,
    max(open_orders_count)                      AS most_open_orders,
    countIf(pos_filled = 0 AND pos_open_exposure = 0 AND pos_total_est = 0 AND inv_convention = '') AS blank,
    countIf(toUnixTimestamp64Milli(toDateTime64(ts, 3, 'UTC')) % 1000 != 0) AS precise
FROM mm_decisions
WHERE ts >= {since:DateTime64(3, 'UTC')}
    AND (empty({market_ticker:String}) OR market_ticker = {market_ticker:String})
GROUP BY engine
ORDER BY last_ts, engine
