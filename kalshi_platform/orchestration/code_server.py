"""Dagster's code server, which ends when it is asked to: `python -m kalshi_platform.orchestration.code_server`.

Dagster's own, asked alone (SIGTERM to that one process), waits until its runs have ended, which a
streamer's never does, and starts no other meanwhile: a streamer that then ends would not come back.
Here the runs that go on are asked to end as well. The arguments are `dagster`'s: `api grpc …`.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from types import FrameType

from dagster._cli import main as dagster

GRACE_S = 10.0
"""For the runs that were asked together with the server, as `up` and `tini -g` do: a second signal
would break their flush off."""


def end_runs() -> None:
    """Ask the runs that are still there to end."""
    for run in multiprocessing.active_children():
        run.terminate()


def ask_to_end(number: int, frame: FrameType | None) -> None:
    """SIGINT, and what Dagster makes of SIGTERM: the server ends, and after a grace its runs."""
    late = threading.Timer(GRACE_S, end_runs)
    late.daemon = True
    late.start()
    signal.default_int_handler(number, frame)


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    signal.signal(signal.SIGINT, ask_to_end)  # Dagster gives SIGTERM the same handler
    dagster()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
