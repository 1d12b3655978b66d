-- Spreads, depth and imbalance by the hour, and what can be asked of the live book: its depth, its
-- imbalance, and the last minutes of a market. Columns are those of kalshi_platform/storage/schema.py;
-- a test compares them. Formulas are in the docstrings of kalshi_platform/analytics.
--
-- An hour is computed from its own files alone and may be computed again: it is replaced whole. That is
-- why a partition is an hour: ALTER TABLE ... REPLACE PARTITION puts all its rows in the place of the old
-- ones at one instant. No reader sees an hour twice or in part, and a kill leaves the old or the new one.
-- 30 days are 720 partitions of one part each; parts expire whole (ttl_only_drop_parts).

CREATE TABLE IF NOT EXISTS spreads
(
    market_ticker LowCardinality(String)         CODEC(ZSTD(3)),
    ts            Nullable(DateTime64(6, 'UTC')) CODEC(Delta, T64, ZSTD(3)),
    ingest_ts     DateTime64(6, 'UTC')           CODEC(Delta, T64, ZSTD(3)),
    conn_id       UUID                           CODEC(ZSTD(3)),
    sid           UInt32                         CODEC(ZSTD(3)),
    seq           UInt64                         CODEC(Delta, T64, ZSTD(3)),
    cause         Enum8('checkpoint' = 1, 'snapshot' = 2, 'delta' = 3, 'doubt' = 4) CODEC(ZSTD(3)),
    verified      Bool                           CODEC(ZSTD(3)),
    yes_bid       Nullable(Decimal(9, 4))        CODEC(Delta, ZSTD(3)),
    yes_bid_size  Nullable(Decimal(18, 2))       CODEC(ZSTD(3)),
    yes_ask       Nullable(Decimal(9, 4))        CODEC(Delta, ZSTD(3)),
    yes_ask_size  Nullable(Decimal(18, 2))       CODEC(ZSTD(3)),
    spread        Nullable(Decimal(9, 4))        CODEC(Delta, ZSTD(3)),
    mid           Nullable(Decimal(9, 5))        CODEC(Delta, ZSTD(3)),
    microprice    Nullable(Float64)              CODEC(ZSTD(3))
)
ENGINE = MergeTree
PARTITION BY toStartOfHour(ingest_ts)
PRIMARY KEY (market_ticker, ingest_ts)
ORDER BY (market_ticker, ingest_ts, seq)
SETTINGS
    non_replicated_deduplication_window = 10000,
    ttl_only_drop_parts = 1,
    materialize_ttl_recalculate_only = 1
COMMENT 'Every change of a market''s best prices or their sizes, with the frame that caused it.';

CREATE TABLE IF NOT EXISTS depth
(
    market_ticker LowCardinality(String)  CODEC(ZSTD(3)),
    second        DateTime64(6, 'UTC')    CODEC(Delta, T64, ZSTD(3)),
    verified      Bool                    CODEC(ZSTD(3)),
    yes_bid       Nullable(Decimal(9, 4)) CODEC(Delta, ZSTD(3)),
    bid_size      Decimal(18, 2)          CODEC(ZSTD(3)),
    bid_size_1c   Decimal(18, 2)          CODEC(ZSTD(3)),
    bid_size_2c   Decimal(18, 2)          CODEC(ZSTD(3)),
    bid_size_5c   Decimal(18, 2)          CODEC(ZSTD(3)),
    bid_size_10c  Decimal(18, 2)          CODEC(ZSTD(3)),
    bid_size_all  Decimal(18, 2)          CODEC(Delta, ZSTD(3)),
    bid_levels    UInt32                  CODEC(Delta, ZSTD(3)),
    bid_notional  Decimal(18, 6)          CODEC(Delta, ZSTD(3)),
    yes_ask       Nullable(Decimal(9, 4)) CODEC(Delta, ZSTD(3)),
    ask_size      Decimal(18, 2)          CODEC(ZSTD(3)),
    ask_size_1c   Decimal(18, 2)          CODEC(ZSTD(3)),
    ask_size_2c   Decimal(18, 2)          CODEC(ZSTD(3)),
    ask_size_5c   Decimal(18, 2)          CODEC(ZSTD(3)),
    ask_size_10c  Decimal(18, 2)          CODEC(ZSTD(3)),
    ask_size_all  Decimal(18, 2)          CODEC(Delta, ZSTD(3)),
    ask_levels    UInt32                  CODEC(Delta, ZSTD(3)),
    ask_notional  Decimal(18, 6)          CODEC(Delta, ZSTD(3))
)
ENGINE = MergeTree
PARTITION BY toStartOfHour(second)
ORDER BY (market_ticker, second)
SETTINGS
    non_replicated_deduplication_window = 10000,
    ttl_only_drop_parts = 1,
    materialize_ttl_recalculate_only = 1
