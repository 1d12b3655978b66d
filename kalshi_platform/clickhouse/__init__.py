"""ClickHouse: the client, migrations, clusters, retention and verified inserts."""
