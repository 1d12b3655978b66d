"""kalshi_platform: records the Kalshi order book without loss, hot in ClickHouse, cold in Parquet."""

__version__ = "0.1.0"
