-- The book as people ask for it: the top of every book now, and one whole book at any instant.

-- The exchange keeps bids only. A YES ask at p is a NO bid at 1 − p, of the same size.
-- Age counts from the newest event of the market, a removed level included. A market whose book
-- is empty on both sides has no row; one empty side is null.
CREATE VIEW IF NOT EXISTS top_of_book AS
SELECT
    market_ticker,
    maxOrNullIf(price, side = 'yes' AND size > 0)           AS yes_bid,
    argMaxOrNullIf(size, price, side = 'yes' AND size > 0)  AS yes_bid_size,
    toDecimal32(1, 4) - maxOrNullIf(price, side = 'no' AND size > 0) AS yes_ask,
    argMaxOrNullIf(size, price, side = 'no' AND size > 0)   AS yes_ask_size,
    toDecimal64(yes_bid + yes_ask, 5) / 2                   AS mid, -- halfway needs a fifth decimal
    yes_ask - yes_bid                                       AS spread,
    max(ingest_ts)                                          AS last_event_ts,
    dateDiff('millisecond', last_event_ts, now64(3)) / 1000 AS age_seconds
FROM latest_levels FINAL
GROUP BY market_ticker
HAVING countIf(size > 0) > 0;

-- SELECT * FROM book_at(ticker = 'T', at = '2026-11-22 14:05:00') ORDER BY side, price
--
-- `at` is UTC; events received at that very microsecond count. `base` is the newest whole book at
-- or before `at`: a snapshot, or the checkpoint of an hour's first instant, which holds the events
-- before that instant and is therefore older than a snapshot of the same microsecond. A snapshot is
-- found by its row in stream_events, since an empty one leaves no other trace. From there on the
-- newest size of each level counts, by seq: later events of the base's own subscription only, for a
-- new connection starts with a snapshot of its own. A minute of slack below the base's time allows
-- for a receive clock that was set back; seq decides.
--
-- With no base there is no row; neither is there for an empty book. last_event_ts is the receive time
-- of the newest event, or the checkpoint's instant where none came after it. The book of a market in
-- a gap (see stream_events) is the one known before it.
CREATE VIEW IF NOT EXISTS book_at AS
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
SELECT market_ticker, side, price, size, last_event_ts
FROM
(
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
)
WHERE size > 0;
