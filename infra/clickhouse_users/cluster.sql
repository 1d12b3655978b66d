-- Further rights of the roles of roles.sql on a cluster: CLUSTER for ON CLUSTER, REMOTE to create a Distributed
-- table (it also opens the table function remote(): leave it out on a single server). Keep users in Keeper
-- (infra/kubernetes/clickhouse.yaml), so that every host has them.

GRANT CLUSTER, REMOTE ON *.* TO kalshi_operator;
GRANT CLUSTER, REMOTE ON *.* TO kalshi_admin;

-- A writer that misses inserted rows on one replica waits for the other replicas (SYSTEM SYNC REPLICA) before it
-- sends the rows again.
GRANT CLUSTER ON *.* TO kalshi_writer;
GRANT SYSTEM SYNC REPLICA ON kalshi.* TO kalshi_writer;
