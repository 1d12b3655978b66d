"""Dagster's code server with a bounded shutdown: `python -m kalshi_platform.orchestration.host.code_server`.

The arguments are `dagster`'s: `api grpc …`. It differs from Dagster's in three ways:

- On SIGTERM it also stops its runs. Dagster's waits until they have ended, which a streamer's run never does, and
  starts no other meanwhile, so a streamer that then ends would not be replaced.
- Run processes are forked as `run_processes.py` describes.
- Dagster's loads `.env` of the current folder into the environment once. Here the platform's settings are removed
  from the environment again, so that each load of the settings sees changes of `.env`.
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
from kalshi_platform.orchestration.host import migration_scripts, run_processes

GRACE_S = 10.0
"""Seconds before runs receive a signal: `up` and `tini -g` signal runs and server together, and a second signal would
interrupt the runs' flush."""


class CodeServer(DagsterApiServer):
    """Dagster's server with forked run processes and its original environment."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        given = dict(os.environ)
        super().__init__(*arguments, **options)
        restore_settings(given)
        self._mp_ctx = run_processes.prepare()  # type: ignore[assignment]


def restore_settings(given: Mapping[str, str]) -> None:
    """Restore the platform's settings in the environment to `given`; other variables that Dagster added stay."""
    for name in settings.variables(os.environ):
        if name in given:
            os.environ[name] = given[name]
        else:
            del os.environ[name]


def end_runs() -> None:
    """Send SIGTERM to the remaining runs."""
    for run in multiprocessing.active_children():
        run.terminate()


def ask_to_end(number: int, frame: FrameType | None) -> None:
    """Signal handler of SIGINT and SIGTERM: end the server, and after GRACE_S its runs."""
    planned_stop.asked_here.set()
    with contextlib.suppress(OSError, SettingsError):
        # then its runs are reported as interrupted without a plan
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
    migration_scripts.keep()
    vars(server)["DagsterApiServer"] = CodeServer  # no option names another class
    dagster()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
