"""Dagster's code server, which ends when it is asked to: `python -m kalshi_platform.orchestration.code_server`.

Dagster's own, asked alone (SIGTERM to that one process), waits until its runs have ended, which a
streamer's never does, and starts no other meanwhile: a streamer that then ends would not come back.
Here the runs that go on are asked to end as well. The arguments are `dagster`'s: `api grpc …`.

A run's process is forked from one that has imported what runs need (`run_modules.py`). In a new interpreter, as
Dagster's own starts them, importing takes seconds, and a streamer that is replaced records nothing meanwhile.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from multiprocessing import forkserver
from types import FrameType
from typing import Any

from dagster._cli import main as dagster
from dagster._grpc import server
from dagster._grpc.server import DagsterApiServer

from kalshi_platform import settings
from kalshi_platform.errors import SettingsError
from kalshi_platform.monitoring import planned_stop

RUN_MODULES = "kalshi_platform.orchestration.run_modules"

GRACE_S = 10.0
"""For the runs that were asked together with the server, as `up` and `tini -g` do: a second signal
would break their flush off."""


class CodeServer(DagsterApiServer):
    """Dagster's, with another way to start the process of a run."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        forkserver.set_forkserver_preload([RUN_MODULES])
        try:
            forkserver.ensure_running()
        except OSError as error:  # its socket is in the folder for temporary files
            self._logger.warning("Runs start in new interpreters, seconds later: %s.", error)
        else:
            self._mp_ctx = multiprocessing.get_context("forkserver")  # type: ignore[assignment]


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
    with contextlib.suppress(OSError, SettingsError):  # told in full by whatever runs first
        planned_stop.begin(settings.load().data_dir)
    vars(server)["DagsterApiServer"] = CodeServer  # no option names another class
    dagster()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
