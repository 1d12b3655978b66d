"""docs/operations.md: its blocks of commands are run as they stand, from what is wrong to what is right again.

They share one project folder with a recorded data folder, whose hours are the page's. A block that no test
here runs fails `test_every_block_is_run`; a line that is not run is in `NOT_RUN`, with the reason.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse.client import connect
from kalshi_platform.commands.main import main
from kalshi_platform.quality import tally_journal
from kalshi_platform.recorder.streamer import Health, Streamer
from kalshi_platform.settings import Settings
from kalshi_platform_tests.ports import answers, free_ports
from kalshi_platform_tests.simulator_fixtures import StartSimulator
from kalshi_platform_tests.upgrade.test_older_folders import unpacked

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
BLOCKS = [
    (m[1], m[2].strip().splitlines())
    for m in re.finditer(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
]
EXITS = re.compile(r"# exits (\d)")
HOUR = "2026-11-28-10"
OF_HOUR = "toStartOfHour(ingest_ts) = toDateTime('2026-11-28 10:00:00', 'UTC')"
PATIENCE_S = 180.0
NOT_RUN = {
    "make run": "installs, and starts everything: test_moved_folder.py and commands/test_up.py do",
}


def block(begins: str) -> list[str]:
    """The block whose first line begins with this text."""
    (found,) = [lines for _, lines in BLOCKS if lines[0].startswith(begins)]
    return found


def wait_for(condition: Callable[[], object], describe: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.05)


class Project:
    """A project's folder in which the page's commands are run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.simulator_port = free_ports(2)
        self.jobs: list[subprocess.Popen[bytes]] = []
        self._clickhouse: subprocess.Popen[bytes] | None = None
        self.has_recorded = False
        unpacked("b5ce1cc", folder / "data")
        (folder / ".env").write_text(
            f"EMBEDDED_CLICKHOUSE_PORT={self.port}\nSIMULATOR_PORT={self.simulator_port}\n"
            "HOT_RETENTION_DAYS=36500\nJOURNAL_RETENTION_HOURS=1000000\n"
        )
        for name in ("elsewhere", "backup"):
            (folder / name).mkdir()

    @property
    def settings(self) -> Settings:
        return platform_settings.load()

    def run(self, lines: list[str]) -> str:
        """Run the lines, each of which must end as the page says; returns their output."""
        if any(line.startswith("kalshi-platform clickhouse &") for line in lines):
            self.end_clickhouse()
        return "".join(self._line(line) for line in lines if line not in NOT_RUN)

    def _line(self, line: str) -> str:
        wanted = int(exits[1]) if (exits := EXITS.search(line)) else 0
        text = line.replace("/elsewhere", str(self.folder / "elsewhere"))
        text = text.replace("/backup/", f"{self.folder}/backup/")
        words = shlex.split(text, comments=True)
        if words[-1] == "&":
            self.begin(words[:-1])
            return ""
        if words == ["kill", "%1"]:
            self.end()
            return ""
        given = [word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word)]
        words = words[len(given) :]
        if words[0] == "kalshi-platform":
            status, output = command(words[1:], dict(given))
        else:
            done = subprocess.run(
                words, cwd=self.folder, capture_output=True, text=True, check=False
            )
            status, output = done.returncode, done.stdout + done.stderr
        assert status == wanted, f"{line}\n{output}"
        return output

    def begin(self, words: list[str]) -> None:
        """Start a program in the background; waits for ClickHouse and the simulator."""
        given = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
        argv = [str(Path(sys.prefix) / "bin" / words[len(given)]), *words[len(given) + 1 :]]
        self.jobs.append(subprocess.Popen(argv, cwd=self.folder, env={**os.environ, **given}))
        ports = {"clickhouse": self.port, "simulate": self.simulator_port}
        if (port := ports.get(argv[1])) is not None:
            wait_for(lambda: answers(port), lambda: f"{words} does not answer")

    def end(self) -> None:
        """Stop the first background program gracefully."""
        job = self.jobs.pop(0)
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) == 0

    def clickhouse(self) -> None:
        """Ensure that the embedded ClickHouse runs, as under `up`; a block that starts one stops it first."""
        if self._clickhouse is None:
            self.begin(["kalshi-platform", "clickhouse"])
            self._clickhouse = self.jobs.pop()

    def end_clickhouse(self) -> None:
        """Stop it gracefully if it runs."""
        if self._clickhouse is not None:
            self._clickhouse.send_signal(signal.SIGTERM)
            assert self._clickhouse.wait(60) == 0
            self._clickhouse = None

    def restart_clickhouse(self) -> None:
        """Restart from disk, so that later reads see only what was stored."""
        self.end_clickhouse()
        self.clickhouse()

    def kill(self) -> None:
        """End all processes of the project."""
        for job in [*self.jobs, *([self._clickhouse] if self._clickhouse else [])]:
            job.kill()
            job.wait()

    def sql(self, *statements: str) -> None:
        with closing(connect(self.settings)) as client:
            for statement in statements:
                client.command(statement)

    @contextmanager
    def recording(self, data: Path | None = None) -> Iterator[Streamer]:
        """Context manager: a running recorder of the simulator, in this process."""
        settings = platform_settings.load(**({"kalshi_data_dir": data} if data else {}))
        streamer = Streamer(settings)
        streamer.start()
        try:
            wait_for(lambda: streamer.health().frames > 20, streamer.health)
            yield streamer
        finally:
            streamer.stop(30.0)


