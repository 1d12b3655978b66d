-- Bytes and rows of the hot tables on disk, without parts that merges have replaced, which are deleted in minutes.
SELECT table, sum(bytes_on_disk) AS bytes, sum(rows) AS rows
FROM system.parts
WHERE database = currentDatabase() AND active AND has({tables:Array(String)}, table)
GROUP BY table
ORDER BY table
