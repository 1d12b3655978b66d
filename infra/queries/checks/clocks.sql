-- What the exchange's clocks showed between `since` and `until`: each clock that fell, newest first (`of`: the type of
-- its frame, `after`: the clock before it).
SELECT
    ingest_ts,
    market_ticker,
    JSONExtractString(detail, 'of')  AS of,
    JSONExtractUInt(detail, 'after') AS after,
    JSONExtractUInt(detail, 'clock') AS clock,
    shard,
    record
FROM stream_events
WHERE kind = 'clock_fell' AND ingest_ts > {since:DateTime64(6, 'UTC')}
    AND ingest_ts <= {until:DateTime64(6, 'UTC')}
ORDER BY ingest_ts DESC, market_ticker, record
LIMIT 1000
