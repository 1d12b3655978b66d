"""The code server ends when it alone is asked to, and so do its runs, which it forks from a prepared process."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from kalshi_platform.monitoring import planned_stop
from kalshi_platform.orchestration.code_server import CodeServer

SERVER = """
import multiprocessing, signal, sys, time
from kalshi_platform.orchestration import code_server


def run(ready):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as a run does, after its flush
    ready.set()
    time.sleep(600)


def dagster():
    # as `dagster api grpc` behaves: SIGTERM is SIGINT, and the end waits for the runs
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    worker = spawn.Process(target=run, args=[ready])
    worker.start()
    ready.wait()
    try:
        print("serving", flush=True)  # and the signal may come at once
        time.sleep(600)
    except KeyboardInterrupt:
        worker.join()
        print("the run ended with", worker.exitcode, flush=True)


if __name__ == "__main__":
    code_server.GRACE_S = 0.2
    code_server.dagster = dagster
    code_server.main()
"""


def test_a_code_server_that_is_asked_alone_asks_its_runs_and_ends(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    data = tmp_path / "data"
    with subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "KALSHI_DATA_DIR": str(data)},
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "serving\n"
            assert not planned_stop.planned(data, 0.0, time.time())
            server.send_signal(signal.SIGTERM)
            assert server.stdout.readline() == "the run ended with 0\n"
            assert server.wait(30) == 0
            assert planned_stop.planned(data, 0.0, time.time())
        finally:
            server.kill()


FORKED = """
import io, os, signal, sys, time
from multiprocessing import forkserver, get_context
from kalshi_platform.orchestration.code_server import RUN_MODULES


def run(said):
    loaded = "kalshi_platform.streamer" in sys.modules
    import polars
    polars.DataFrame({"a": range(100_000)}).group_by("a").len().write_parquet(io.BytesIO())
    said.put((loaded, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL))
    time.sleep(600)


if __name__ == "__main__":
    forkserver.set_forkserver_preload([RUN_MODULES])
    context = get_context("forkserver")
    said = context.Queue()
    runs = [context.Process(target=run, args=[said]) for _ in range(4)]
    for one in runs:
        one.start()
    print(*(said.get(timeout=60) for _ in runs))
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGTERM)  # with its whole session
    runs[0].terminate()
    runs[1].kill()
    for one in runs[:2]:
        one.join(30)
    print(*(one.exitcode for one in runs), flush=True)
    os._exit(0)  # and the others go on
"""


def test_runs_begin_with_their_modules_and_their_end_is_known(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(FORKED)
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as server:
        try:
            assert (
                server.stdout is not None
            )  # which the runs have, too: it does not end with the server
            assert server.stdout.readline() == f"{' '.join(['(True, True)'] * 4)}\n"
            assert server.stdout.readline() == "-15 -9 None None\n"
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def test_dagster_starts_runs_with_what_is_put_in_its_place() -> None:
    assert "self._mp_ctx.Process(" in inspect.getsource(CodeServer.StartRun)
