-- The levels whose size differed from the exchange's book in a comparison, from `since` on, newest first.
SELECT
    ingest_ts,
    market_ticker,
    JSONExtractString(detail, 'side')   AS side,
    JSONExtractString(detail, 'price')  AS price,
    JSONExtractString(detail, 'ours')   AS ours,
    JSONExtractString(detail, 'theirs') AS theirs
FROM stream_events
WHERE kind = 'mismatch' AND ingest_ts > {since:DateTime64(6, 'UTC')}
    AND ingest_ts <= {until:DateTime64(6, 'UTC')}
ORDER BY ingest_ts DESC, market_ticker, side, price
