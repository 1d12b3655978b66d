-- Is every numbered frame accounted for? One row for each subscription (conn_id, sid) of a
-- sequenced channel:
--
--   min_seq, max_seq    the first and the last number kept
--   frames              how many different numbers are kept, in orderbook_events, trades and
--                       stream_events together
--   holes               numbers missing up to max_seq: from 1 where the subscription's beginning is
--                       kept (its `subscribed` row), from min_seq where retention has taken it
--   named_holes         those of them that a `gap` row names: its detail has "expected" and "got",
--                       and names the numbers from expected to got − 1
--   unexplained_holes   holes that no gap row names. Must be 0, or something was lost unnoticed
--   doubled             numbers stored more than once. Must be 0. A delta or a trade is one row; a
--                       snapshot is one number, with a row for each level and one row in stream_events.
--                       Trades without a number (seq 0) were fetched after a gap, and are not counted
--
-- Run: kalshi-platform sql --file infra/queries/lossless_proof.sql
--
-- Numbers are held as bitmaps, about a bit for each frame, so that a month fits into memory.
WITH
    book AS
    (
        SELECT
            conn_id,
            sid,
            groupBitmapState(seq)                      AS seqs,
            groupBitmapStateIf(seq, type = 'snapshot') AS snapshot_seqs,
            countIf(type = 'delta')                    AS single_rows
        FROM orderbook_events
        GROUP BY conn_id, sid
    ),
    trade AS
    (
        SELECT
            conn_id,
            sid,
            groupBitmapState(seq)                AS seqs,
            groupBitmapStateIf(seq, seq = 0)     AS snapshot_seqs, -- none
            count()                              AS single_rows
        FROM trades
        WHERE seq > 0
        GROUP BY conn_id, sid
    ),
    stream AS
    (
        -- these four kinds happened to the recording: no frame of the exchange, no number of theirs
        SELECT
            conn_id,
            sid,
            groupBitmapState(seq)                      AS seqs,
            groupBitmapStateIf(seq, kind = 'snapshot') AS snapshot_seqs,
            countIf(kind != 'snapshot')                AS single_rows,
            countIf(kind = 'snapshot')                 AS snapshot_rows
        FROM stream_events
        WHERE seq > 0 AND kind NOT IN ('gap', 'resynced', 'connected', 'disconnected')
        GROUP BY conn_id, sid
    ),
    repeats AS
    (
        -- a snapshot that is stored twice: by its own row, or by its levels
        SELECT conn_id, sid, toInt64(snapshot_rows - bitmapCardinality(snapshot_seqs)) AS rows
        FROM stream
        UNION ALL
        SELECT conn_id, sid, toInt64(count() - 1) AS rows
        FROM orderbook_events
        WHERE type = 'snapshot'
        GROUP BY conn_id, sid, seq, side, price
        HAVING rows > 0
    ),
    kept AS
    (
        SELECT
            conn_id,
            sid,
            groupBitmapMergeState(seqs)          AS seqs,
            groupBitmapMergeState(snapshot_seqs) AS snapshot_seqs,
            sum(single_rows)                     AS single_rows
        FROM
        (
            SELECT conn_id, sid, seqs, snapshot_seqs, single_rows FROM book
            UNION ALL
            SELECT conn_id, sid, seqs, snapshot_seqs, single_rows FROM trade
            UNION ALL
            SELECT conn_id, sid, seqs, snapshot_seqs, single_rows FROM stream
        )
        GROUP BY conn_id, sid
    ),
    beginnings AS
    (
        SELECT DISTINCT conn_id, sid, 1 AS beginning_kept
        FROM stream_events
        WHERE kind = 'subscribed'
    ),
    subscriptions AS
    (
        SELECT
            conn_id,
            sid,
            seqs,
            bitmapMin(seqs)                                                 AS min_seq,
            bitmapMax(seqs)                                                 AS max_seq,
            if(beginning_kept = 1, 1, min_seq)                              AS first_seq,
            toInt64(bitmapCardinality(seqs))                                AS frames,
            toInt64(single_rows + bitmapCardinality(snapshot_seqs)) - frames AS shared_seqs
        FROM kept
        LEFT JOIN beginnings USING (conn_id, sid)
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
            WHERE kind = 'gap' AND JSONHas(detail, 'expected') AND JSONHas(detail, 'got')
                AND got > expected
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
    ),
    repeated AS
    (
        SELECT conn_id, sid, sum(rows) AS repeated_rows FROM repeats GROUP BY conn_id, sid
    )
SELECT
    conn_id,
    sid,
    min_seq,
    max_seq,
    frames,
    toInt64(max_seq) - toInt64(first_seq) + 1 - frames AS holes,
    named_holes,
    holes - named_holes                                AS unexplained_holes,
    shared_seqs + repeated_rows                        AS doubled
FROM subscriptions
LEFT JOIN named USING (conn_id, sid)
LEFT JOIN repeated USING (conn_id, sid)
ORDER BY unexplained_holes DESC, doubled DESC, conn_id, sid
