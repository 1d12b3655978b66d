"""The receive clock at a place in the journal, and where it enters an hour."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from kalshi_platform.utc_hours import HOUR_NS, floor_hour, hour_start_ns, time_of_ns


@dataclass(frozen=True)
class ReceiveClock:
    """Receive times at a place in the journal, in ns; 0: there are none before it."""

    last_ns: int = 0
    """That of the record before it."""
    newest_ns: int = 0
    """The newest before it. It is not the last one where the clock was set back."""

    def opens(self, recv_ns: int) -> datetime | None:
        """Where a record received at `recv_ns` comes next: the time at which the books before it are to be
        written down, or None.

        They are where the recording enters an hour, and where the receive clock was set back. So an hour
        needs no other hour's rows, and between two such places receive times ascend with the records. The
        time is the hour's first instant where the hour is new, else the record's own.
        """
        last_ns = self.last_ns or recv_ns
        if recv_ns >= last_ns and recv_ns // HOUR_NS == last_ns // HOUR_NS:
            return None
        at = time_of_ns(recv_ns)
        return floor_hour(at) if self.is_new(at) else at

    def is_new(self, at: datetime) -> bool:
        """Whether the hour of `at` is later than all hours that the clock has shown."""
        return hour_start_ns(floor_hour(at)) > self.newest_ns
