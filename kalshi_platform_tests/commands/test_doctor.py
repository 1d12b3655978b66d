"""`doctor` finds and names each fault, and reports a healthy platform as healthy."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
import pytest
from click.testing import CliRunner
from dagster._daemon.types import DaemonHeartbeat

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import migrations
from kalshi_platform.clickhouse.client import connect
from kalshi_platform.commands import doctor
from kalshi_platform.exchange import rest
from kalshi_platform.health import metrics, supervision
from kalshi_platform.health.supervision import Supervised, Supervision
from kalshi_platform.journal import reader
from kalshi_platform.orchestration.host.home import prepare
from kalshi_platform.orchestration.observation import SHARD_TAG
from kalshi_platform.orchestration.streamer import stream_orderbook
from kalshi_platform.processes import Identity
from kalshi_platform.simulator.server import Simulator
from kalshi_platform_tests.clickhouse.tables import settings_for
from kalshi_platform_tests.clickhouse.two_shards import database_name
from kalshi_platform_tests.conftest import DATABASE_TIMEOUT_S
from kalshi_platform_tests.health.servers import web_server
from kalshi_platform_tests.inventory.planted import Planted, ago

StartSimulator = Callable[..., Simulator]


def report(data: Path, shard: int = 0, **values: Any) -> None:
    """Write the health file of a healthy streamer, with `values` replaced."""
    folder = data / "journal" / f"shard-{shard}"
    folder.mkdir(parents=True, exist_ok=True)
    own, now = Identity.own(), time.time_ns()
    healthy = {"pid": own.pid, "pid_started": own.started, "state": "streaming", "trouble": None}
    times = dict.fromkeys(
        ("started_ns", "updated_ns", "last_frame_ns", "last_durable_ns", "last_heard_ns"), now
    )
    counts = {"lag_frames": 7, "markets": 3, "synced": 3, "journal_backlog_bytes": 3_400_000}
    content = {**healthy, **times, **counts, "stores": {}, **values}
    (folder / "health.json").write_text(json.dumps(content), "utf-8")


class Installation:
    """A healthy installation, whose settings a test changes."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, simulator: Simulator, **env: str
    ) -> None:
        self._monkeypatch = monkeypatch
        self.simulator = simulator
        self.key_file = folder / "key.pem"
        shutil.copy(simulator.key_file, self.key_file)
        self.key_file.chmod(0o600)
        self.data = folder / "data"
        monkeypatch.chdir(folder)
        self.set(
            PROD_KEYID=simulator.key_id,
            PROD_KEYFILE=str(self.key_file),
            KALSHI_REST_URL=simulator.rest_url,
            KALSHI_WS_URL=simulator.ws_url,
            KALSHI_DATA_DIR=str(self.data),
            **env,
        )

    def set(self, **env: str | None) -> None:
        """Set environment variables, or remove them."""
        for name, value in env.items():
            if value is None:
                self._monkeypatch.delenv(name, raising=False)
            else:
                self._monkeypatch.setenv(name, value)
        platform_settings.current.cache_clear()

    def lines(self, *argv: str) -> dict[str, str]:
        """Run `doctor`; returns each check's line by its name."""
        result = CliRunner().invoke(doctor.command, argv)
        lines = result.stdout.splitlines()
        assert result.exit_code == any(line.startswith("✗") for line in lines), result.output
        return {line.split(" — ")[0][2:]: line for line in lines}


@pytest.fixture(scope="module")
def migrated_once(clickhouse_url: str) -> Iterator[str]:
    """A database for tests that only read; tests that change it use `own_database`."""
    name = database_name()
    migrations.migrate(settings_for(clickhouse_url, name))
    yield name
    httpx.post(
        clickhouse_url, content=f"DROP DATABASE {name} SYNC", timeout=DATABASE_TIMEOUT_S
    ).raise_for_status()