def command(argv: list[str], env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run the platform's commands in this process, since starting Python is slow."""
    platform_settings.current.cache_clear()
    done = CliRunner(env=env).invoke(main, argv)
    platform_settings.current.cache_clear()
    return done.exit_code, f"{done.output}{done.exception or ''}"


def troubles(health: Health) -> dict[str, str]:
    return {name: str(store.trouble) for name, store in health.stores.items() if store.trouble}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The project of this module; each test leaves it intact."""
    folder = tmp_path_factory.mktemp("project")
    project = Project(folder)
    yield project
    project.kill()


@pytest.fixture
def project(
    made: Project, monkeypatch: pytest.MonkeyPatch, start_simulator: StartSimulator
) -> Project:
    """Make it the current folder and start its exchange."""
    monkeypatch.chdir(made.folder)
    simulator = start_simulator(port=made.simulator_port, markets=4, rate=50.0)
    key = made.folder / "data" / "simulator" / "key.pem"
    key.parent.mkdir(exist_ok=True)
    shutil.copy(simulator.key_file, key)
    if not made.has_recorded:  # here: its stores were elsewhere before
        made.clickhouse()
        assert command(["migrate"])[0] == 0  # its tables are of an earlier version
        with made.recording() as streamer:
            wait_for(lambda: caught_up(streamer), streamer.health)
        made.has_recorded = True
    return made


def whole(project: Project, *argv: str) -> bool:
    status, output = command(["proof", *argv])
    assert status in {0, 2}, output
    return status == 0


# -- restore -----------------------------------------------------------------------------------


def test_rows_that_clickhouse_lost_are_restored_while_it_records(project: Project) -> None:
    project.clickhouse()
    with project.recording():
        project.sql(f"DELETE FROM orderbook_events WHERE {OF_HOUR} AND seq > 60")
        project.run(block("kalshi-platform proof --hours"))
    project.restart_clickhouse()
    assert whole(project)


def test_doubled_rows_are_replaced(project: Project) -> None:
    project.clickhouse()
    project.sql(
        f"INSERT INTO orderbook_events SELECT * FROM orderbook_events WHERE {OF_HOUR}"
        " SETTINGS insert_deduplicate = 0"
    )
    status, output = command(["proof", "--hours", HOUR])
    assert status == 2
    assert "doubled" in output
    output = project.run(block(f"kalshi-platform restore --hours {HOUR}  "))
    assert f"restore --hours {HOUR} --replace" in output
    assert whole(project)


def test_a_lost_clickhouse_is_restored_from_the_archive(project: Project) -> None:
    output = project.run(block("mv data/clickhouse /elsewhere"))
    assert "Whole: " in output
    project.clickhouse()
    with project.recording() as streamer:
        wait_for(lambda: caught_up(streamer), streamer.health)
    assert whole(project)


def caught_up(streamer: Streamer) -> bool:
    health = streamer.health()
    return not troubles(health) and all(store.committed_ns for store in health.stores.values())


def test_an_empty_database_is_filled_and_loading_goes_on(project: Project) -> None:
    project.clickhouse()
    project.sql("DROP DATABASE kalshi SYNC")
    assert command(["migrate"])[0] == 0  # as `up` does
    with project.recording() as streamer:
        wait_for(lambda: "clickhouse" in troubles(streamer.health()), streamer.health)
        assert "does not hold what was loaded there" in troubles(streamer.health())["clickhouse"]
    lines = block("kalshi-platform clickhouse &")
    assert "Whole: " in project.run(lines)
    project.clickhouse()
    with project.recording() as streamer:
        wait_for(lambda: caught_up(streamer), streamer.health)
    project.restart_clickhouse()
    assert whole(project)


def test_a_copy_becomes_a_recorder_of_its_own(project: Project) -> None:
    project.run(block("cp -a data copy"))
    copy = project.folder / "copy"
    project.clickhouse()
    with project.recording() as original, project.recording(copy) as second:
        for streamer in (original, second):
            wait_for(lambda it=streamer: caught_up(it), streamer.health)  # type: ignore[misc]
    # as the page says: the copy's rows are in ClickHouse, and in its own archive
    assert not whole(project)
    first, other = (
        tally_journal.connections(data / "journal" / "shard-0", 0)
        for data in (project.folder / "data", copy)
    )
    theirs = ", ".join(f"'{conn}'" for conn in other - first)
    tables = ("orderbook_events", "trades", "stream_events", "book_checkpoints")
    project.sql(*(f"DELETE FROM {table} WHERE conn_id IN ({theirs})" for table in tables))
    project.restart_clickhouse()
    assert whole(project)
    shutil.rmtree(copy)


# -- upgrade -----------------------------------------------------------------------------------


def test_a_migration_that_did_not_end_runs_again(project: Project) -> None:
    project.clickhouse()
    project.sql(
        "INSERT INTO schema_migrations SELECT version, name, '', now64(3)"
        " FROM schema_migrations FINAL WHERE version = 21"
    )
    output = project.run(block("kalshi-platform migrate --status"))
    assert output.count("021_record_order  begun, not ended") == 1
    assert "applied 021_record_order" in output
    assert output.count("021_record_order  applied") == 1


def test_a_changed_migration_is_accepted_after_a_comparison(
    project: Project,
) -> None:
    project.clickhouse()
    project.sql(
        "INSERT INTO schema_migrations SELECT version, name, 'of another file', now64(3)"
        " FROM schema_migrations FINAL WHERE version = 1"
    )
    status, output = command(["migrate"])
    assert status == 1
    assert "migrate --accept-changed" in output
    project.run(block("kalshi-platform migrate --accept-changed"))
    assert command(["migrate"])[0] == 0


# -- two faults at once ------------------------------------------------------------------------


def test_both_stores_resume_after_an_outage(project: Project) -> None:
    project.end_clickhouse()
    shutil.move(project.folder / "data" / "parquet", project.folder / "elsewhere" / "parquet")
    with project.recording() as streamer:
        wait_for(lambda: len(troubles(streamer.health())) == 2, streamer.health)
        output = project.run(block("kalshi-platform proof                # exits 1"))
        assert "cannot be reached" in output
        assert "The archive in" in output
        assert "is gone: there is no archive.json in it" in output
        wait_for(lambda: caught_up(streamer), streamer.health)
    assert whole(project)
    project.end()


# -- other blocks ------------------------------------------------------------------------------


def test_a_backup_of_the_archive_follows_it(project: Project) -> None:
    lines = block("rsync -a --delete")
    if shutil.which("rsync") is None:
        pytest.skip("there is no rsync here")
    project.run(lines)
    files = [
        sorted(str(path.relative_to(root)) for path in root.rglob("*"))
        for root in (project.folder / "data" / "parquet", project.folder / "backup" / "parquet")
    ]
    assert files[0] == files[1]


def test_the_documented_object_storage_settings_exist() -> None:
    names = {line.partition("=")[0] for line in block("PARQUET_DIR=s3://")}
    assert names <= {name.upper() for name in Settings.model_fields}


def test_the_query_of_slow_queries_runs(clickhouse_url: str, clickhouse_database: str) -> None:
    """The embedded engine has no query log; this creates a table with those columns."""
    sql = "\n".join(block("SELECT"))
    assert "FROM system.query_log" in sql
    settings = platform_settings.load(
        _env_file=None, clickhouse_url=clickhouse_url, clickhouse_database=clickhouse_database
    )
    with closing(connect(settings)) as client:
        client.command(
            "CREATE TABLE query_log (log_comment String, query_duration_ms UInt64, memory_usage UInt64,"
            " type String, event_date Date) ENGINE = Memory"
        )
        client.command(
            "INSERT INTO query_log VALUES"
            """ ('{"job": "j", "run_id": "r", "partition": "h"}', 7, 9, 'QueryFinish', today()),"""
            " ('no JSON', 8, 9, 'QueryFinish', today())"
        )
        rows = client.query(sql.replace("system.query_log", "query_log")).result_rows
    assert rows == [("j", "r", "h", 1, 7, 9)]


def test_shards_are_measured_and_drained(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    (data / "simulator").mkdir(parents=True)
    shutil.copy(project.folder / "data" / "simulator" / "key.pem", data / "simulator")
    monkeypatch.setenv("KALSHI_DATA_DIR", str(data))
    monkeypatch.setenv("USE_CLICKHOUSE", "0")
    start, measure = block("STREAM_SHARDS=2 kalshi-platform stream &")
    pause, ps = measure.split("; ")
    assert pause == "sleep 40"  # for figures; here until both record
    project.run([start])
    reports = [data / "journal" / f"shard-{k}" / "health.json" for k in (0, 1)]
    wait_for(lambda: all(is_streaming(path) for path in reports), lambda: reports)
    output = subprocess.run(["bash", "-c", ps], capture_output=True, text=True, check=True).stdout
    assert len([line for line in output.splitlines() if "--shard" in line]) >= 2
    project.end()
    every, one = (shlex.split(line, comments=True) for line in block("kalshi-platform stream  "))
    project.begin(every)
    wait_for(lambda: is_streaming(reports[0]), lambda: reports)
    project.end()
    assert command(one[1:])[0] == 0  # shard 1 is no longer configured: drained


def is_streaming(report: Path) -> bool:
    return report.is_file() and '"state":"streaming"' in report.read_text()


# -- the page as a whole -----------------------------------------------------------------------


def test_commands_within_the_text_are_commands() -> None:
    """Check their names and options; those in a procedure are also run."""
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", PAGE, flags=re.M | re.S))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    seen = 0
    for text in inline:
        words = shlex.split(text) if text.count("'") % 2 == 0 else text.split()
        if words[:1] == ["kalshi-platform"]:
            parsed(words[1:])
        elif words[0] in main.commands and len(words) > 1:
            parsed(words)
        elif words[0] == "make" and len(words) > 1:
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), text
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None, text
        else:
            continue
        seen += 1
    assert seen > 25


def parsed(words: list[str]) -> None:
    command = main.get_command(click.Context(main), words[0])
    assert command is not None, words
    arguments = [{"…": HOUR, "N": "1"}.get(word, word) for word in words[1:]]
    command.make_context(words[0], arguments, resilient_parsing=False).close()


def test_every_block_is_run_by_a_test_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8").replace("{HOUR}", HOUR)
    begins = tuple(re.findall(r'\bblock\(f?"([^"]+)"\)', source))
    assert [lines[0] for _, lines in BLOCKS if not lines[0].startswith(begins)] == []
    lines = PAGE.splitlines()
    assert [line for line in NOT_RUN if line not in lines] == []
