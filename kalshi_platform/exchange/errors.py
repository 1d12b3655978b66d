"""What can go wrong with the exchange, told so that a person knows what to do.

ExchangeError
├── CredentialsError     fatal: the key, its file or the clock; retrying cannot help
├── Unreachable          transient: no connection, time-out, 5xx
├── RateLimited          transient: 429
└── ProtocolError        the exchange answered something that we cannot read
"""

from kalshi_platform.errors import PlatformError


class ExchangeError(PlatformError):
    """The exchange refused, or cannot be reached."""


class CredentialsError(ExchangeError):
    """The key, its file or the clock is wrong; no retry will mend it."""


class Unreachable(ExchangeError):
    """No connection, a time-out, or a server error: worth another try later."""


class RateLimited(ExchangeError):
    """HTTP 429: slow down, then try again."""


class ProtocolError(ExchangeError):
    """An answer that cannot be read."""
