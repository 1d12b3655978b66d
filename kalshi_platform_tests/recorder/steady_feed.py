"""A steady feed into a journal, and the age of records before they are durable. Also a program: FOLDER."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from kalshi_platform.journal.writer import Writer

TICKS, PER_TICK, TICK_S = 300, 50, 0.005
RECORDS = TICKS * PER_TICK
"""10,000 frames per second."""


def oldest_ms(writer: Writer) -> int:
    """Append the frames and wait until they are durable; return the greatest age that the writer reported."""
    oldest, began = 0, time.monotonic()
    for tick in range(TICKS):
        frames = [b"%0120d" % n for n in range(PER_TICK)]
        writer.extend(time.time_ns(), bytes(16), [1] * PER_TICK, frames)
        writer.submit()
        while time.monotonic() < began + tick * TICK_S:
            time.sleep(0.001)
            oldest = max(oldest, writer.oldest_undurable_ms)
    while age := writer.oldest_undurable_ms:
        oldest = max(oldest, age)
        time.sleep(0.001)
    return oldest


if __name__ == "__main__":
    journal = Writer(Path(sys.argv[1]))
    sys.stdout.write(f"{oldest_ms(journal)}\n")
    journal.close()
