"""What can go wrong with the simulator, told so that a person can mend it."""

from kalshi_platform.errors import PlatformError


class SimulatorError(PlatformError):
    """The simulator cannot start, or was asked for something that it does not have."""
