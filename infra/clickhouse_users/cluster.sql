-- What the roles of roles.sql need besides on a cluster: CLUSTER for ON CLUSTER, REMOTE to make a Distributed
-- table (it also opens the table function remote(): leave it out on a single server). Keep users in Keeper
-- (infra/kubernetes/clickhouse.yaml), so that every host has them.

GRANT CLUSTER, REMOTE ON *.* TO kalshi_operator;
GRANT CLUSTER, REMOTE ON *.* TO kalshi_admin;
