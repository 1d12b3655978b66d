"""Dagster's code server, which ends when it is asked to: `python -m kalshi_platform.orchestration.host.code_server`.

Dagster's own, asked alone (SIGTERM to that one process), waits until its runs have ended, which a
streamer's never does, and starts no other meanwhile: a streamer that then ends would not come back.
Here the runs that go on are asked to end as well. The arguments are `dagster`'s: `api grpc …`.

Runs' processes start as `run_processes.py` says. And Dagster's own takes `.env` of the current folder into its
environment, once; here the settings of the platform stay in `.env`, where each look at them finds what is new.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from dagster._cli import main as dagster
from dagster._grpc import server
from dagster._grpc.server import DagsterApiServer

from kalshi_platform import settings
from kalshi_platform.errors import SettingsError
from kalshi_platform.health import planned_stop
from kalshi_platform.orchestration.host import run_processes

GRACE_S = 10.0
"""For the runs that were asked together with the server, as `up` and `tini -g` do: a second signal
would break their flush off."""


class CodeServer(DagsterApiServer):
    """Dagster's, with another way to start the process of a run, and with the environment that it was given."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        given = dict(os.environ)
        super().__init__(*arguments, **options)
        restore_settings(given)
        self._mp_ctx = run_processes.prepare()  # type: ignore[assignment]


def restore_settings(given: Mapping[str, str]) -> None:
    """Give the platform's settings in the environment the values that they had; what else Dagster has added stays."""
    for name in settings.variables(os.environ):
        if name in given:
            os.environ[name] = given[name]
        else:
            del os.environ[name]


def end_runs() -> None:
    """Ask the runs that are still there to end."""
    for run in multiprocessing.active_children():
        run.terminate()


def ask_to_end(number: int, frame: FrameType | None) -> None:
    """SIGINT, and what Dagster makes of SIGTERM: the server ends, and after a grace its runs."""
    planned_stop.asked_here.set()
    with contextlib.suppress(OSError, SettingsError):  # then its runs do not count as asked
        planned_stop.note(settings.load().data_dir)
    late = threading.Timer(GRACE_S, end_runs)
    late.daemon = True
    late.start()
    signal.default_int_handler(number, frame)


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    signal.signal(signal.SIGINT, ask_to_end)  # Dagster gives SIGTERM the same handler
    with contextlib.suppress(OSError, SettingsError):  # the first tick names the error
        planned_stop.begin(settings.load().data_dir)
    if "--socket" in sys.argv:
        run_processes.keep_socket_in(Path(sys.argv[sys.argv.index("--socket") + 1]).parent)
    vars(server)["DagsterApiServer"] = CodeServer  # no option names another class
    dagster()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
