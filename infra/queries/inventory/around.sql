-- What happened around a finding: one row with what explains it best.
--
--   blocked, block_stage   of the market's newest decision up to the finding
--   last_action            the newest action up to `until`, with its request
--   last_reject            the newest response from `since` on that refused an order
--   actions, responses     how many between `since` and `until`
--   orphans                responses among them whose action nobody recorded
SELECT
    (
        SELECT (block_codes, block_stage, inv_convention, open_yes_bid_size + open_no_ask_size
                - open_yes_ask_size - open_no_bid_size)
        FROM mm_decisions
        WHERE market_ticker = {market_ticker:String} AND ts <= {at:DateTime64(3, 'UTC')}
            AND ts >= {since:DateTime64(3, 'UTC')}
        ORDER BY ts DESC, decision_id DESC
        LIMIT 1
    ) AS decision,
    (
        SELECT (action_type, side, api_side, size, price, request_json)
        FROM mm_order_actions
        WHERE market_ticker = {market_ticker:String}
            AND ts BETWEEN {since:DateTime64(3, 'UTC')} AND {until:DateTime64(3, 'UTC')}
        ORDER BY ts DESC, action_id DESC
        LIMIT 1
    ) AS last_action,
    (
        SELECT (reject_reason, client_order_id)
        FROM mm_order_responses
        WHERE market_ticker = {market_ticker:String} AND reject_reason != ''
            AND ts BETWEEN {since:DateTime64(3, 'UTC')} AND {until:DateTime64(3, 'UTC')}
        ORDER BY ts DESC, action_id DESC
        LIMIT 1
    ) AS last_reject,
    (
        SELECT count() FROM mm_order_actions
        WHERE market_ticker = {market_ticker:String}
            AND ts BETWEEN {since:DateTime64(3, 'UTC')} AND {until:DateTime64(3, 'UTC')}
    ) AS actions,
    (
        SELECT (count(), countIf(action_id NOT IN
            (
                SELECT action_id FROM mm_order_actions
                WHERE market_ticker = {market_ticker:String}
                    AND ts >= {since:DateTime64(3, 'UTC')} - toIntervalMinute(1)
                    AND ts <= {until:DateTime64(3, 'UTC')}
            )))
        FROM mm_order_responses
        WHERE market_ticker = {market_ticker:String}
            AND ts BETWEEN {since:DateTime64(3, 'UTC')} AND {until:DateTime64(3, 'UTC')}
    ) AS responses
