-- The time span of the hot recording, and its number of order-book events. Always one row; answered from the minima
-- and maxima of the parts, whatever the size. Without rows the times are 1970.
--
-- stream_events is written after orderbook_events and trades of the same journal range: up to its newest row all
-- three are complete (`whole_until`).
SELECT
    e.events             AS events,
    s.rows               AS stream_rows,
    if(e.events = 0, s.first, if(s.rows = 0, e.first, least(e.first, s.first))) AS first,
    s.last               AS whole_until,
    greatest(e.last, s.last) AS newest
FROM
(SELECT count() AS events, min(ingest_ts) AS first, max(ingest_ts) AS last FROM orderbook_events) AS e
CROSS JOIN
(SELECT count() AS rows, min(ingest_ts) AS first, max(ingest_ts) AS last FROM stream_events) AS s
