-- The order of receipt in what is asked of books: `shard` and `record` (015) where rows have them. Rows of
-- earlier versions have none and are ordered as before, by receive time and `seq`.

ALTER TABLE spreads
    ADD COLUMN IF NOT EXISTS shard  Nullable(UInt32) CODEC(ZSTD(3)),
    ADD COLUMN IF NOT EXISTS record Nullable(UInt64) CODEC(Delta, T64, ZSTD(3));

-- SELECT * FROM book_at(ticker = 'T', at = '2026-11-22 14:05:00') ORDER BY side, price
--
-- `at` is UTC; events received at that very microsecond count. `base` is the newest whole book at or before
-- `at`: a snapshot, found by its row in stream_events, or a checkpoint, which holds the records before its
-- own. Newest by record; of the shards that had the market the one that had it last. From there on the
-- newest size of each level counts, of later events of the base's own subscription only, for a new connection
-- starts with a snapshot of its own. Where the receive clock was set back a checkpoint was written, so from a
-- base on receive times ascend with the records, and of an instant that the clock showed twice the later
-- state counts. A base without a record: by `seq`, with a minute of slack for such a clock.
--
-- With no base there is no row; neither is there for an empty book. last_event_ts is the receive time of the
-- newest event, or the checkpoint's instant where none came after it. The book of a market in a gap (see
-- stream_events) is the one known before it. 014_book_at.sql says what makes it quick.
CREATE OR REPLACE VIEW book_at AS
WITH
    (
        -- one row always: zeros where there is none
        SELECT argMax(newest, (of_shard IS NOT NULL, last_ts, of_shard))
        FROM
        (
            SELECT
                shard AS of_shard,
                max(base_ts) AS last_ts,
                max((ifNull(record, 0), base_ts, after_checkpoint, seq, conn_id, sid)) AS newest
            FROM
            (
                SELECT shard, record, ts AS base_ts, 0 AS after_checkpoint, seq, conn_id, sid
                FROM book_checkpoints
                WHERE market_ticker = {ticker:String} AND ts <= {at:DateTime64(6, 'UTC')}
                UNION ALL
                SELECT shard, record, ingest_ts, 1, seq, conn_id, sid
                FROM stream_events
                WHERE market_ticker = {ticker:String} AND kind = 'snapshot'
                    AND ingest_ts <= {at:DateTime64(6, 'UTC')}
            )
            GROUP BY shard
        )
    ) AS base,
    base.1 AS base_record, -- 0: none
    base.2 AS base_ts,
    base.3 = 1 AS is_snapshot,
    base.4 AS base_seq,
    base.5 AS base_conn_id,
    base.6 AS base_sid
SELECT
    {ticker:String}           AS market_ticker,
    side,
    price,
    argMax(size, place)       AS size,
    max(max(event_ts)) OVER () AS last_event_ts
FROM
(
    SELECT side, price, size, if(base_record = 0, seq, assumeNotNull(record)) AS place, ingest_ts AS event_ts
    FROM orderbook_events
    WHERE market_ticker = {ticker:String}
        AND ingest_ts >= base_ts - toIntervalMinute(base_record = 0)
        AND ingest_ts <= {at:DateTime64(6, 'UTC')}
        AND conn_id = base_conn_id
        AND sid = base_sid
        AND if(base_record = 0, seq > base_seq OR (is_snapshot AND seq = base_seq), record >= base_record)
    UNION ALL
    SELECT assumeNotNull(side), assumeNotNull(price), assumeNotNull(size), if(base_record = 0, seq, 0), ts
    FROM book_checkpoints
    WHERE market_ticker = {ticker:String}
        AND ts = base_ts
        AND ifNull(record, 0) = base_record
        AND NOT is_snapshot
        AND conn_id = base_conn_id
        AND sid = base_sid
        AND side IS NOT NULL
)
GROUP BY side, price
QUALIFY size > 0
SETTINGS max_threads = 1, optimize_move_to_prewhere = 0;

