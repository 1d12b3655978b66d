"""The receive clock along the journal: when it enters a new hour and when it was set back.

Receive times only date rows and decide where book checkpoints are written. Order follows record numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from kalshi_platform.utc_hours import HOUR_NS, floor_hour, hour_start_ns, time_of_ns


@dataclass(frozen=True)
class ReceiveClock:
    """Receive times at one log offset, in ns since the epoch; 0 where no record precedes it."""

    last_ns: int = 0
    """Receive time of the preceding record."""
    newest_ns: int = 0
    """The latest receive time so far; later than `last_ns` where the clock was set back."""

    def checkpoint_time(self, recv_ns: int) -> datetime | None:
        """The time of the book checkpoint due before the next record, received at `recv_ns`; None if none is.

        Checkpoints are due where the recording enters another hour and where the receive clock was set
        back. So an hour can be read without its predecessor, and between two checkpoints receive times
        ascend with the record numbers. The time is the first instant of a new hour, else the record's own.
        """
        last_ns = self.last_ns or recv_ns
        if recv_ns >= last_ns and recv_ns // HOUR_NS == last_ns // HOUR_NS:
            return None
        at = time_of_ns(recv_ns)
        return floor_hour(at) if self.is_new_hour(at) else at

    def is_new_hour(self, at: datetime) -> bool:
        """Whether the hour of `at` is later than every hour that the clock has shown so far."""
        return hour_start_ns(floor_hour(at)) > self.newest_ns
