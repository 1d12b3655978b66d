"""What can go wrong with a store.

StoreError
├── StoreUnavailable   transient: away, overloaded, starting; the load waits and tries again
└── StoreRefused       permanent: wrong password, missing table, bad data; the load stops, loudly
"""

from kalshi_platform.errors import PlatformError


class StoreError(PlatformError):
    """ClickHouse or the archive did not do what was asked."""


class StoreUnavailable(StoreError):
    """Worth another try later."""


class StoreRefused(StoreError):
    """No retry will mend it."""
