-- Which gaps were noticed from `since` on, and how long did each keep its books in doubt?
--
-- A gap of a whole subscription ends with its `resynced` row; one of a single book (market_ticker is
-- set) with that book's next snapshot. Either also ends with what ends the book itself: the connection,
-- the subscription, or nobody following the market any more. `ended_at` is null while it lasts, and
-- `open_s` then counts to `until`. What comes after a gap follows from the journal's records, and from receive
-- times where rows have none.
WITH
    gaps AS
    (
        SELECT
            ingest_ts, record, conn_id, sid, market_ticker,
            JSONExtractString(detail, 'cause')  AS cause,
            JSONExtractUInt(detail, 'expected') AS expected,
            JSONExtractUInt(detail, 'got')      AS got
        FROM stream_events
        WHERE kind = 'gap' AND ingest_ts > {since:DateTime64(6, 'UTC')}
            AND ingest_ts <= {until:DateTime64(6, 'UTC')}
            -- no other channel has books to bring back
            AND JSONExtractString(detail, 'channel') IN ('', 'orderbook_delta')
    ),
    ends AS
    (
        SELECT
            ingest_ts AS end_ts, record AS end_record, conn_id, sid AS end_sid,
            market_ticker AS end_ticker, kind
        FROM stream_events
        WHERE kind IN ('resynced', 'snapshot', 'left', 'unsubscribed', 'disconnected')
            AND ingest_ts > {since:DateTime64(6, 'UTC')} AND ingest_ts <= {until:DateTime64(6, 'UTC')}
            AND conn_id IN (SELECT conn_id FROM gaps)
    )
SELECT
    ingest_ts, conn_id, sid, market_ticker, cause, expected, got,
    argMinOrNullIf(
        end_ts,
        (ifNull(end_record, 0), end_ts),
        if(isNull(record) OR isNull(end_record), end_ts >= ingest_ts, end_record >= record)
        AND (
            kind = 'disconnected'
            OR (kind = 'unsubscribed' AND end_sid = sid)
            OR (market_ticker = '' AND kind = 'resynced' AND end_sid = sid)
            OR (market_ticker != '' AND kind IN ('snapshot', 'left') AND end_ticker = market_ticker)
        )
    ) AS ended_at,
    dateDiff('millisecond', ingest_ts, ifNull(ended_at, {until:DateTime64(6, 'UTC')})) / 1000 AS open_s
FROM gaps
LEFT JOIN ends USING (conn_id)
GROUP BY ingest_ts, record, conn_id, sid, market_ticker, cause, expected, got
ORDER BY open_s DESC, ingest_ts, conn_id, sid, market_ticker
