-- Check C, Decision vs Snapshot Divergence: does the engine's position differ from the exchange's? One row for
-- each decision whose pos_filled differs by at least filled_threshold from the position that the exchange's
-- reports and the recorded fills account for.
--
-- A position is accounted for by the latest snapshot at or before the decision, and the fills of all engines
-- between the two, each fill_id once, at the exchange's own time if raw_json has it. A fill takes up to
-- reaches_ms to reach the engine and the report: until then positions with and without it are both accepted.
-- The last decision before a snapshot, up to 30 s, is also compared with that snapshot, less the fills in
-- between: an engine that adopts each report would never differ from the previous one. A settlement is a report
-- of zero at the time of the settlement; an engine has settles_ms to follow it, and may be ahead of a report
-- without a time.
--
-- in_transit: contracts that may be counted but need not be; the difference may be larger by as much.
--
-- A decision without a snapshot at or before it is not checked. A pos_filled that is not a number is a row,
-- unless the engine writes no position columns. The comparison with the snapshot alone is in
-- strict/decision_snapshot_divergence.sql.
--
-- position_writers, writing_since: engines, with their versions, that write position columns, and
-- since when.
-- since: the window's first instant. markets: the markets to check; empty means all. settled_tickers,
-- settled_at: markets that are settled according to the catalog. total: rows before the limit.
WITH
    reports AS
    (
        SELECT
            market_ticker,
            ts AS report_ts,
            argMax((pos_filled, source, raw_json), (source, engine_instance_id, pos_filled)) AS report,
            startsWith(lower(report.2), 'settle') AS settlement,
            toInt64(toUnixTimestamp64Milli(toDateTime64(ts, 3, 'UTC'))) AS report_ms,
            parseDateTime64BestEffortOrNull(JSONExtractString(report.3, 'settled_time'), 3, 'UTC')
                AS said,
            if(settlement AND said IS NOT NULL,
                least(report_ms, toUnixTimestamp64Milli(assumeNotNull(said))), report_ms) AS report_at,
            -- the collector finds a settlement minutes later; an engine writes it as it follows it
            settlement AND said IS NULL AND report.2 = 'settlements' AS untimed
        FROM mm_position_snapshots
        WHERE (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
            AND isFinite(pos_filled)
            AND
            (
                ts >= {since:DateTime64(3, 'UTC')}
                OR (market_ticker, ts) IN
                (
                    SELECT market_ticker, max(ts)
                    FROM mm_position_snapshots
                    WHERE isFinite(pos_filled) AND ts < {since:DateTime64(3, 'UTC')}
                    GROUP BY market_ticker
                )
            )
        GROUP BY market_ticker, ts
    ),
    fills AS
    (
        SELECT
            market_ticker,
            argMin(amount, recorded) AS signed,
            argMin(filled, recorded) AS filled_at
        FROM
        (
            SELECT
                market_ticker,
                ts AS recorded,
                -- the exchange's own words, where the row has them
                ifNull(toFloat64OrNull(JSONExtractString(raw_json, 'count_fp')), size)
                    * if(coalesce(nullIf(JSONExtractString(raw_json, 'outcome_side'), ''), toString(side)) = 'yes', 1, -1) AS amount,
                if(fill_id = '', toString(tuple(ts, exchange_order_id, size)), fill_id) AS fill,
                toInt64(toUnixTimestamp64Milli(coalesce(
                    parseDateTime64BestEffortOrNull(JSONExtractString(raw_json, 'created_time'), 3, 'UTC'),
                    toDateTime64(ts, 3, 'UTC')))) AS filled
            FROM mm_fills
            WHERE (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
                AND isFinite(size)
                AND ts >= (SELECT min(report_ts) FROM reports) - toIntervalMinute(1)
        )
        GROUP BY market_ticker, fill
    ),
    reported AS
    (
        -- what a report says, from when on; a settlement counts once the engine has had its time to follow
        SELECT
            market_ticker,
            at,
            argMax((position, reported_at, source), (reported_at, source, position)) AS report,
            max(settles) AS settles
        FROM
        (
            SELECT
                market_ticker,
                if(settlement, report_at + {settles_ms:Int64}, report_at) AS at,
                report.1 AS position,
                toDateTime64(report_ts, 3, 'UTC') AS reported_at,
                toString(report.2) AS source,
                settlement AS settles
            FROM reports
            UNION ALL
            SELECT
                catalog.1,
                catalog.2 + {settles_ms:Int64},
                0.,
                fromUnixTimestamp64Milli(catalog.2, 'UTC'),
                'market_catalog',
                1
            FROM (SELECT arrayJoin(arrayZip({settled_tickers:Array(String)}, {settled_at:Array(Int64)})) AS catalog)
        )
        GROUP BY market_ticker, at
    ),
    points AS
    (
        -- what a fill adds, from the first moment at which it may be counted to the first at which
        -- it must be
        SELECT
            market_ticker,
            arrayJoin([
                (filled_at - {reaches_ms:Int64}, least(signed, 0.), greatest(signed, 0.)),
                (filled_at + {reaches_ms:Int64}, greatest(signed, 0.), least(signed, 0.))
            ]) AS change,
            change.1 AS at,
            change.2 AS low_change,
            change.3 AS high_change,
            0 AS settling_change,
            0. AS position,
            0 AS is_report,
            0 AS is_settlement
        FROM fills
        UNION ALL
        SELECT
            market_ticker,
            arrayJoin([
                (report_at - if(untimed, 600000, {reaches_ms:Int64}), 1., 0.),
                (report_at + {settles_ms:Int64}, -1., 0.)
            ]) AS change,
            change.1,
            0.,
            0.,
            toInt64(change.2),
            0.,
            0,
            0
        FROM
        (
            SELECT market_ticker, report_at, untimed
            FROM reports
            WHERE settlement
            UNION ALL
            SELECT catalog.1, catalog.2, 0
            FROM (SELECT arrayJoin(arrayZip({settled_tickers:Array(String)}, {settled_at:Array(Int64)})) AS catalog)
        )
        UNION ALL
        SELECT market_ticker, (at, 0., 0.), at, 0., 0., 0, report.1, 1, settles
        FROM reported
    ),
    cumulated AS
    (
        SELECT
            market_ticker,
            at,
            position,
            is_report,
            is_settlement,
            sum(low_change) OVER so_far AS low,
            sum(high_change) OVER so_far AS high,
            sum(settling_change) OVER so_far > 0 AS settling
        FROM
        (
            SELECT
                market_ticker,
                at,
                sum(low_change) AS low_change,
                sum(high_change) AS high_change,
                sum(settling_change) AS settling_change,
                sum(position) AS position,
                max(is_report) AS is_report,
                max(is_settlement) AS is_settlement
            FROM points
            GROUP BY market_ticker, at
        )
        WINDOW so_far AS (PARTITION BY market_ticker ORDER BY at ROWS UNBOUNDED PRECEDING)
    ),
    timeline AS
    (
        -- low and high of a decision, less those of a report, is what may have been filled since.
        -- What is to come is what went before in the opposite order: such a window grows, and no row is
        -- looked at twice
        SELECT
            market_ticker,
            at,
            low,
            high,
            settling,
            max(is_report) OVER so_far AS has_last,
            argMaxIf((position - high, position - low, at), at, is_report) OVER so_far AS last,
            max(is_report AND NOT is_settlement) OVER to_come AS has_next,
            argMinIf((position - high, position - low, at), at, is_report AND NOT is_settlement) OVER to_come AS next
        FROM cumulated
        WINDOW
            so_far AS (PARTITION BY market_ticker ORDER BY at ROWS UNBOUNDED PRECEDING),
            to_come AS (PARTITION BY market_ticker ORDER BY at DESC
                ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
    )
SELECT *, count() OVER () AS total
FROM
(
SELECT
    ts,
    market_ticker,
    engine_instance_id,
    decision_id,
    pos_filled,
    if(judged, t.report.1, NULL) AS snapshot_pos_filled,
    if(judged, round(pos_filled - difference, 6), NULL) AS accounted_for,
    difference,
    if(judged, round(in_transit, 6), 0) AS in_transit,
    if(judged, t.report.2, NULL) AS snapshot_ts,
    if(judged, dateDiff('millisecond', t.report.2, toDateTime64(ts, 3, 'UTC')) / 1000, NULL) AS snapshot_age_s,
    if(judged, t.report.3, '') AS snapshot_source
FROM
(
    SELECT
        d.ts AS ts,
        d.market_ticker AS market_ticker,
        d.engine_instance_id AS engine_instance_id,
        d.decision_id AS decision_id,
        d.pos_filled AS pos_filled,
        isFinite(d.pos_filled) AS is_number,
        is_number AND s.has_last AS judged,
        s.last.1 + s.low AS lowest,
        s.last.2 + s.high AS highest,
        d.pos_filled - greatest(least(d.pos_filled, if(s.settling, greatest(highest, 0.), highest)),
            if(s.settling, least(lowest, 0.), lowest)) AS since_last,
        d.pos_filled - greatest(least(d.pos_filled, s.next.2 + s.high), s.next.1 + s.low) AS until_next,
        round(abs(since_last), 6) >= {filled_threshold:Float64} AS differs,
        if(differs, s.last.3, s.next.3) AS report_at,
        s.next.3 AS coming_at,
        if(differs, highest - lowest, s.next.2 + s.high - s.next.1 - s.low) AS in_transit,
        multiIf(NOT is_number, d.pos_filled, differs, round(since_last, 6), round(until_next, 6)) AS difference,
        judged AND (differs OR (s.has_next AND NOT s.settling AND d.at >= s.next.3 - 30000
            AND round(abs(until_next), 6) >= {filled_threshold:Float64})) AS wrong
    FROM
    (
        SELECT
            ts,
            market_ticker,
            engine_instance_id,
            decision_id,
            pos_filled,
            toInt64(toUnixTimestamp64Milli(toDateTime64(ts, 3, 'UTC'))) AS at
        FROM mm_decisions
        WHERE ts >= {since:DateTime64(3, 'UTC')}
            AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})
            AND (isFinite(pos_filled) OR arrayExists(
                (writer, begun) -> writer = concat(engine_instance_id, ' ', engine_version)
                    AND toUnixTimestamp64Milli(toDateTime64(ts, 3, 'UTC')) >= begun,
                {position_writers:Array(String)}, {writing_since:Array(Int64)}))
    ) AS d
    ASOF LEFT JOIN timeline AS s ON d.market_ticker = s.market_ticker AND d.at >= s.at
    WHERE wrong OR NOT is_number
) AS found
LEFT JOIN reported AS t ON found.market_ticker = t.market_ticker AND found.report_at = t.at
-- of those that only the next report contradicts the last
ORDER BY ts DESC, market_ticker DESC, engine_instance_id DESC, decision_id DESC
LIMIT 1 BY market_ticker, engine_instance_id, if(differs OR NOT is_number, toString(decision_id), toString(coming_at))
)
ORDER BY ts, market_ticker, engine_instance_id, decision_id
LIMIT {limit:UInt64}
