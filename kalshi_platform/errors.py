"""The errors that a person can mend. Every one is a sentence: the thing, the value, the remedy.

    PlatformError
    ├── SettingsError          a setting is missing or does not make sense
    ├── ExchangeError          the exchange refused, or cannot be reached     (exchange/errors.py)
    ├── JournalError           the journal cannot be written, or is damaged   (recording/journal.py)
    └── StoreError             ClickHouse or the archive refused              (storage/errors.py)

The command line prints the sentence and exits 1; anything else is a bug and keeps its traceback.
"""


class PlatformError(Exception):
    """A failure that the person at the other end can mend; `str()` says how."""


class SettingsError(PlatformError):
    """A setting is missing or does not make sense; the sentence names the variable."""
