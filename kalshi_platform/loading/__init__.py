"""Loading: journal ranges are decoded, built into rows and written to the stores, exactly once.

Also rebuilding archived hours and restoring ClickHouse from the archive. Decoding belongs in `exchange`, the
stores' own mechanics in `clickhouse` and `archive`.
"""
