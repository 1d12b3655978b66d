"""The code server ends when it alone is asked to, and so do its runs, which it forks from a prepared process; what
becomes of them does not hang on that process, and `.env` is read as it is now."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import current_process
from multiprocessing.util import get_temp_dir
from pathlib import Path
from textwrap import dedent, indent

import pytest
from dagster._grpc import server

from kalshi_platform import settings
from kalshi_platform.health import planned_stop
from kalshi_platform.orchestration.host import code_server
from kalshi_platform.orchestration.host.code_server import CodeServer

SERVER = """
import multiprocessing, signal, sys, time
from kalshi_platform.orchestration.host import code_server


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


def test_a_code_server_stopped_alone_stops_its_runs(tmp_path: Path) -> None:
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


OURS = """
import io, logging, multiprocessing, os, signal, sys, threading, time
from multiprocessing import forkserver
from pathlib import Path

import psutil
from dagster._core.utils import FuturesAwareThreadPoolExecutor
from kalshi_platform.orchestration.host import run_processes
from kalshi_platform.orchestration.host.code_server import CodeServer
from kalshi_platform.orchestration.resources import KalshiResource


def server():
    return CodeServer(
        server_termination_event=threading.Event(),
        logger=logging.getLogger("code server"),
        server_threadpool_executor=FuturesAwareThreadPoolExecutor(max_workers=1),
        lazy_load_user_code=True,
    )


def run(said, until):
    loaded = "kalshi_platform.recorder.streamer" in sys.modules
    import polars
    polars.DataFrame({"a": range(100_000)}).group_by("a").len().write_parquet(io.BytesIO())
    said.put((loaded, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL))
    until.wait()


def shards(said, until):
    said.put(KalshiResource().settings().stream_shards)


def counted(said, until, _):
    with open("ran", "a") as file:
        file.write("once ")
    run(said, until)


def start(context, runs, target=run, *more):
    said, untils = context.Queue(), [context.Event() for _ in range(runs)]
    started = [context.Process(target=target, args=[said, until, *more]) for until in untils]
    for one in started:
        one.start()
    print(*(said.get(timeout=60) for _ in started), flush=True)
    return started, untils


def forking():
    return forkserver._forkserver._forkserver_pid


def kill_forking(number):
    os.kill(forking(), number)
    if number == signal.SIGKILL:
        os.waitid(os.P_PID, forking(), os.WEXITED | os.WNOWAIT)


def ended(pid):
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    return True


if __name__ == "__main__":
    context = server()._mp_ctx
"""


@contextmanager
def said_by(tmp_path: Path, scenario: str, **environment: str) -> Iterator[Callable[[], str]]:
    """Lines of a process with a code server of ours that does what the scenario says."""
    script = tmp_path / "server.py"
    script.write_text(OURS + indent(dedent(scenario), "    ") + "    os._exit(0)\n")
    (tmp_path / "home").mkdir()
    given = {name: os.environ[name] for name in os.environ if not settings.variables([name])}
    given |= {"KALSHI_HOME": str(tmp_path), "DAGSTER_HOME": str(tmp_path / "home")}
    with subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
        env=given | environment,
    ) as process:
        output = process.stdout
        assert output is not None  # which the runs have, too: it does not end with the server
        try:
            yield lambda: output.readline().rstrip("\n")
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_runs_begin_with_their_modules_and_their_end_is_known(tmp_path: Path) -> None:
    scenario = """
    runs, _ = start(context, 4)
    kill_forking(signal.SIGTERM)  # as its whole session is asked to end
    runs[0].terminate()
    runs[1].kill()
    for one in runs[:2]:
        one.join(30)
    print(*(one.exitcode for one in runs), flush=True)
    """
    with said_by(tmp_path, scenario) as line:
        assert line() == " ".join(["(True, True)"] * 4)
        assert line() == "-15 -9 None None"


def test_runs_survive_the_fork_server_and_their_end_is_seen(
    tmp_path: Path,
) -> None:
    scenario = """
    runs, untils = start(context, 3)
    kill_forking(signal.SIGKILL)
    runs[0].kill()
    runs[0].join(30)
    began = time.monotonic()
    runs[1].join(0.3)
    print(*(one.is_alive() for one in runs), time.monotonic() - began < 10, flush=True)
    more, _ = start(context, 1)  # which begins another that forks
    print(len(multiprocessing.active_children()), flush=True)
    for until in untils[1:]:
        until.set()
    for one in runs[1:]:
        one.join()
    print(*(one.is_alive() for one in [*runs, *more]), flush=True)
    """
    with said_by(tmp_path, scenario) as line:
        assert line() == " ".join(["(True, True)"] * 3)
        assert line() == "False True True True"
        assert line() == "(True, True)"
        assert line() == "3"
        assert line() == "False False False True"


@pytest.mark.parametrize("trouble", ["its socket is removed", "TMPDIR cannot be used"])
def test_a_run_starts_in_a_new_interpreter_if_fork_fails(tmp_path: Path, trouble: str) -> None:
    scenario = """
    if where := forkserver._forkserver._forkserver_address:
        os.unlink(where)
    runs, _ = start(context, 1)
    runs[0].terminate()
    runs[0].join(30)
    print(where is None, runs[0].exitcode, flush=True)
    """
    unusable = tmp_path / ("d" * 120)  # a socket's path may not be so long
    unusable.mkdir()
    removed = trouble == "its socket is removed"
    with said_by(tmp_path, scenario, **({} if removed else {"TMPDIR": str(unusable)})) as line:
        assert line() == "(False, True)"
        assert line() == f"{not removed} -15"


