-- Which engine has decided on which market since `recent`, and how many of its decisions can be checked? One row for
-- each engine and market, from one scan of the decisions.
--
--   first_ts, last_ts    since `recent`
--   silent_s             from the newest decision until now, by the server's clock; negative if the engine's
--                        clock is ahead
--   decisions            in the window, which begins at `since`; begun_ts and ended_ts are of its first and
--                        its last one
--   unknown              of them without a position: the engine does not fill the columns of migration 010, or
--                        does not know its position
--   exposed              with exposure from open orders
--   most_open_orders     the largest open_orders_count
--   blank                with nothing but zeros for a position, and no convention
--   precise              at another moment than a whole second
--
-- markets: the markets to check; empty means all.
WITH ts >= {since:DateTime64(3, 'UTC')} AS inside
SELECT
    toString(engine_instance_id)                AS engine,
    toString(market_ticker)                     AS market,
    toDateTime64(min(ts), 3, 'UTC')             AS first_ts,
    toDateTime64(max(ts), 3, 'UTC')             AS last_ts,
    dateDiff('millisecond', last_ts, now64(3, 'UTC')) / 1000 AS silent_s,
    countIf(inside)                             AS decisions,
    toDateTime64(minIf(ts, inside), 3, 'UTC')   AS begun_ts,
    toDateTime64(maxIf(ts, inside), 3, 'UTC')   AS ended_ts,
    countIf(inside AND isNaN(pos_filled) AND isNaN(pos_open_exposure) AND isNaN(pos_total_est)) AS unknown,
    countIf(inside AND isFinite(pos_open_exposure) AND pos_open_exposure != 0) AS exposed,
    maxIf(open_orders_count, inside)            AS most_open_orders,
    countIf(inside AND pos_filled = 0 AND pos_open_exposure = 0 AND pos_total_est = 0
        AND inv_convention = '')                AS blank,
    countIf(inside AND toUnixTimestamp64Milli(toDateTime64(ts, 3, 'UTC')) % 1000 != 0) AS precise
FROM mm_decisions
WHERE ts >= {recent:DateTime64(3, 'UTC')}
    AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
GROUP BY engine_instance_id, market_ticker
ORDER BY last_ts, engine, market
