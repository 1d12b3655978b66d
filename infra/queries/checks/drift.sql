-- What drifted on the wire between `since` and `until`, the newest first: `what` was found of which `type` of message at
-- which `path`; `first_seen`, on how many `days` it was seen since, and one example.
SELECT
    JSONExtractString(detail, 'what')               AS what,
    JSONExtractString(detail, 'type')               AS type,
    JSONExtractString(detail, 'path')               AS path,
    min(ingest_ts)                                  AS first_seen,
    toInt64(uniqExact(toDate(ingest_ts)))           AS days,
    argMax(JSONExtractString(detail, 'found'), ingest_ts)   AS found,
    argMax(JSONExtractString(detail, 'example'), ingest_ts) AS example
FROM stream_events
WHERE kind = 'unknown_field' AND ingest_ts <= {until:DateTime64(6, 'UTC')}
GROUP BY what, type, path
HAVING max(ingest_ts) > {since:DateTime64(6, 'UTC')}
ORDER BY max(ingest_ts) DESC, what, type, path
LIMIT 1000
