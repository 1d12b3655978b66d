"""The errors that an operator can repair. Each is a sentence: the thing, the value, the remedy.

    PlatformError
    ├── SettingsError          a setting is missing or does not make sense
    ├── ExchangeError          the exchange refused, or cannot be reached     (exchange/errors.py)
    ├── RequestRefused         a request to the reader names something that is not there (reading/)
    │   └── NotCovered         the book of the span was not recorded, or was stale
    ├── JournalError           the journal cannot be written, or is damaged   (journal/reader.py)
    └── StoreError             ClickHouse or the archive did not do what was asked
        ├── StoreUnavailable   transient: down, overloaded, starting; the loader retries with back-off
        │   └── StoreGone          not mounted, or another one: a person brings it back, then a retry succeeds
        └── StoreRefused       permanent: wrong password, missing table, bad data; the loader stops
            └── NothingRecorded    the archive has no file of an hour

The command line prints the sentence and exits 1; any other exception is a bug and keeps its traceback.
"""


class PlatformError(Exception):
    """A failure that an operator can repair; `str()` says how."""


class SettingsError(PlatformError):
    """A setting is missing or invalid; the sentence names the variable."""


class RequestRefused(PlatformError, ValueError):
    """A request to the reader with a wrong argument; the sentence names the value and the remedy."""


class NotCovered(RequestRefused):
    """A request for a span in which a market's book was not recorded, or was stale."""


class StoreError(PlatformError):
    """ClickHouse or the archive did not do what was asked."""

    code: int | None
    """ClickHouse's error code; None if ClickHouse did not raise the error."""
    name: str
    """ClickHouse's name of that code, such as TOO_MANY_PARTS, or empty."""

    def __init__(self, sentence: str, *, code: int | None = None, name: str = "") -> None:
        super().__init__(sentence)
        self.code = code
        self.name = name


class StoreUnavailable(StoreError):
    """A transient failure: a retry may succeed."""


class StoreGone(StoreUnavailable):
    """The store is not there, or another one is: it returns if a person brings it back."""


class StoreRefused(StoreError):
    """A permanent failure: a retry cannot succeed before a person acts."""


class NothingRecorded(StoreRefused):
    """The archive holds no rows of the requested hour."""


def needs_person(error: BaseException | None) -> bool:
    """Whether no retry succeeds before a person acts."""
    return isinstance(error, StoreRefused | StoreGone)
