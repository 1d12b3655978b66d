"""Former import path; what was here is in `archive`, `clickhouse` and `embedded_clickhouse`."""
