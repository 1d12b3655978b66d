-- How many order-book rows came in the last day, and of how many seconds of it are there any?
SELECT count() AS rows, if(count() = 0, 0, dateDiff('second', min(ingest_ts), now64(6))) AS seconds
FROM orderbook_events
WHERE ingest_ts > now64(6) - toIntervalDay(1)