COMMENT 'What rests on both sides of a market, at the end of every second in which that changed.';

CREATE TABLE IF NOT EXISTS imbalance
(
    market_ticker      LowCardinality(String) CODEC(ZSTD(3)),
    second             DateTime64(6, 'UTC')   CODEC(Delta, T64, ZSTD(3)),
    verified           Bool                   CODEC(ZSTD(3)),
    imbalance_best     Nullable(Float64)      CODEC(ZSTD(3)),
    imbalance_5_levels Nullable(Float64)      CODEC(ZSTD(3)),
    imbalance_5c       Nullable(Float64)      CODEC(ZSTD(3)),
    ofi                Decimal(18, 2)         CODEC(ZSTD(3))
)
ENGINE = MergeTree
PARTITION BY toStartOfHour(second)
ORDER BY (market_ticker, second)
SETTINGS
    non_replicated_deduplication_window = 10000,
    ttl_only_drop_parts = 1,
    materialize_ttl_recalculate_only = 1
COMMENT 'Which side is the heavier, and the order flow, for every second in which there is news of either.';

-- What is on the book now, as `depth` and `imbalance` have it for the end of a second: same columns, same
-- formulas, from latest_levels. A market with no level at all has no row. SELECT ... WHERE market_ticker
-- = 'T' reads that market alone. `age_seconds` counts from the market's newest event.
CREATE VIEW IF NOT EXISTS live_depth AS
WITH toDecimal32(1, 4) AS one, toDecimal32('0.01', 4) AS cent
SELECT
    market_ticker,
    max(last_event)                                                        AS last_event_ts,
    dateDiff('millisecond', last_event_ts, now64(3)) / 1000                AS age_seconds,
    maxOrNullIf(price, bid)                                                AS yes_bid,
    sumIf(size, bid AND below = 0)                                         AS bid_size,
    sumIf(size, bid AND below <= cent)                                     AS bid_size_1c,
    sumIf(size, bid AND below <= 2 * cent)                                     AS bid_size_2c,
    sumIf(size, bid AND below <= 5 * cent)                                     AS bid_size_5c,
    sumIf(size, bid AND below <= 10 * cent)                                      AS bid_size_10c,
    sumIf(size, bid)                                                       AS bid_size_all,
    countIf(bid)                                                           AS bid_levels,
    sumIf(toDecimal128(size, 2) * price, bid)                              AS bid_notional,
    one - maxOrNullIf(price, ask)                                          AS yes_ask,
    sumIf(size, ask AND below = 0)                                         AS ask_size,
    sumIf(size, ask AND below <= cent)                                     AS ask_size_1c,
    sumIf(size, ask AND below <= 2 * cent)                                     AS ask_size_2c,
    sumIf(size, ask AND below <= 5 * cent)                                     AS ask_size_5c,
    sumIf(size, ask AND below <= 10 * cent)                                      AS ask_size_10c,
    sumIf(size, ask)                                                       AS ask_size_all,
    countIf(ask)                                                           AS ask_levels,
    sumIf(toDecimal128(size, 2) * (one - price), ask)                      AS ask_notional
FROM
(
    SELECT
        market_ticker,
        price,
        size,
        size > 0 AND side = 'yes'  AS bid,
        size > 0 AND side = 'no'   AS ask, -- a YES ask at 1 - price
        maxIf(price, size > 0) OVER (PARTITION BY market_ticker, side) - price AS below,
        max(ingest_ts) OVER (PARTITION BY market_ticker) AS last_event
    FROM latest_levels FINAL
)
GROUP BY market_ticker
HAVING bid_levels + ask_levels > 0;

