-- Check A, Drift Without Actions: does the estimated position differ from the one that the engine's actions and
-- their outcomes account for? One row for each one-second bucket of a market and an engine in which
-- pos_total_est differs by drift_threshold or more.
--
-- The accounted position begins with the engine's last decision before the window, and changes as follows:
--
--   place, replace     add the size; a replacement takes away what remained of the order before it, and
--                      of an order that replaces itself (a decrease) the difference remains
--   cancel, expiry     take away what remained: from the moment at which it is asked for it may be
--                      missing, from the exchange's answer on it must be. An order that the exchange
--                      ends by itself is an answer to the order's own action
--   a rejected order   may be counted until the answer, and not after it
--   an own fill        moves pos_filled and pos_open_exposure, and leaves the sum as it is
--   another's fill     moves pos_filled of every engine in the market: the position is the account's
--   a report           that the recorded fills do not account for may have been taken over (check C)
--   a settlement       ends the check: nothing is quoted after it
--
-- Amounts count, not the presence of an action. An action and an answer are of the engine's own clock,
-- and count from 250 ms before to 500 ms after them; where an engine writes whole seconds, a second
-- more. Fills are of the exchange's clock. A pos_total_est that is no number is a row, unless the engine writes
-- no position columns. The runbook's own definition is strict/drift_without_actions.sql.
--
--   unaccounted   by how much pos_total_est is beyond what is accounted for; the worst of the bucket
--   in_transit    what may be counted and need not be: unaccounted may be more by as much
--   total         rows before the limit
--
-- position_writers, writing_since: engines, with their versions, that write position columns, and
-- since when. Markets, engines and
-- orders are joined by a hash of their names, for speed.
--
-- since: the window's first second. markets: the markets to check; empty means all. settled_tickers,
-- settled_at: markets that are settled according to the catalog.
WITH
    (
        SELECT groupArray(cityHash64(market_ticker, engine_instance_id))
        FROM
        (
            SELECT market_ticker, engine_instance_id
            FROM mm_decisions
            WHERE ts >= {since:DateTime64(3, 'UTC')}
                AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
            GROUP BY market_ticker, engine_instance_id
            HAVING countIf(toUnixTimestamp64Milli(toDateTime64(ts, 3, 'UTC')) % 1000 != 0) = 0
        )
    ) AS whole_seconds,
    9000000000000 AS never,
    actions AS
    (
        SELECT
            cityHash64(market_ticker, engine_instance_id) AS engine,
            cityHash64(engine, action_id) AS action,
            cityHash64(market_ticker, client_order_id) AS ordered,
            cityHash64(market_ticker, replace_of_client_order_id) AS former,
            replace_of_client_order_id NOT IN ('', client_order_id) AS has_former,
            toInt64(toUnixTimestamp64Milli(toDateTime64(ts, 3, 'UTC'))) AS at,
            action_type = 'cancel' AS is_cancel,
            size,
            -- YES bid for and NO offered add
            size * multiIf(side IN ('bid', 'buy'), 1, side IN ('ask', 'sell'), -1, 0) * if(api_side = 'no', -1, 1) AS amount
        FROM mm_order_actions
        WHERE ts >= {since:DateTime64(3, 'UTC')} - toIntervalDay(1)
            AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
            AND isFinite(size)
    ),
    answers AS
    (
        SELECT
            cityHash64(market_ticker, engine_instance_id) AS engine,
            cityHash64(engine, action_id) AS action,
            client_order_id != '' AS is_named,
            cityHash64(market_ticker, client_order_id) AS named,
            toInt64(toUnixTimestamp64Milli(toDateTime64(ts, 3, 'UTC'))) AS at,
            -- an action that is not found has ended
            if(status = 'rejected' AND reject_reason ILIKE '%not%found%', 'not found', lower(status)) AS said
        FROM mm_order_responses
        WHERE ts >= {since:DateTime64(3, 'UTC')} - toIntervalDay(1)
            AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
    ),
    events AS
    (
        -- what was asked: a size (set, or refused), or an end (asked); and what became of it
        SELECT
            a.engine AS engine,
            arrayJoin(arrayConcat(
                multiIf(
                    is_cancel AND r.not_found, [(a.ordered, 'asked', a.at, never), (a.ordered, 'ended', r.first_at, never)],
                    is_cancel, [(a.ordered, 'asked', a.at, never)],
                    r.not_found AND NOT has_former, [(a.ordered, 'ended', r.first_at, never)],
                    r.refused, [(a.ordered, 'refused', a.at, r.first_at)],
                    [(a.ordered, 'set', a.at, if(r.first_at > 0, r.first_at, a.at + 30000))]),
                multiIf(
                    NOT has_former, [],
                    r.first_at = 0 OR (r.refused AND NOT r.not_found), [(former, 'asked', a.at, never)],
                    [(former, 'asked', a.at, never), (former, 'ended', r.first_at, never)])
            )) AS event,
            event.1 AS ordered,
            event.2 AS what,
            event.3 AS at,
            event.4 AS known_by,
            size,
            amount
        FROM actions AS a
        LEFT JOIN
        (
            SELECT action, min(at) AS first_at, countIf(said IN ('rejected', 'not found')) > 0 AS refused, countIf(said = 'not found') > 0 AS not_found
            FROM answers
            GROUP BY action
        ) AS r USING (action)
        UNION ALL
        SELECT
            engine,
            (toUInt64(0), '', toInt64(0), 0),
            if(is_named, named, a.ordered) AS ordered,
            if(said IN ('executed', 'filled'), 'executed', 'ended'),
            at,
            0,
            0,
            0
        FROM answers AS r
        LEFT JOIN (SELECT action, ordered FROM actions) AS a USING (action)
        WHERE said IN ('executed', 'filled', 'canceled', 'cancelled', 'expired')
    ),
    fills AS
    (
        SELECT
            market_ticker,
            argMin(order_id, recorded) AS order_name,
            cityHash64(market_ticker, order_name) AS ordered,
            argMin(amount, recorded) AS signed,
            argMin(filled, recorded) AS at,
            least(at, min(recorded)) AS first_at,
            greatest(at, min(recorded)) AS last_at
        FROM
        (
            SELECT
                market_ticker,
                client_order_id AS order_id,
                -- the exchange's own words, where the row has them
                ifNull(toFloat64OrNull(JSONExtractString(raw_json, 'count_fp')), size)
                    * if(coalesce(nullIf(JSONExtractString(raw_json, 'outcome_side'), ''), toString(side)) = 'yes', 1, -1) AS amount,
                if(fill_id = '', toString(tuple(ts, exchange_order_id, size)), fill_id) AS fill,
                toInt64(toUnixTimestamp64Milli(toDateTime64(ts, 3, 'UTC'))) AS recorded,
                toInt64(toUnixTimestamp64Milli(coalesce(
                    parseDateTime64BestEffortOrNull(JSONExtractString(raw_json, 'created_time'), 3, 'UTC'),
                    toDateTime64(ts, 3, 'UTC')))) AS filled
            FROM mm_fills
            WHERE ts >= {since:DateTime64(3, 'UTC')} - toIntervalDay(1)
                AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
                AND isFinite(size)
        )
        GROUP BY market_ticker, fill
    ),
    orders AS
    (
        SELECT
            engine,
            ordered,
            arraySort(groupArrayIf((at, size, known_by), what = 'set')) AS sizes,
            argMinIf(sign(amount), at, what = 'set') AS sense,
            minIf(at, what = 'asked') AS first_asked,
            minIf(at, what IN ('ended', 'executed')) AS first_ended,
            argMinIf(what, at, what IN ('ended', 'executed')) AS ended_how,
            -- a cancel of an order whose beginning is not known: what it says itself
            argMinIf(amount, at, what = 'asked') AS asked_amount,
            groupArrayIf((at, known_by, amount), what = 'refused') AS refusals
        FROM events
        GROUP BY engine, ordered
    ),
    accounted AS
    (
        SELECT
            engine,
            sizes,
            length(sizes) AS last,
            ended_how,
            refusals,
            f.filled AS filled,
            if(first_ended > 0, first_ended, never) AS ended_at,
            least(
                ended_at,
                if(first_asked > 0, first_asked, never),
                if(last > 0, ifNull(arrayFirstOrNull(moment -> moment >= sizes[1].1, moments), never), never)) AS may_leave,
            -- what was filled of each size before the next
            arrayMap(n -> arraySum(fill -> fill.4, arrayFilter(
                fill -> (n = 1 OR fill.1 > sizes[n].1) AND (n = last OR fill.1 <= sizes[n + 1].1), filled)), arrayEnumerate(sizes)) AS taken,
            arrayMap((size, gone) -> if(last = 1, greatest(size.2 - gone, 0.), size.2 - gone), sizes, taken) AS remained,
            arrayMap((size, before) -> sense * (size.2 - before), sizes, arrayPopBack(arrayPushFront(remained, 0.))) AS added,
            -- filled while a decrease was on its way, before it or after it: the same once the order has ended
            arrayMap(n -> arraySum(fill -> fill.4, arrayFilter(
                fill -> n > 1 AND fill.1 > sizes[n].1 - 250 AND fill.1 <= sizes[n].3 + 250, filled)), arrayEnumerate(sizes)) AS unsure,
            if(last > 0, -sense * remained[last], -asked_amount) AS removed,
            if(has(whole_seconds, engine), 1000, 250) AS before_ms,
            if(has(whole_seconds, engine), 1000, 500) AS after_ms
        FROM orders AS o
        LEFT JOIN
        (
            -- a cancel of no known order, with no size: of all of the market
            SELECT engine, arraySort(groupArray(at)) AS moments
            FROM actions
            WHERE is_cancel AND size = 0 AND ordered NOT IN (SELECT ordered FROM actions WHERE NOT is_cancel)
            GROUP BY engine
        ) AS c USING (engine)
        LEFT JOIN
        (
            SELECT ordered, groupArray((at, first_at, last_at, abs(signed))) AS filled
            FROM fills
            WHERE order_name != ''
            GROUP BY ordered
        ) AS f USING (ordered)
    ),
    changes AS
    (
        SELECT
            engine,
            arrayJoin(arrayConcat(
                arrayMap((amount, size) -> (size.1 - before_ms, least(amount, 0.), greatest(amount, 0.)), added, sizes),
                arrayMap((amount, size) -> (size.3 + after_ms, greatest(amount, 0.), least(amount, 0.)), added, sizes),
                arrayMap((size, amount) -> (size.1 - before_ms, -amount, amount), sizes, unsure),
                [(ended_at + after_ms, arraySum(unsure), -arraySum(unsure))],
                [(may_leave - before_ms, least(removed, 0.), greatest(removed, 0.))],
                -- fills of an executed order that was not recorded may be in pos_filled
                if(ended_how = 'executed', [], [(ended_at + after_ms, greatest(removed, 0.), least(removed, 0.))]),
                arrayMap(fill -> (least(fill.2, may_leave) - {reaches_ms:Int64}, -fill.4, fill.4), filled),
                arrayMap(fill -> (fill.3 + {reaches_ms:Int64}, fill.4, -fill.4), filled),
                arrayMap(order -> (order.1 - before_ms, least(order.3, 0.), greatest(order.3, 0.)), refusals),
                arrayMap(order -> (order.2 + after_ms, -least(order.3, 0.), -greatest(order.3, 0.)), refusals)
            )) AS change,
            toInt64(change.1) AS at,
            change.2 AS low_change,
            change.3 AS high_change
        FROM accounted
        WHERE last > 0 OR removed != 0 OR notEmpty(refusals)
        UNION ALL
        -- what moves the position of every engine in the market
        SELECT cityHash64(market_ticker, engine_instance_id) AS engine, change, change.1, change.2, change.3
        FROM
        (
            -- fills of other engines' orders; of an order that is not known they may be own ones
            SELECT
                market_ticker,
                owner,
                arrayJoin(if(owner = 0,
                    [(first_at - {reaches_ms:Int64}, least(signed, 0.), greatest(signed, 0.))],
                    [
                        (first_at - {reaches_ms:Int64}, least(signed, 0.), greatest(signed, 0.)),
                        (last_at + {reaches_ms:Int64}, greatest(signed, 0.), least(signed, 0.))
                    ])) AS change
            FROM fills AS f
            LEFT JOIN
            (
                SELECT ordered, any(engine) AS owner
                FROM
                (
                    SELECT ordered, engine FROM actions WHERE NOT is_cancel
                    UNION ALL
                    SELECT named AS ordered, engine FROM answers WHERE is_named
                )
                GROUP BY ordered
            ) AS o USING (ordered)
            UNION ALL
            -- what the reports have beyond the recorded fills, now and at the next one
            SELECT
                market_ticker,
                0,
                arrayJoin(arrayMap((moment, low, high, former_low, former_high) -> (moment, low - former_low, high - former_high),
                    moments, lows, highs, arrayPushFront(arrayPopBack(lows), 0.), arrayPushFront(arrayPopBack(highs), 0.)))
            FROM
            (
                SELECT
                    market_ticker,
                    arraySort(groupArray((r.at, round(held - f.signed, 6)))) AS reports,
                    arrayMap(report -> report.1, reports) AS moments,
                    arrayMap(report -> report.2 - reports[1].2, reports) AS beyond,
                    arrayPushBack(arrayPopFront(beyond), beyond[-1]) AS beyond_next,
                    arrayMap((now, soon) -> least(0., now, soon), beyond, beyond_next) AS lows,
                    arrayMap((now, soon) -> greatest(0., now, soon), beyond, beyond_next) AS highs
                FROM
                (
                    SELECT
                        market_ticker,
                        toInt64(toUnixTimestamp64Milli(toDateTime64(ts, 3, 'UTC'))) AS at,
                        argMax(pos_filled, (source, engine_instance_id, pos_filled)) AS held
                    FROM mm_position_snapshots
                    WHERE ts >= {since:DateTime64(3, 'UTC')} - toIntervalDay(1)
                        AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
                        AND isFinite(pos_filled) AND NOT startsWith(lower(source), 'settle')
                    GROUP BY market_ticker, ts
                ) AS r
                ASOF LEFT JOIN
                (
                    SELECT market_ticker, at, sum(signed) OVER (PARTITION BY market_ticker ORDER BY at) AS signed
                    FROM fills
                ) AS f ON r.market_ticker = f.market_ticker AND r.at >= f.at
                GROUP BY market_ticker
            )
        ) AS wide
        INNER JOIN
        (
            SELECT market_ticker, engine_instance_id
            FROM mm_decisions
            WHERE ts >= {since:DateTime64(3, 'UTC')}
                AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
            GROUP BY market_ticker, engine_instance_id
        ) AS engines USING (market_ticker)
        WHERE owner != engine
    ),
    -- The counting begins with the last decision before the window or one of its first seconds: the one
    -- with the least in transit.
    beginnings AS
    (
        SELECT
            cityHash64(market_ticker, engine_instance_id) AS engine,
            (toInt64(toUnixTimestamp64Milli(toDateTime64(ts, 3, 'UTC'))), pos_total_est) AS begins
        FROM mm_decisions
        WHERE ts >= {since:DateTime64(3, 'UTC')}
            AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
            AND isFinite(pos_total_est)
        -- as the table is sorted, so that it is read and not sorted
        ORDER BY market_ticker, ts, pos_total_est
        LIMIT 20 BY market_ticker, engine_instance_id
        UNION ALL
        SELECT
            cityHash64(market_ticker, engine_instance_id),
            (toInt64(toUnixTimestamp64Milli(toDateTime64(max(ts), 3, 'UTC'))), argMax(pos_total_est, (ts, decision_id)))
        FROM mm_decisions
        WHERE ts < {since:DateTime64(3, 'UTC')}
            AND ts >= {since:DateTime64(3, 'UTC')} - toIntervalDay(1)
            AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
            AND isFinite(pos_total_est)
        GROUP BY market_ticker, engine_instance_id
    ),
    steps AS
    (
        -- the least and the most that pos_total_est may be from each moment on
        SELECT
            engine,
            at,
            argMinIf((total_est - high, total_est - low), (round(high - low, 6), at), is_beginning) OVER all_of_it AS begun,
            begun.1 + low AS least_est,
            begun.2 + high AS most_est
        FROM
        (
            SELECT
                engine,
                at,
                is_beginning,
                total_est,
                sum(low_change) OVER so_far AS low,
                sum(high_change) OVER so_far AS high
            FROM
            (
                SELECT engine, at, low_change, high_change, 0 AS is_beginning, 0. AS total_est
                FROM changes
                WHERE at < 8000000000000 AND (low_change != 0 OR high_change != 0)
                UNION ALL
                SELECT engine, begins.1, 0., 0., 1, begins.2
                FROM beginnings
            )
            WINDOW so_far AS (PARTITION BY engine ORDER BY at RANGE UNBOUNDED PRECEDING)
        )
        WINDOW all_of_it AS (PARTITION BY engine)
    ),
    settled AS
    (
        SELECT market_ticker, min(settled_at) AS settled_at
        FROM
        (
            SELECT
                market_ticker,
                least(
                    toInt64(toUnixTimestamp64Milli(toDateTime64(ts, 3, 'UTC'))) - if(source = 'settlements', 600000, {reaches_ms:Int64}),
                    ifNull(toInt64(toUnixTimestamp64Milli(parseDateTime64BestEffortOrNull(
                        JSONExtractString(raw_json, 'settled_time'), 3, 'UTC'))) - {reaches_ms:Int64}, never)) AS settled_at
            FROM mm_position_snapshots
            WHERE startsWith(lower(source), 'settle')
                AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
            UNION ALL
            SELECT market.1, market.2 - {reaches_ms:Int64}
            FROM (SELECT arrayJoin(arrayZip({settled_tickers:Array(String)}, {settled_at:Array(Int64)})) AS market)
        )
        GROUP BY market_ticker
    )
