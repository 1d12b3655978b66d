"""The code server ends when it alone is asked to, and so do its runs."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

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
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "serving\n"
            server.send_signal(signal.SIGTERM)
            assert server.stdout.readline() == "the run ended with 0\n"
            assert server.wait(30) == 0
        finally:
            server.kill()
