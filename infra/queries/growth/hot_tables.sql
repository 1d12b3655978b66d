-- How much do the hot tables hold on the disk? What merges have replaced goes after minutes, and is left out.
SELECT table, sum(bytes_on_disk) AS bytes, sum(rows) AS rows
FROM system.parts
WHERE database = currentDatabase() AND active AND has({tables:Array(String)}, table)
GROUP BY table
ORDER BY table
