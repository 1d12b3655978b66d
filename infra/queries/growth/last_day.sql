-- The number of order-book rows of the last day, and the seconds since the first of them.
SELECT count() AS rows, if(count() = 0, 0, dateDiff('second', min(ingest_ts), now64(6))) AS seconds
FROM orderbook_events
WHERE ingest_ts > now64(6) - toIntervalDay(1)
