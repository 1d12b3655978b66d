-- The users, each with one role of roles.sql. The passwords are parameters: no file holds them.
--
--   clickhouse-client --param_reader="$R" --param_writer="$W" --param_operator="$O" --param_admin="$A" \
--       --queries-file infra/clickhouse_users/users.sql
--
-- To change a password: ALTER USER kalshi_reader IDENTIFIED BY '…'. To use a client certificate instead:
-- ALTER USER kalshi_writer IDENTIFIED WITH ssl_certificate CN 'kalshi-streamer'.

CREATE USER IF NOT EXISTS kalshi_reader IDENTIFIED WITH sha256_password BY {reader:String} DEFAULT ROLE kalshi_reader DEFAULT DATABASE kalshi;
CREATE USER IF NOT EXISTS kalshi_writer IDENTIFIED WITH sha256_password BY {writer:String} DEFAULT ROLE kalshi_writer DEFAULT DATABASE kalshi;
CREATE USER IF NOT EXISTS kalshi_operator IDENTIFIED WITH sha256_password BY {operator:String} DEFAULT ROLE kalshi_operator DEFAULT DATABASE kalshi;
CREATE USER IF NOT EXISTS kalshi_admin IDENTIFIED WITH sha256_password BY {admin:String} DEFAULT ROLE kalshi_admin;

GRANT kalshi_reader TO kalshi_reader;
GRANT kalshi_writer TO kalshi_writer;
GRANT kalshi_operator TO kalshi_operator;
GRANT kalshi_admin TO kalshi_admin;
