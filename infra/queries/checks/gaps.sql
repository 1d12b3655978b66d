-- Which gaps were noticed from `since` on, and how long did each leave its books stale?
--
-- A gap of a whole subscription ends with its `resynced` row; a gap of a single book (market_ticker is set) with
-- that book's next snapshot. Either also ends with the book itself: when the connection or the subscription ends, or
-- the market is no longer followed. `ended_at` is null while the gap lasts, and `open_s` then counts to `until`. The
-- order is that of journal records, and of receive times for rows without a record.
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
            -- other channels have no books
            AND JSONExtractString(detail, 'channel') IN ('', 'orderbook_delta')
    ),
    ends AS
    (
        SELECT
            ingest_ts AS end_ts, record AS end_record, conn_id, sid AS end_sid,
            market_ticker AS end_ticker,
            -- a connection has every book: its gaps may last
            if(kind = 'resynced' AND (market_ticker != '' OR JSONExtractString(detail, 'cause') = 'connected'), '', kind) AS kind
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
