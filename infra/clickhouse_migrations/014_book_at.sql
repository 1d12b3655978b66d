-- The same book_at, answered sooner. What it takes is planning rather than reading: ClickHouse resolves
-- a view's query twice, and each level of it costs. So one level less, and one thread: a question reads
-- one market's events since the last whole book, at most an hour of them, and to start a second thread for
-- them takes longer than they do. Nor is PREWHERE worth what planning it takes: nearly every row of that span
-- is wanted. 002_live_views.sql says how it finds the book.
CREATE OR REPLACE VIEW book_at AS
WITH
    (
        -- one row always: the greatest tuple, all zeros where there is none
        SELECT max((base_ts, after_checkpoint, seq, conn_id, sid))
        FROM
        (
            SELECT ts AS base_ts, 0 AS after_checkpoint, seq, conn_id, sid
            FROM book_checkpoints
            WHERE market_ticker = {ticker:String} AND ts <= {at:DateTime64(6, 'UTC')}
            UNION ALL
            SELECT ingest_ts, 1, seq, conn_id, sid
            FROM stream_events
            WHERE market_ticker = {ticker:String} AND kind = 'snapshot'
                AND ingest_ts <= {at:DateTime64(6, 'UTC')}
        )
    ) AS base,
    base.1 AS base_ts,
    base.2 = 1 AS is_snapshot,
    base.3 AS base_seq,
    base.4 AS base_conn_id,
    base.5 AS base_sid
SELECT
    {ticker:String}           AS market_ticker,
    side,
    price,
    argMax(size, seq)         AS size,
    max(max(event_ts)) OVER () AS last_event_ts
FROM
(
    SELECT side, price, size, seq, ingest_ts AS event_ts
    FROM orderbook_events
    WHERE market_ticker = {ticker:String}
        AND ingest_ts >= base_ts - toIntervalMinute(1)
        AND ingest_ts <= {at:DateTime64(6, 'UTC')}
        AND conn_id = base_conn_id
        AND sid = base_sid
        AND (seq > base_seq OR (is_snapshot AND seq = base_seq))
    UNION ALL
    SELECT assumeNotNull(side), assumeNotNull(price), assumeNotNull(size), seq, ts
    FROM book_checkpoints
    WHERE market_ticker = {ticker:String}
        AND ts = base_ts
        AND NOT is_snapshot
        AND conn_id = base_conn_id
        AND sid = base_sid
        AND side IS NOT NULL
)
GROUP BY side, price
QUALIFY size > 0
SETTINGS max_threads = 1, optimize_move_to_prewhere = 0;
