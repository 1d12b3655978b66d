"""Errors of the exchange's interfaces. Each message is a sentence with the value and the remedy.

ExchangeError
├── CredentialsError     fatal: the key, its file or the clock; retrying cannot help
├── Unreachable          transient: no connection, time-out, 5xx
├── RateLimited          transient: 429
└── ProtocolError        a response that cannot be read

Errors of the stores and of the platform at large are in `kalshi_platform.errors`.
"""

from kalshi_platform.errors import PlatformError


class ExchangeError(PlatformError):
    """The exchange refused a request or cannot be reached."""


class CredentialsError(ExchangeError):
    """The key, its file or the clock is wrong; retrying cannot help."""


class Unreachable(ExchangeError):
    """No connection, a time-out, or a server error: retry later."""


class RateLimited(ExchangeError):
    """HTTP 429: slow down, then try again."""


class ProtocolError(ExchangeError):
    """A response that cannot be read."""
