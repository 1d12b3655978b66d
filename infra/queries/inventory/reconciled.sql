-- Do the recorded fills account for a snapshot? For the snapshot of a market at `snapshot_ts`:
--
--   filled_after     signed fills after it, up to the decision at `at`
--   before_pos       the snapshot before it; before_ts is 1970 where there is none
--   filled_between   signed fills between the two
--
-- A fill is counted once however often it was recorded; yes adds, no takes away.
WITH
    (
        SELECT (max(ts), argMax(pos_filled, (ts, source, engine_instance_id, pos_filled)))
        FROM mm_position_snapshots
        WHERE market_ticker = {market_ticker:String} AND ts < {snapshot_ts:DateTime64(3, 'UTC')}
    ) AS before
SELECT
    sumIf(signed, ts > {snapshot_ts:DateTime64(3, 'UTC')}) AS filled_after,
    before.1 AS before_ts,
    before.2 AS before_pos,
    sumIf(signed, ts <= {snapshot_ts:DateTime64(3, 'UTC')}) AS filled_between
FROM
(
    SELECT min(ts) AS ts, any(if(side = 'yes', size, -size)) AS signed
    FROM mm_fills
    WHERE market_ticker = {market_ticker:String}
        AND mm_fills.ts > before.1 AND mm_fills.ts <= {at:DateTime64(3, 'UTC')}
    GROUP BY if(fill_id = '', toString(tuple(mm_fills.ts, exchange_order_id, size)), fill_id)
)
