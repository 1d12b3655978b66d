-- The market maker's tables, as engines have written them before the inventory columns (010): what
-- was decided, what was asked of the exchange, what it answered, what was filled, what is held.
--
-- Numbers are Float64: engines already in use write that. IF NOT EXISTS leaves a table that an
-- engine has made itself as it is. No retention: these rows say where money went.
--
-- Order and partitions serve "this market, these minutes". non_replicated_deduplication_window
-- makes insert_deduplication_token work on a single server, so that a batch sent twice is stored
-- once. The deduplication of a cluster's tables has a window of its own.

CREATE TABLE IF NOT EXISTS mm_decisions
(
    ts                 DateTime64(3, 'UTC')   CODEC(Delta, ZSTD(3)),
    decision_id        UUID                   CODEC(ZSTD(3)),
    engine_instance_id LowCardinality(String) CODEC(ZSTD(3)),
    engine_version     LowCardinality(String) CODEC(ZSTD(3)),
    market_ticker      LowCardinality(String) CODEC(ZSTD(3)),
    bb_px              Float64                CODEC(ZSTD(3)) COMMENT 'best YES bid, dollars',
    ba_px              Float64                CODEC(ZSTD(3)) COMMENT 'best YES ask, dollars',
    mid                Float64                CODEC(ZSTD(3)),
    spread             Float64                CODEC(ZSTD(3)),
    fair               Float64                CODEC(ZSTD(3)),
    target_bid_px      Float64                CODEC(ZSTD(3)),
    target_ask_px      Float64                CODEC(ZSTD(3)),
    target_bid_sz      Float64                CODEC(ZSTD(3)) COMMENT 'contracts',
    target_ask_sz      Float64                CODEC(ZSTD(3)) COMMENT 'contracts',
    inv_before         Float64                CODEC(ZSTD(3)) COMMENT 'the filled position, never the last estimate',
    inv_after_est      Float64                CODEC(ZSTD(3)) COMMENT 'an estimate; nothing follows from it',
    params_json        String                 CODEC(ZSTD(3))
)
ENGINE = MergeTree
PARTITION BY toDate(ts)
ORDER BY (market_ticker, ts)
SETTINGS non_replicated_deduplication_window = 10000
COMMENT 'Every decision of the market maker, one row for each loop and market.';

CREATE TABLE IF NOT EXISTS mm_order_actions
(
    ts                         DateTime64(3, 'UTC')   CODEC(Delta, ZSTD(3)),
    action_id                  String                 CODEC(ZSTD(3)),
    decision_id                UUID                   CODEC(ZSTD(3)),
    engine_instance_id         LowCardinality(String) CODEC(ZSTD(3)),
    engine_version             LowCardinality(String) CODEC(ZSTD(3)),
    market_ticker              LowCardinality(String) CODEC(ZSTD(3)),
    client_order_id            String                 CODEC(ZSTD(3)),
    action_type                LowCardinality(String) CODEC(ZSTD(3)) COMMENT 'place, cancel or replace',
    side                       LowCardinality(String) CODEC(ZSTD(3)) COMMENT 'bid or ask',
    api_side                   LowCardinality(String) CODEC(ZSTD(3)) COMMENT 'yes or no: the contract that is bid for or offered',
    price                      Float64                CODEC(ZSTD(3)) COMMENT 'dollars, on the scale of api_side',
    price_cents                Float64                CODEC(ZSTD(3)),
    size                       Float64                CODEC(ZSTD(3)) COMMENT 'contracts',
    replace_of_client_order_id String                 CODEC(ZSTD(3)),
    request_json               String                 CODEC(ZSTD(3))
)
ENGINE = MergeTree
PARTITION BY toDate(ts)
ORDER BY (market_ticker, ts)
SETTINGS non_replicated_deduplication_window = 10000
COMMENT 'Every request that changes orders, at the moment it is sent.';

CREATE TABLE IF NOT EXISTS mm_order_responses
(
    ts                 DateTime64(3, 'UTC')   CODEC(Delta, ZSTD(3)),
    action_id          String                 CODEC(ZSTD(3)),
    engine_instance_id LowCardinality(String) CODEC(ZSTD(3)),
    engine_version     LowCardinality(String) CODEC(ZSTD(3)),
    market_ticker      LowCardinality(String) CODEC(ZSTD(3)),
    client_order_id    String                 CODEC(ZSTD(3)),
    status             LowCardinality(String) CODEC(ZSTD(3)),
    exchange_order_id  String                 CODEC(ZSTD(3)),
    reject_reason      LowCardinality(String) CODEC(ZSTD(3)),
    latency_ms         Float64                CODEC(ZSTD(3)),
    response_json      String                 CODEC(ZSTD(3))
)
ENGINE = MergeTree
PARTITION BY toDate(ts)
ORDER BY (market_ticker, ts)
SETTINGS non_replicated_deduplication_window = 10000
COMMENT 'What the exchange answered to each action.';

CREATE TABLE IF NOT EXISTS mm_fills
(
    ts                 DateTime64(3, 'UTC')   CODEC(Delta, ZSTD(3)),
    engine_instance_id LowCardinality(String) CODEC(ZSTD(3)),
    engine_version     LowCardinality(String) CODEC(ZSTD(3)),
    market_ticker      LowCardinality(String) CODEC(ZSTD(3)),
    exchange_order_id  String                 CODEC(ZSTD(3)),
    client_order_id    String                 CODEC(ZSTD(3)),
    side               LowCardinality(String) CODEC(ZSTD(3)) COMMENT 'yes adds to the position, no takes from it',
    price              Float64                CODEC(ZSTD(3)) COMMENT 'dollars, on the scale of side',
    price_cents        Float64                CODEC(ZSTD(3)),
    size               Float64                CODEC(ZSTD(3)) COMMENT 'contracts, always positive',
    fee                Float64                CODEC(ZSTD(3)) COMMENT 'dollars',
    decision_id        UUID                   CODEC(ZSTD(3)),
    fill_id            String                 CODEC(ZSTD(3)),
    raw_json           String                 CODEC(ZSTD(3))
)
ENGINE = MergeTree
PARTITION BY toDate(ts)
ORDER BY (market_ticker, ts)
SETTINGS non_replicated_deduplication_window = 10000
COMMENT 'Every fill of our orders that the engine knows of.';

CREATE TABLE IF NOT EXISTS mm_position_snapshots
(
    ts                 DateTime64(3, 'UTC')   CODEC(Delta, ZSTD(3)),
    engine_instance_id LowCardinality(String) CODEC(ZSTD(3)),
    engine_version     LowCardinality(String) CODEC(ZSTD(3)),
    market_ticker      LowCardinality(String) CODEC(ZSTD(3)),
    pos_filled         Float64                CODEC(ZSTD(3)) COMMENT 'contracts, YES positive, NO negative',
    avg_cost           Float64                CODEC(ZSTD(3)) COMMENT 'dollars for each contract held',
    source             LowCardinality(String) CODEC(ZSTD(3)) COMMENT 'which page of the exchange said so',
    raw_json           String                 CODEC(ZSTD(3))
)
ENGINE = MergeTree
PARTITION BY toDate(ts)
ORDER BY (market_ticker, ts)
SETTINGS non_replicated_deduplication_window = 10000
COMMENT 'What the exchange itself says that we hold.';
