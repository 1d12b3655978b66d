-- How many markets had a snapshot after a gap or a reconnect between `since` and `until`, and how many of those were
-- unchanged or changed by their clocks; the others had no clock to compare.
SELECT
    toInt64(sum(JSONExtractUInt(detail, 'markets')))   AS markets,
    toInt64(sum(JSONExtractUInt(detail, 'unchanged'))) AS unchanged,
    toInt64(sum(JSONExtractUInt(detail, 'changed')))   AS changed
FROM stream_events
WHERE kind = 'resynced' AND market_ticker = '' AND ingest_ts > {since:DateTime64(6, 'UTC')}
    AND ingest_ts <= {until:DateTime64(6, 'UTC')}