@pytest.fixture
def installation(
    clickhouse_url: str,
    migrated_once: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    start_simulator: StartSimulator,
) -> Iterator[Installation]:
    """A healthy platform."""
    simulator = start_simulator(markets=3, rate=0, rolling_markets=0)
    installation = Installation(
        monkeypatch,
        tmp_path,
        simulator,
        CLICKHOUSE_URL=clickhouse_url,
        CLICKHOUSE_DATABASE=migrated_once,
    )
    installation.set(MARKET_TICKERS=next(iter(simulator.books())))
    yield installation
    platform_settings.current.cache_clear()


@pytest.fixture
def own_database(installation: Installation, clickhouse_database: str) -> Installation:
    """A healthy platform on a database of its own."""
    installation.set(CLICKHOUSE_DATABASE=clickhouse_database)
    migrations.migrate(platform_settings.current())
    return installation


def test_a_healthy_platform_has_no_fault(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch, 0)
    report(installation.data)
    lines = installation.lines()
    not_set_up = {
        *("market maker's spool", "market maker", "growth", "Dagster daemon", "alerts", "metrics")
    }
    assert {name for name, line in lines.items() if line[0] != "✓"} == not_set_up, lines
    assert len(lines) == 18
    assert "7 frames not loaded yet" in lines["streamer"]
    assert not installation.data.joinpath("parquet").exists()


