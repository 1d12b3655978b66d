-- What the roles of roles.sql need besides on a cluster: CLUSTER for ON CLUSTER, REMOTE to make a Distributed
-- table (it also opens the table function remote(): leave it out on a single server). Keep users in Keeper
-- (infra/kubernetes/clickhouse.yaml), so that every host has them.

GRANT CLUSTER, REMOTE ON *.* TO kalshi_operator;
GRANT CLUSTER, REMOTE ON *.* TO kalshi_admin;

-- Rows that a writer has inserted, and one replica does not show, are asked of the others before they are sent
-- again.
GRANT CLUSTER ON *.* TO kalshi_writer;
GRANT SYSTEM SYNC REPLICA ON kalshi.* TO kalshi_writer;
