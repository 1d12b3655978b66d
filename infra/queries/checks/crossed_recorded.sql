-- The states of the best prices, from `since` to `until`, of every market that was ever crossed while synced, in
-- the order of each market's changes. Read from `spreads`, which has an hour once it is computed.
SELECT
    toString(market_ticker) AS market_ticker, toString(conn_id) AS conn_id, sid, seq, ts, ingest_ts,
    verified, yes_bid, yes_ask
FROM spreads
WHERE ingest_ts >= {since:DateTime64(6, 'UTC')} AND ingest_ts < {until:DateTime64(6, 'UTC')}
    AND market_ticker IN
    (
        SELECT market_ticker
        FROM spreads
        WHERE ingest_ts >= {since:DateTime64(6, 'UTC')} AND ingest_ts < {until:DateTime64(6, 'UTC')}
            AND verified AND spread <= 0
    )
ORDER BY
    market_ticker, toStartOfHour(ingest_ts), shard NULLS FIRST, record NULLS FIRST,
    if(isNull(record), ingest_ts, NULL), seq
