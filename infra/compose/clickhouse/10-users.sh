#!/bin/bash
# Creates the roles and users of infra/clickhouse_users. The image runs it on its first start; run it again after
# an upgrade: docker compose exec clickhouse /docker-entrypoint-initdb.d/10-users.sh
set -euo pipefail
client() {
    clickhouse-client --user "$CLICKHOUSE_USER" --password "$CLICKHOUSE_PASSWORD" "$@"
}
client --queries-file /opt/clickhouse_users/roles.sql
client \
    --param_reader="$KALSHI_READER_PASSWORD" --param_writer="$KALSHI_WRITER_PASSWORD" \
    --param_operator="$KALSHI_OPERATOR_PASSWORD" --param_admin="$KALSHI_ADMIN_PASSWORD" \
    --queries-file /opt/clickhouse_users/users.sql