SELECT
    bucket,
    market_ticker,
    engine_instance_id,
    decisions,
    worst.1 AS pos_total_est,
    round(worst.2, 6) AS accounted_for,
    worst.3 AS unaccounted,
    worst.4 AS pos_filled,
    worst.5 AS pos_open_exposure,
    worst.6 AS open_orders_count,
    round(worst.7, 6) AS in_transit,
    count() OVER () AS total
FROM
(
    SELECT
        toStartOfSecond(fromUnixTimestamp64Milli(at, 'UTC')) AS bucket,
        market_ticker,
        engine_instance_id,
        count() AS decisions,
        argMax((total_est, accounted, beyond, filled, exposure, orders, most_est - least_est), (NOT isFinite(beyond), abs(beyond), at)) AS worst
    FROM
    (
        SELECT
            at,
            market_ticker,
            engine_instance_id,
            total_est,
            filled,
            exposure,
            orders,
            least_est,
            most_est,
            greatest(least(total_est, most_est), least_est) AS accounted,
            round(total_est - accounted, 6) AS beyond
        FROM
        (
            SELECT
                cityHash64(market_ticker, engine_instance_id) AS engine,
                toInt64(toUnixTimestamp64Milli(toDateTime64(ts, 3, 'UTC'))) AS at,
                market_ticker,
                engine_instance_id,
                pos_total_est AS total_est,
                pos_filled AS filled,
                pos_open_exposure AS exposure,
                open_orders_count AS orders
            FROM mm_decisions
            WHERE ts >= {since:DateTime64(3, 'UTC')}
                AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
                AND (isFinite(pos_total_est) OR arrayExists(
                (writer, begun) -> writer = concat(engine_instance_id, ' ', engine_version)
                    AND toUnixTimestamp64Milli(toDateTime64(ts, 3, 'UTC')) >= begun,
                {position_writers:Array(String)}, {writing_since:Array(Int64)}))
        ) AS d
        ASOF LEFT JOIN steps AS s ON d.engine = s.engine AND d.at >= s.at
        WHERE NOT isFinite(total_est) OR abs(beyond) >= {drift_threshold:Float64}
    ) AS d
    LEFT JOIN settled AS e USING (market_ticker)
    WHERE settled_at = 0 OR at < settled_at
    GROUP BY bucket, market_ticker, engine_instance_id
)
ORDER BY bucket, market_ticker, engine_instance_id
LIMIT {limit:UInt64}
