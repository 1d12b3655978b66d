"""ClickHouse client and migrations, the embedded engine, the Parquet archive, the one schema."""