-- SELECT * FROM rolling_stats(ticker = 'T', minutes = 5)
--
-- As in 003_analytics.sql, which says what the columns are and how it is worked out. Its minutes begin no
-- earlier than the market's newest snapshot, and no earlier than a receive clock was last set back: from
-- that record on, and not from that time on, for what came before it in the same microsecond is of the book
-- before. A change goes before another of its instant by record.
CREATE OR REPLACE VIEW rolling_stats AS
WITH
    (SELECT now64(6, 'UTC')) AS ended,
    ended - toIntervalMinute({minutes:UInt32}) AS first,
    (
        SELECT argMax(newest, (of_shard IS NOT NULL, last_ts, of_shard))
        FROM
        (
            SELECT
                shard AS of_shard,
                max(base_ts) AS last_ts,
                max((ifNull(record, 0), base_ts, ifNull(shard, 0))) AS newest
            FROM
            (
                SELECT shard, record, ingest_ts AS base_ts
                FROM stream_events
                WHERE market_ticker = {ticker:String} AND kind = 'snapshot'
                    AND ingest_ts > first AND ingest_ts <= ended
                UNION ALL
                SELECT shard, record, ts
                FROM book_checkpoints
                WHERE market_ticker = {ticker:String} AND ts > first AND ts <= ended
                    AND ts > toStartOfHour(ts) AND record IS NOT NULL
            )
            GROUP BY shard
        )
    ) AS base,
    base.1 AS base_record, -- 0: none
    base.3 AS base_shard,
    greatest(base.2, first) AS begun,
    changes AS
    (
        SELECT side, price, type, size, qty, ingest_ts, ifNull(record, seq) AS place, conn_id, sid, seq
        FROM orderbook_events
        WHERE market_ticker = {ticker:String} AND ingest_ts >= begun AND ingest_ts <= ended
            AND (base_record = 0 OR (record >= base_record AND shard = base_shard))
    ),
    rows AS
    (
        -- (at, place, size): a level's first change also tells its size at `begun`
        SELECT side, price, 1 AS is_change,
            arrayJoin(if
            (
                row_number() OVER (PARTITION BY side, price ORDER BY ingest_ts, place) = 1,
                [(begun, toUInt64(0), if(type = 'snapshot', size, size - qty)), (ingest_ts, place, size)],
                [(ingest_ts, place, size)]
            )) AS row
        FROM changes
        UNION ALL
        SELECT side, price, 0, (begun, toUInt64(0), size)
        FROM latest_levels FINAL
        WHERE market_ticker = {ticker:String} AND size > 0
    ),
    levels AS
    (
        SELECT side, price, row.1 AS at, row.2 AS place, row.3 AS standing,
            min(standing) OVER (PARTITION BY side, price) > 0 AS always
        FROM (SELECT *, max(is_change) OVER (PARTITION BY side, price) AS changes FROM rows)
        WHERE is_change = changes
    ),
    ranked AS
    (
        SELECT side, price, at, place, standing, dense_rank() OVER (ORDER BY at) AS instant
        FROM (SELECT *, maxIf(price, always) OVER (PARTITION BY side) AS floor FROM levels)
        WHERE price >= floor
    ),
    runs AS
    (
        SELECT side, price, at, instant, standing,
            leadInFrame(instant, 1, last + 1) OVER
            (
                PARTITION BY side, price ORDER BY instant, place
                ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING
            ) AS next,
            standing > 0 AND next > instant AS stands
        FROM (SELECT *, max(instant) OVER () AS last FROM ranked)
    ),
    tops AS
    (
        SELECT
            number,
            maxIf(at, number = instant)                                    AS at,
            maxOrNullIf(price, stands AND side = 'yes')                    AS yes_bid,
            toDecimal32(1, 4) - maxOrNullIf(price, stands AND side = 'no') AS yes_ask
        FROM (SELECT *, arrayJoin(if(stands, range(instant, next), [instant])) AS number FROM runs)
        GROUP BY number
    ),
    states AS
    (
        SELECT yes_bid, yes_ask,
            dateDiff('microsecond', at, leadInFrame(at, 1, ended) OVER
            (
                ORDER BY number ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING
            )) / 1e6 AS lasts
        FROM tops
    ),
    (SELECT uniqExact(conn_id, sid, seq) FROM changes) AS frames
SELECT
    {ticker:String}                                  AS market_ticker,
    begun                                            AS since,
    dateDiff('microsecond', begun, ended) / 1e6      AS seconds,
    frames                                           AS updates,
    updates / seconds                                AS updates_per_second,
    ifNull(sum(lasts), 0)                            AS two_sided_seconds,
    sum(toFloat64(yes_ask - yes_bid) * lasts) / nullIf(two_sided_seconds, 0) AS time_weighted_spread,
    minOrNull(toDecimal64(yes_bid + yes_ask, 5) / 2) AS mid_low,
    maxOrNull(toDecimal64(yes_bid + yes_ask, 5) / 2) AS mid_high,
    mid_high - mid_low                               AS mid_range
FROM states
WHERE lasts > 0 AND yes_bid IS NOT NULL AND yes_ask IS NOT NULL;