CREATE VIEW IF NOT EXISTS live_imbalance AS
WITH toDecimal32('0.01', 4) AS cent
SELECT
    market_ticker,
    max(last_event)                                                        AS last_event_ts,
    dateDiff('millisecond', last_event_ts, now64(3)) / 1000                AS age_seconds,
    toFloat64(sumIf(size, yes AND rank = 1) - sumIf(size, NOT yes AND rank = 1))
        / toFloat64(sumIf(size, rank = 1))                                 AS imbalance_best,
    toFloat64(sumIf(size, yes AND rank <= 5) - sumIf(size, NOT yes AND rank <= 5))
        / toFloat64(sumIf(size, rank <= 5))                                AS imbalance_5_levels,
    toFloat64(sumIf(size, yes AND below <= 5 * cent) - sumIf(size, NOT yes AND below <= 5 * cent))
        / toFloat64(sumIf(size, below <= 5 * cent))                            AS imbalance_5c
FROM
(
    SELECT
        market_ticker,
        size,
        side = 'yes' AS yes,
        row_number() OVER (PARTITION BY market_ticker, side ORDER BY price DESC) AS rank,
        max(price) OVER (PARTITION BY market_ticker, side) - price         AS below,
        max(ingest_ts) OVER (PARTITION BY market_ticker)                   AS last_event
    FROM latest_levels FINAL
    WHERE size > 0
)
GROUP BY market_ticker;

-- SELECT * FROM rolling_stats(ticker = 'T', minutes = 5)
--
-- The last minutes of one market, up to now. One row always. `since` is where they begin: so many
-- minutes ago, or at the market's newest snapshot if that came later, for what a book was before a
-- snapshot that follows a gap cannot be told; `seconds` is how long that is. All prices in dollars.
--   updates, updates_per_second   frames: deltas, and the snapshot
--   time_weighted_spread          sum(spread * seconds it lasted) / those seconds, both sides present
--   two_sided_seconds             how long both sides were there
--   mid_low, mid_high, mid_range  over the states that lasted
--
-- One pass over the market's changes. Each level stands with a size from one change of it to the next; before
-- the first it had size - qty, and a level without a change is as in latest_levels. Such runs are laid
-- over the instants at which anything changed, and the best price at an instant is the highest level that
-- stands. A level below one that stood all the time is never the best: such levels are left out first, and
-- with them most of the work.
CREATE VIEW IF NOT EXISTS rolling_stats AS
WITH
    (SELECT now64(6, 'UTC')) AS ended,
    (
        SELECT greatest(max(ingest_ts), ended - toIntervalMinute({minutes:UInt32}))
        FROM stream_events
        WHERE market_ticker = {ticker:String} AND kind = 'snapshot'
            AND ingest_ts > ended - toIntervalMinute({minutes:UInt32}) AND ingest_ts <= ended
    ) AS begun,
    rows AS
    (
        -- (at, seq, size): a level's first change also tells its size at `begun`
        SELECT side, price, 1 AS is_change,
            arrayJoin(if
            (
                row_number() OVER (PARTITION BY side, price ORDER BY ingest_ts, seq) = 1,
                [(begun, toUInt64(0), if(type = 'snapshot', size, size - qty)), (ingest_ts, seq, size)],
                [(ingest_ts, seq, size)]
            )) AS row
        FROM orderbook_events
        WHERE market_ticker = {ticker:String} AND ingest_ts >= begun AND ingest_ts <= ended
        UNION ALL
        SELECT side, price, 0, (begun, toUInt64(0), size)
        FROM latest_levels FINAL
        WHERE market_ticker = {ticker:String} AND size > 0
    ),
    levels AS
    (
        SELECT side, price, row.1 AS at, row.2 AS seq, row.3 AS standing,
            min(standing) OVER (PARTITION BY side, price) > 0 AS always
        FROM (SELECT *, max(is_change) OVER (PARTITION BY side, price) AS changes FROM rows)
        WHERE is_change = changes
    ),
    ranked AS
    (
        SELECT side, price, at, seq, standing, dense_rank() OVER (ORDER BY at) AS instant
        FROM (SELECT *, maxIf(price, always) OVER (PARTITION BY side) AS floor FROM levels)
        WHERE price >= floor
    ),
    runs AS
    (
        SELECT side, price, at, instant, standing,
            leadInFrame(instant, 1, last + 1) OVER
            (
                PARTITION BY side, price ORDER BY instant, seq
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
    (
        SELECT uniqExact(conn_id, sid, seq)
        FROM orderbook_events
        WHERE market_ticker = {ticker:String} AND ingest_ts >= begun AND ingest_ts <= ended
    ) AS frames
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