def test_a_check_that_hangs_delays_no_other_line(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ClickHouse and the exchange accept connections and never answer."""
    monkeypatch.setattr(doctor, "LINE_S", 2.0)
    report(installation.data)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        installation.set(
            CLICKHOUSE_URL=f"http://127.0.0.1:{port}",
            KALSHI_REST_URL=f"http://127.0.0.1:{port}/trade-api/v2",
        )
        began = time.monotonic()
        lines = installation.lines()
        assert time.monotonic() - began < 2 * doctor.LINE_S + 5.0
    for name in ("clock", "exchange REST", "ClickHouse"):
        assert lines[name].startswith(f"✗ {name} — did not end within 2 s"), lines[name]
    for name in ("exchange WebSocket", "markets", "schema"):
        assert "not checked" in lines[name]
    for name in ("settings", "key file", "data folder", "archive", "streamer"):
        assert lines[name].startswith("✓"), lines[name]


def test_a_bug_in_a_check_affects_its_own_line_only(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> doctor.Finding:
        raise RuntimeError("odd")

    monkeypatch.setattr(doctor, "CHECKS", {**doctor.CHECKS, "clock": (broken, None)})
    report(installation.data)
    lines = installation.lines()
    assert lines["clock"] == "✗ clock — could not be checked (RuntimeError('odd'))"
    assert len(lines) == 18


def test_every_shard_has_a_line_also_a_former_one(installation: Installation) -> None:
    installation.set(STREAM_SHARDS="2")
    report(installation.data)
    report(installation.data, 1, pid_started=1.0)
    report(installation.data, 2, pid_started=1.0)
    (installation.data / "journal" / "shard-2" / f"{0:020d}.arrows").touch()
    lines = installation.lines()
    assert lines["shard 0"].startswith("✓")
    assert lines["shard 1"].startswith("✗ shard 1 — The streamer is down: process")
    assert lines["shard 2"].startswith(
        "! shard 2 — Shard 2 is no longer configured, and its journal"
    )
    assert "kalshi-platform stream --shard 2" in lines["shard 2"]
    assert "streamer" not in lines


def test_nothing_secret_is_printed(installation: Installation) -> None:
    installation.set(
        CLICKHOUSE_USER="unknown", CLICKHOUSE_PASSWORD="hidden-word", PROD_KEYID="hidden-id"
    )
    output = "\n".join(installation.lines().values())
    assert "does not know PROD_KEYID" in output
    assert "CLICKHOUSE_PASSWORD" in output
    assert not re.search("hidden-word|hidden-id|BEGIN", output)


def test_invalid_settings_end_the_checks(installation: Installation) -> None:
    installation.set(HOT_RETENTION_DAYS="soon")
    (line,) = installation.lines().values()
    assert line.startswith("✗ settings — HOT_RETENTION_DAYS")


def test_no_key_and_no_simulator_is_a_finding(installation: Installation) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        unused = f"http://127.0.0.1:{taken.getsockname()[1]}/trade-api/v2"
        installation.set(PROD_KEYID=None, PROD_KEYFILE=None, KALSHI_REST_URL=unused)
        lines = installation.lines()
    assert lines["exchange REST"].startswith("✗ exchange REST — no key is set, and the simulator")
    assert "kalshi-platform simulate" in lines["exchange REST"]
    for name in ("key file", "clock", "exchange WebSocket", "markets"):
        assert lines[name].startswith("·")


def test_a_key_file_that_others_can_read_is_refused(installation: Installation) -> None:
    installation.key_file.chmod(0o644)
    line = installation.lines()["key file"]
    assert line.startswith("✗")
    assert line.endswith(f"chmod 600 {installation.key_file}")


def test_a_readable_key_file_of_another_owner_is_reported(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    installation.key_file.chmod(0o444)
    monkeypatch.setattr("os.geteuid", lambda: installation.key_file.stat().st_uid + 1)
    line = installation.lines()["key file"]
    assert line.startswith("!")
    assert "mode 0400" in line


def test_secrets_in_a_readable_env_file_are_reported(installation: Installation) -> None:
    env = installation.key_file.parent / ".env"
    env.write_text("CLICKHOUSE_PASSWORD=\nSIMULATOR_RATE=10\n")
    assert installation.lines()["settings"].startswith("✓")
    env.write_text("CLICKHOUSE_PASSWORD=hidden-word\n")
    installation.set(CLICKHOUSE_PASSWORD="")  # the environment wins over the file
    line = installation.lines()["settings"]
    assert line.startswith("!")
    assert "CLICKHOUSE_PASSWORD in .env" in line
    assert "hidden-word" not in line
    env.chmod(0o600)
    assert installation.lines()["settings"].startswith("✓")


@pytest.mark.parametrize("content", [None, b"not a key"])
def test_an_invalid_key_file_is_named(installation: Installation, content: bytes | None) -> None:
    installation.key_file.unlink()
    if content is not None:
        installation.key_file.write_bytes(content)
    lines = installation.lines()
    assert lines["key file"].startswith(f"✗ key file — Key file {installation.key_file}")
    assert lines["exchange REST"].startswith("✗")


def set_clock(monkeypatch: pytest.MonkeyPatch, off_s: float) -> None:
    """Set the skew of this machine's clock, independent of the answers' travel time."""
    true_skew = rest.clock_skew_s

    def skew(headers: httpx.Headers, now_s: float) -> float | None:
        sent = parsedate_to_datetime(headers["date"]).timestamp() + 0.5
        assert abs(now_s - sent) < 60
        return true_skew(headers, sent + off_s)

    monkeypatch.setattr(rest, "clock_skew_s", skew)


@pytest.mark.parametrize(("off_s", "mark"), [(-30, "✗"), (3, "!"), (0, "✓")])
def test_clock_skew_is_found(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, off_s: int, mark: str
) -> None:
    set_clock(monkeypatch, off_s)
    line = installation.lines()["clock"]
    assert line.startswith(f"{mark} clock")
    assert ("NTP" in line) == bool(off_s)


def test_an_unreachable_websocket_is_found(installation: Installation) -> None:
    installation.set(KALSHI_WS_URL="ws://127.0.0.1:9/trade-api/ws/v2")
    assert installation.lines()["exchange WebSocket"].startswith(
        "✗ exchange WebSocket — ws://127.0"
    )


def test_an_unknown_market_is_named(installation: Installation) -> None:
    installation.set(MARKET_TICKERS=f"{next(iter(installation.simulator.books()))},NO-SUCH")
    assert "the exchange knows no NO-SUCH" in installation.lines()["markets"]
    installation.set(MARKET_TICKERS="", MARKET_SERIES="NO-SUCH-SERIES")
    assert installation.lines()["markets"].startswith("✗")
    installation.set(MARKET_SERIES="")
    assert "nothing to record" in installation.lines()["markets"]


def test_clickhouse_is_checked_only_if_it_is_used(
    installation: Installation,
) -> None:
    installation.set(CLICKHOUSE_URL="http://127.0.0.1:9")
    lines = installation.lines()
    assert lines["ClickHouse"].startswith("✗")
    assert lines["schema"] == "· schema — not checked: see ClickHouse"
    installation.set(USE_CLICKHOUSE="0")
    assert installation.lines()["ClickHouse"].startswith("·")


def test_definitions_that_were_set_aside_are_listed(
    installation: Installation, clickhouse_url: str
) -> None:
    installation.set(
        CLICKHOUSE_URL=None, EMBEDDED_CLICKHOUSE_PORT=clickhouse_url.rpartition(":")[2]
    )
    aside = installation.data / "clickhouse" / "refused" / "k" / "url.sql"
    aside.parent.mkdir(parents=True)
    aside.write_text("-- table k.url: not on the list\n")
    line = installation.lines()["ClickHouse"]
    assert line.startswith("!")
    assert str(aside) in line
    aside.unlink()
    assert installation.lines()["ClickHouse"].startswith("✓")


def test_parts_that_were_set_aside_are_listed(
    installation: Installation, clickhouse_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        doctor, "_lacks_password", lambda _: False
    )  # the server is another folder's
    installation.set(
        CLICKHOUSE_URL=None, EMBEDDED_CLICKHOUSE_PORT=clickhouse_url.rpartition(":")[2]
    )
    tables = installation.data / "clickhouse" / "engine" / "store"
    aside = tables / "a1b" / "a1b2" / "detached" / "broken-on-start_all_1_3_1"
    aside.mkdir(parents=True)
    line = installation.lines()["ClickHouse"]
    assert line.startswith("!")
    assert str(aside) in line
    aside.rmdir()
    assert installation.lines()["ClickHouse"].startswith("✓")


def test_a_foreign_schema_is_found(own_database: Installation) -> None:
    with closing(connect(platform_settings.current())) as client:
        client.command("ALTER TABLE latest_levels MODIFY COLUMN size Decimal(18, 4)")
        assert "latest_levels.size is Decimal(18, 4)" in own_database.lines()["schema"]
        client.command(
            "ALTER TABLE schema_migrations DELETE WHERE version = 2 SETTINGS mutations_sync = 1"
        )
        assert "lacks 002_live_views" in own_database.lines()["schema"]
    own_database.set(CLICKHOUSE_DATABASE="nowhere")
    assert "kalshi-platform migrate" in own_database.lines()["schema"]


def test_a_folder_that_cannot_be_written_is_found(
    installation: Installation, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    installation.set(PARQUET_DIR=str(tmp_path / "file" / "parquet"))
    assert "PARQUET_DIR" in installation.lines()["archive"]


def test_a_full_disk_is_found(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(installation.data.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    lines = installation.lines()
    assert lines["data folder"].startswith("✗")
    assert lines["archive"].startswith("✗")


LONG_AGO = 10**9


@pytest.mark.parametrize(
    ("values", "mark", "sentence"),
    [
        ({"state": "stopped", "pid_started": 1.0}, "✗", r"was stopped \d s ago"),
        ({"state": "stopped", "updated_ns": LONG_AGO}, "✗", "was stopped"),
        ({"state": "blocked", "trouble": "Make room."}, "✗", "3,400,000 bytes .* Make room"),
        ({"state": "blocked", "updated_ns": LONG_AGO}, "✗", "The disk does not accept writes"),
        ({"pid_started": 1.0}, "✗", "process .* is gone"),
        ({"updated_ns": LONG_AGO}, "✗", "hangs"),
        ({"oldest_undurable_ms": 24_000}, "✗", "are not durable yet"),
        ({"trouble": "ClickHouse is away."}, "✗", "ClickHouse is away."),
        ({"state": "connecting", "last_heard_ns": LONG_AGO}, "✗", "has not been reached"),
        ({"last_frame_ns": 0, "last_durable_ns": 0}, "✓", "last frame never"),
        ({"markets": 1, "synced": 0}, "✗", "0 of 1 books are synced"),
        ({"synced": 2}, "!", "2 of 3 books are synced"),
        ({"pid": "x"}, "✗", "is not a streamer's report"),
        ({"state": None, "lag_frames": None}, "✗", "is not a streamer's report"),
    ],
)
def test_a_streamers_report_decides_its_line(
    tmp_path: Path, values: dict[str, Any], mark: str, sentence: str
) -> None:
    report(tmp_path, **values)
    check, _ = doctor.CHECKS["streamer"]
    finding = check(platform_settings.load(_env_file=None, kalshi_data_dir=tmp_path))
    assert finding.mark.value == mark
    assert re.search(sentence, finding.text)


def test_a_journal_json_that_cannot_be_read_is_found(tmp_path: Path) -> None:
    report(tmp_path)
    settings = platform_settings.load(_env_file=None, kalshi_data_dir=tmp_path)
    (settings.journal_dir() / "journal.json").write_text('{"id": 5}')
    check, _ = doctor.CHECKS["streamer"]
    finding = check(settings)
    assert finding.mark.value == "✗"
    assert "journal.json is damaged" in finding.text


def test_a_missing_write_password_is_found(installation: Installation, clickhouse_url: str) -> None:
    installation.set(EMBEDDED_CLICKHOUSE_PORT=clickhouse_url.rpartition(":")[2])
    folder = platform_settings.current().embedded_clickhouse_dir
    (folder / "engine").mkdir(parents=True)
    assert "is gone" in installation.lines()["ClickHouse"]


def test_repeatedly_failing_runs_are_found_with_the_reason(
    tmp_path: Path,
) -> None:
    def noted(failures: int, *, age_s: float = 0.0) -> None:
        shard = Supervised("The next start is in 20 s.", failures, "A bad folder.")
        supervision.note(tmp_path, Supervision(time.time() - age_s, {0: shard}))

    assert checked("streamer", tmp_path).mark.value == "·"
    noted(0)
    found = checked("streamer", tmp_path)
    assert (found.mark.value, found.text) == (
        "✗",
        f"none runs, and none has run in {tmp_path} yet",
    )
    noted(5)
    found = checked("streamer", tmp_path)
    assert found.mark.value == "✗"
    assert found.text.endswith(
        "5 runs in a row have failed, the last: A bad folder. The next start is in 20 s."
    )
    report(tmp_path, pid_started=1.0)
    found = checked("streamer", tmp_path)
    assert found.mark.value == "✗"
    assert "The streamer is down: process" in found.text
    assert "5 runs in a row" in found.text
    noted(5, age_s=600)
    assert "in a row" not in checked("streamer", tmp_path).text


def checked(name: str, folder: Path, **overrides: Any) -> doctor.Finding:
    """Run a single check."""
    check, _ = doctor.CHECKS[name]
    settings = platform_settings.load(
        _env_file=None, kalshi_data_dir=folder, use_clickhouse=False, **overrides
    )
    return check(settings)


def test_a_disk_that_will_be_full_is_forecast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "journal" / "shard-0"
    folder.mkdir(parents=True)
    for number in range(3):  # a segment each hour
        path = reader.segment_path(folder, number * 1000)
        path.write_bytes(b"x" * (1 << 20))
        os.utime(path, (1e9 + 3600 * number, 1e9 + 3600 * number))
    usage = shutil.disk_usage(tmp_path)
    for free_mib, span, mark in (
        (10_000, None, "✓"),
        (30, "30 hours", "✗"),
        (24 * 20, "20 days", "!"),
    ):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _, free=free_mib << 20: usage._replace(free=free)
        )
        found = checked("growth", tmp_path, journal_retention_hours=24 * 100)
        assert found.mark.value == mark
        assert f"full in {span}" in found.text or span is None
    settled = checked("growth", tmp_path, journal_retention_hours=2)
    assert settled.mark.value == "✓"
    assert "more than a year" in settled.text


def test_a_stopped_market_maker_is_found_with_its_age(own_database: Installation) -> None:
    with closing(connect(platform_settings.current())) as client:
        planted = Planted(client)
        planted.decision(ago(2 * 3600 + 1500), engine_instance_id="mm-1")
        line = own_database.lines()["market maker"]
        assert line.startswith(
            "✗ market maker — engine mm-1 has not decided for 2 h 25 min, its newest decision is of "
        )
        assert line.endswith("the spool's line counts the rows that wait here")
        planted.decision(ago(5), engine_instance_id="mm-1")  # what the line says: it is started
        line = own_database.lines()["market maker"]
        assert line.startswith("✓ market maker — it decides: 1 decision of 1 market")


@pytest.mark.parametrize(("streamers", "mark"), [(0, "·"), (1, "✗")])
def test_a_dead_daemon_is_a_fault_while_a_streamer_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamers: int, mark: str
) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    assert checked("Dagster daemon", tmp_path).mark.value == "·"
    home = prepare(tmp_path, tmp_path / "code.sock", 7)
    with dg.DagsterInstance.from_config(str(home.folder)) as instance:
        for _ in range(streamers):
            instance.create_run_for_job(
                stream_orderbook, tags={SHARD_TAG: "0"}, status=dg.DagsterRunStatus.STARTED
            )
        found = checked("Dagster daemon", tmp_path)
        assert found.mark.value == mark
        for kind in instance.get_required_daemon_types():
            beat = DaemonHeartbeat(time.time(), kind, "one", [])
            instance.add_daemon_heartbeat(beat)
    assert checked("Dagster daemon", tmp_path).mark.value == "✓"


def test_alert_channels_are_named_and_tried(tmp_path: Path, installation: Installation) -> None:
    assert checked("alerts", tmp_path).mark.value == "·"
    assert "no channel is set" in installation.lines("--test-alert")["test alert"]
    with web_server() as web:
        installation.set(
            ALERT_WEBHOOK_URL=web.url, ALERT_SLACK_WEBHOOK_URL="http://127.0.0.1:9/s3cr3t"
        )
        lines = installation.lines("--test-alert")
        assert lines["alerts"].startswith("✓ alerts — sent to slack, webhook")
        assert lines["test alert, webhook"].startswith("✓")
        assert lines["test alert, slack"].startswith("✗")
        assert "s3cr3t" not in "".join(lines.values())
        assert [body["notices"][0]["title"] for body in web.bodies] == ["This is a test"]


def test_a_silent_or_foreign_metrics_endpoint_is_found(tmp_path: Path) -> None:
    assert checked("metrics", tmp_path).mark.value == "·"
    settings = platform_settings.load(_env_file=None, kalshi_data_dir=tmp_path)
    thread, server = metrics.serve(settings, "127.0.0.1", 0)
    try:
        assert checked("metrics", tmp_path, metrics_port=server.server_port).mark.value == "✓"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    found = checked("metrics", tmp_path, metrics_port=server.server_port)
    assert found.mark.value == "✗"
    assert "does not answer" in found.text
    with web_server() as web:
        port = int(web.url.split(":")[2].split("/")[0])
        assert "another program's" in checked("metrics", tmp_path, metrics_port=port).text
