"""kalshi_platform: records the Kalshi order book without loss, hot in ClickHouse, cold in Parquet.

`__all__` names the modules and packages that other programs may import; docs/reference.md describes them. Importing
this package loads none of them.
"""

__version__ = "0.2.0"

__all__ = [
    "__version__",
    "analytics",
    "archive",
    "engine",
    "exchange",
    "qa",
    "reading",
    "settings",
    "simulator",
]