@pytest.mark.parametrize("goes_on", [False, True], ids=["is killed", "goes on at that moment"])
def test_a_run_starts_once_if_the_fork_server_is_stopped(tmp_path: Path, goes_on: bool) -> None:
    scenario = f"""
    start(context, 1)
    run_processes.LAUNCH_S, kill, stopped = 1.0, os.kill, forking()
    kill(stopped, signal.SIGSTOP)
    if {goes_on}:
        run_processes.os.kill = lambda pid, _: kill(pid, signal.SIGCONT)
    began = time.monotonic()
    start(context, 1, counted, b"")
    print(time.monotonic() - began >= 1.0, flush=True)
    if not {goes_on}:
        print(ended(stopped), flush=True)
    last, _ = start(context, 1)  # by the same process, or by another
    if {goes_on}:  # which has forked for the start that was given up, too: that one ends
        known = {{last[0].pid, *(each.pid for each in multiprocessing.active_children())}}
        while {{each.pid for each in psutil.Process(stopped).children()}} - known:
            time.sleep(0.05)
        print(forking() == stopped, flush=True)
    print(Path("ran").read_text(), flush=True)
    """
    with said_by(tmp_path, scenario) as line:
        assert line() == "(True, True)"
        assert line() == "(False, True)"
        assert [line() for _ in range(4)] == [
            "True",
            *(["True", "(True, True)"][:: -1 if goes_on else 1]),
            "once ",
        ]


def test_a_run_starts_once_if_the_fork_server_ends_before_the_fork(
    tmp_path: Path,
) -> None:
    scenario = """
    start(context, 1)
    kill_forking(signal.SIGSTOP)
    threading.Timer(0.5, kill_forking, [signal.SIGKILL]).start()
    start(context, 1, counted, b"")
    start(context, 1)
    print(Path("ran").read_text(), flush=True)
    """
    with said_by(tmp_path, scenario) as line:
        assert [line() for _ in range(3)] == ["(True, True)", "(False, True)", "(True, True)"]
        assert line() == "once "


ENDS_AFTER_FORKING = """
def report(_, pid):
    open("forked", "w").write(str(pid))
    os.kill(os.getpid(), signal.SIGKILL)

forkserver.write_signed = report
"""
FORKS_STOPPED = """
def serve(*_):
    open("forked", "w").write(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)
    return real(*_)

real, forkserver._serve_one = forkserver._serve_one, serve
"""


@pytest.mark.parametrize("trouble", [ENDS_AFTER_FORKING, FORKS_STOPPED], ids=["ends", "stopped"])
def test_a_forked_process_without_a_run_does_nothing(tmp_path: Path, trouble: str) -> None:
    (tmp_path / "troubled.py").write_text(
        f"import os, signal\nfrom multiprocessing import forkserver\n{trouble}"
    )
    scenario = """
    run_processes.LAUNCH_S = 1.0
    kill_forking(signal.SIGKILL)
    forkserver.set_forkserver_preload(["troubled"])
    start(context, 1, counted, bytes(1_000_000))  # more than a pipe holds
    forked = int(Path("forked").read_text())
    try:
        os.kill(forked, signal.SIGCONT)
    except ProcessLookupError:
        pass  # it has ended already
    print(ended(forked), Path("ran").read_text(), flush=True)
    """
    with said_by(tmp_path, scenario) as line:
        assert line() == "(False, True)"
        assert line() == "True once "


THREADS_THAT_WAIT = {"jemalloc_bg_thd", "polars-ooc-clea"}
"""Those of memory allocators, which begin with the import of a library, hold no lock while they wait, and are not
missed in a forked process."""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_process_that_forks_has_no_thread_that_works(tmp_path: Path) -> None:
    scenario = """
    start(context, 2)
    names = [each.read_text().strip() for each in Path(f"/proc/{forking()}/task").glob("*/comm")]
    print(*names, flush=True)
    """
    with said_by(tmp_path, scenario) as line:
        assert line() == "(True, True) (True, True)"
        names = line().split()
    others = [name for name in names if name not in THREADS_THAT_WAIT]
    assert len(others) == 1, (
        names
    )  # its own: none of the pools of Polars, Arrow, chDB, gRPC or BLAS


def test_a_change_of_env_reaches_a_running_code_server(
    tmp_path: Path,
) -> None:
    env = tmp_path / ".env"
    env.write_text("STREAM_SHARDS=1\nKALSHI_DATA_DIR=elsewhere\nOF_DAGSTER=kept\n")
    scenario = """
    print(KalshiResource().settings().stream_shards, os.environ["OF_DAGSTER"], os.environ["KALSHI_DATA_DIR"], flush=True)
    Path(".env").write_text("STREAM_SHARDS=3\\n")
    print(KalshiResource().settings().stream_shards, flush=True)
    start(context, 1, shards)
    os.unlink(forkserver._forkserver._forkserver_address)
    start(context, 1, shards)
    """
    with said_by(tmp_path, scenario, KALSHI_DATA_DIR="given") as line:
        assert line() == "1 kept given"
        assert [line() for _ in range(3)] == ["3", "3", "3"]


def test_the_fork_servers_socket_is_beside_the_code_servers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KALSHI_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(current_process(), "_config", {})
    monkeypatch.setattr(sys, "argv", ["code_server", "--socket", str(tmp_path / "code.sock")])
    monkeypatch.setattr(code_server, "dagster", lambda: None)
    monkeypatch.setattr(server, "DagsterApiServer", None)
    former = signal.getsignal(signal.SIGINT)
    try:
        code_server.main()
        assert get_temp_dir() == str(tmp_path)
    finally:
        signal.signal(signal.SIGINT, former)


def test_dagster_starts_runs_with_what_is_put_in_its_place() -> None:
    assert "self._mp_ctx.Process(" in inspect.getsource(CodeServer.StartRun)
