"""What can go wrong with a store.

StoreError
├── StoreUnavailable   transient: away, overloaded, starting; the load waits and tries again
└── StoreRefused       permanent: wrong password, missing table, bad data; the load stops, loudly
    └── NothingRecorded    the archive has no file of an hour
"""

from kalshi_platform.errors import PlatformError


class StoreError(PlatformError):
    """ClickHouse or the archive did not do what was asked."""

    code: int | None
    """ClickHouse's error code; None where the error is not ClickHouse's own."""
    name: str
    """ClickHouse's name of that code, such as TOO_MANY_PARTS; else empty."""

    def __init__(self, sentence: str, *, code: int | None = None, name: str = "") -> None:
        super().__init__(sentence)
        self.code = code
        self.name = name


class StoreUnavailable(StoreError):
    """Worth another try later."""


class StoreRefused(StoreError):
    """No retry will mend it."""


class NothingRecorded(StoreRefused):
    """There is nothing of the hour that was asked for."""
