-- Is every numbered frame accounted for? One row for each subscription (conn_id, sid) of a
-- sequenced channel:
--
--   min_seq, max_seq    the first and the last number stored
--   first_seq           the number from which counting begins: see below
--   frames              how many different numbers are stored, in orderbook_events (deltas), trades and
--                       stream_events (a snapshot's own row, and all else) together
--   holes               numbers missing from first_seq up to max_seq
--   named_holes         those of them that a `gap` row names: its detail has "expected" and "got",
--                       and names the numbers from expected to got − 1
--   unexplained_holes   missing numbers that no gap row names. Must be 0, or frames were lost unnoticed
--   missing_levels      levels of stored snapshots that orderbook_events lacks. Must be 0
--   doubled             rows stored more than once: rows with one journal record, and levels beyond those
--                       that their snapshot had. Must be 0. Rows of versions without `record` count as
--                       doubled if their number is stored more than once
--   repeated            numbers that the exchange itself sent more than once, in different records
--
-- Trades without a number (seq 0) were fetched after a gap, and are not counted.
--
-- The beginning of a subscription. Numbers begin at 1 on every connection, so they are counted from 1, unless
-- retention has provably deleted the beginning:
--   1. the connection's `connected` row and the subscription's `subscribed` row are both missing, and
--   2. retention has deleted rows up to an instant (`taken_before`) less than a day before the connection's first
--      row. That instant is the age that the tables' TTL allows, or, if the retention was changed, the age that it
--      allowed before the change (`retention_changes`).
-- Then they are counted from min_seq. Every other missing number is a hole: a lost `subscribed` row, a recording of
-- which half is missing, a database into which only some hours were restored, rows deleted by hand. Rows from before
-- `taken_before` that are still stored are not checked, because retention deletes rows in no order.
--
-- `since` and `until` bound the receive times that are checked (the check no_unexplained_gaps passes newer ones). A
-- subscription that began before `since` is counted from its last number of the three hours before, or from min_seq
-- if it was silent then and its connection was not.
--
-- Run: kalshi-platform sql --file infra/queries/lossless_proof.sql
-- Compared with the journal and the archive: kalshi-platform proof
--
-- Numbers are stored as bitmaps, about a bit per frame, so that a month fits into memory.
WITH
    toDateTime64('1971-01-01 00:00:00', 6, 'UTC') AS since,
    toDateTime64('2299-01-01 00:00:00', 6, 'UTC') AS until,
    (
        SELECT max(at)
        FROM
        (
            SELECT now64(6, 'UTC') - toIntervalDay(days) AS at
            FROM
            (
                SELECT toUInt32OrZero(extract(
                    create_table_query, 'TTL toDateTime\\(\\w+\\) \\+ toIntervalDay\\((\\d+)\\)'
                )) AS days
                FROM system.tables
                WHERE database = currentDatabase() AND days > 0
                    AND replaceRegexpOne(name, '_local$', '')
                        IN ('orderbook_events', 'trades', 'stream_events')
            )
            UNION ALL
            SELECT taken_before FROM retention_changes
        )
    ) AS taken_before,
    greatest(since, taken_before)                            AS seen_from,
    greatest(since - toIntervalHour(3), taken_before)        AS lead_from,
    book AS
    (
        SELECT
            conn_id,
            sid,
            groupBitmapStateIf(seq, isNotNull(record))                      AS placed,
            groupBitmapStateIf(seq, isNull(record))                         AS unplaced,
            groupBitmapStateIf(assumeNotNull(record), isNotNull(record))    AS records,
            count()                                                         AS rows,
            min(ingest_ts)                                                  AS first_ts
        FROM orderbook_events
        WHERE type = 'delta' AND ingest_ts >= seen_from AND ingest_ts <= until
        GROUP BY conn_id, sid
    ),
    trade AS
    (
        SELECT
            conn_id,
            sid,
            groupBitmapStateIf(seq, isNotNull(record))                      AS placed,
            groupBitmapStateIf(seq, isNull(record))                         AS unplaced,
            groupBitmapStateIf(assumeNotNull(record), isNotNull(record))    AS records,
            count()                                                         AS rows,
            min(ingest_ts)                                                  AS first_ts
        FROM trades
        WHERE seq > 0 AND ingest_ts >= seen_from AND ingest_ts <= until
        GROUP BY conn_id, sid
    ),
    stream AS
    (
        -- these four kinds are events of the recording itself, not frames of the exchange with a number
        SELECT
            conn_id,
            sid,
            groupBitmapStateIf(seq, isNotNull(record))                      AS placed,
            groupBitmapStateIf(seq, isNull(record))                         AS unplaced,
            groupBitmapStateIf(assumeNotNull(record), isNotNull(record))    AS records,
            count()                                                         AS rows,
            min(ingest_ts)                                                  AS first_ts
        FROM stream_events
        WHERE seq > 0 AND kind NOT IN ('gap', 'resynced', 'connected', 'disconnected') AND ingest_ts >= seen_from AND ingest_ts <= until
        GROUP BY conn_id, sid
    ),
    kept AS
    (
        SELECT
            conn_id,
            sid,
            groupBitmapMergeState(placed)   AS placed,
            groupBitmapMergeState(unplaced) AS unplaced,
            groupBitmapMerge(records)       AS records,
            sum(rows)                       AS rows,
            min(first_ts)                   AS begins
        FROM
        (
            SELECT * FROM book
            UNION ALL
            SELECT * FROM trade
            UNION ALL
            SELECT * FROM stream
        )
        GROUP BY conn_id, sid
    ),
    earlier AS
    (
        -- nothing, unless `since` is given
        SELECT conn_id, sid, max(last_seq) AS last_before
        FROM
        (
            SELECT conn_id, sid, max(seq) AS last_seq
            FROM orderbook_events
            WHERE type = 'delta' AND ingest_ts >= lead_from AND ingest_ts < since
            GROUP BY conn_id, sid
            UNION ALL
            SELECT conn_id, sid, max(seq) AS last_seq
            FROM trades
            WHERE seq > 0 AND ingest_ts >= lead_from AND ingest_ts < since
            GROUP BY conn_id, sid
            UNION ALL
            SELECT conn_id, sid, max(seq) AS last_seq
            FROM stream_events
            WHERE seq > 0 AND kind NOT IN ('gap', 'resynced', 'connected', 'disconnected')
                AND ingest_ts >= lead_from AND ingest_ts < since
            GROUP BY conn_id, sid
        )
        GROUP BY conn_id, sid
    ),
    opened AS
    (
        SELECT DISTINCT conn_id, 1 AS is_opened
        FROM stream_events
        WHERE kind = 'connected' AND ingest_ts >= seen_from AND ingest_ts <= until
    ),
    begun AS
    (
        SELECT DISTINCT conn_id, sid, 1 AS is_begun
        FROM stream_events
        WHERE kind = 'subscribed' AND ingest_ts >= seen_from AND ingest_ts <= until
    ),
    subscriptions AS
    (
        SELECT
            conn_id,
            sid,
            bitmapOr(placed, unplaced)                  AS seqs,
            bitmapMin(seqs)                             AS min_seq,
            bitmapMax(seqs)                             AS max_seq,
            toInt64(bitmapCardinality(seqs))            AS frames,
            multiIf
            (
                is_opened = 1 OR is_begun = 1,                      1,
                conn_goes_on,                                       least(if(last_before > 0, last_before + 1, min_seq), min_seq),
                conn_begins <= taken_before + toIntervalDay(1),     min_seq,
                1
            )                                           AS first_seq,
            toInt64(records) - toInt64(bitmapCardinality(placed))   AS repeated,
            toInt64(rows) - frames - repeated           AS doubled_rows
        FROM
        (
            SELECT
                *,
                min(begins) OVER (PARTITION BY conn_id)             AS conn_begins,
                max(last_before > 0) OVER (PARTITION BY conn_id)    AS conn_goes_on
            FROM kept
            LEFT JOIN earlier USING (conn_id, sid)
        ) AS each
        LEFT JOIN opened USING (conn_id)
        LEFT JOIN begun USING (conn_id, sid)
    ),
    snapshots AS
    (
        -- what each snapshot's own row says, once for each record
        SELECT conn_id, sid, seq, sum(said) AS levels_said
        FROM
        (
            SELECT conn_id, sid, seq, record, any(JSONExtractUInt(detail, 'levels')) AS said
            FROM stream_events
            WHERE kind = 'snapshot' AND ingest_ts >= seen_from AND ingest_ts <= until
            GROUP BY conn_id, sid, seq, record
        )
        GROUP BY conn_id, sid, seq
    ),
    levels AS
    (
        SELECT
            conn_id,
            sid,
            sum(greatest(toInt64(levels_kept) - toInt64(levels_said), 0)) AS doubled_levels,
            sum(greatest(toInt64(levels_said) - toInt64(levels_kept), 0)) AS missing_levels
        FROM snapshots
        LEFT JOIN
        (
            SELECT conn_id, sid, seq, count() AS levels_kept
            FROM orderbook_events
            WHERE type = 'snapshot' AND ingest_ts >= seen_from AND ingest_ts <= until
            GROUP BY conn_id, sid, seq
        ) AS kept_levels USING (conn_id, sid, seq)
        GROUP BY conn_id, sid
    ),
    gaps AS
    (
        -- where two gap rows overlap, the later one names only what the earlier did not
        SELECT
            conn_id,
            sid,
            greatest(
                expected,
                max(got) OVER (
                    PARTITION BY conn_id, sid
                    ORDER BY expected, got
                    ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
                )
            ) AS from_seq,
            got AS to_seq
        FROM
        (
            SELECT
                conn_id,
                sid,
                JSONExtractUInt(detail, 'expected') AS expected,
                JSONExtractUInt(detail, 'got')      AS got
            FROM stream_events
            WHERE kind = 'gap' AND ingest_ts >= seen_from AND ingest_ts <= until
                AND JSONHas(detail, 'expected') AND JSONHas(detail, 'got') AND got > expected
        )
    ),
    named AS
    (
        SELECT
            conn_id,
            sid,
            sum(
                toInt64(least(to_seq, max_seq + 1)) - toInt64(greatest(from_seq, first_seq))
                - toInt64(bitmapCardinality(
                    bitmapSubsetInRange(seqs, greatest(from_seq, first_seq), least(to_seq, max_seq + 1))
                ))
            ) AS named_holes
        FROM gaps
        INNER JOIN subscriptions USING (conn_id, sid)
        WHERE greatest(from_seq, first_seq) < least(to_seq, max_seq + 1)
        GROUP BY conn_id, sid
    )
SELECT
    conn_id,
    sid,
    min_seq,
    max_seq,
    first_seq,
    frames,
    toInt64(max_seq) - toInt64(first_seq) + 1 - frames AS holes,
    named_holes,
    holes - named_holes                                AS unexplained_holes,
    missing_levels,
    doubled_rows + doubled_levels                      AS doubled,
    repeated
FROM subscriptions
LEFT JOIN named USING (conn_id, sid)
LEFT JOIN levels USING (conn_id, sid)
ORDER BY unexplained_holes DESC, missing_levels DESC, doubled DESC, conn_id, sid
