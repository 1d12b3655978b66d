"""The errors that a person can mend. Every one is a sentence: the thing, the value, the remedy.

    PlatformError
    ├── SettingsError          a setting is missing or does not make sense
    ├── ExchangeError          the exchange refused, or cannot be reached     (exchange/errors.py)
    ├── JournalError           the journal cannot be written, or is damaged   (journal/reader.py)
    └── StoreError             ClickHouse or the archive did not do what was asked
        ├── StoreUnavailable   transient: away, overloaded, starting; the load waits and tries again
        └── StoreRefused       permanent: wrong password, missing table, bad data; the load stops, loudly
            └── NothingRecorded    the archive has no file of an hour

The command line prints the sentence and exits 1; anything else is a bug and keeps its traceback.
"""


class PlatformError(Exception):
    """A failure that the person at the other end can mend; `str()` says how."""


class SettingsError(PlatformError):
    """A setting is missing or does not make sense; the sentence names the variable."""


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
