"""Errors of the simulator, as sentences with a remedy."""

from kalshi_platform.errors import PlatformError


class SimulatorError(PlatformError):
    """The simulator cannot start, or does not have what was requested."""
