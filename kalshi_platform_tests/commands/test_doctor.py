"""`doctor`: what is well is said to be well, and each thing that can be wrong is found and named."""

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
    """Write a streamer's health file, of a streamer that is well but for `values`."""
    folder = data / "journal" / f"shard-{shard}"
    folder.mkdir(parents=True, exist_ok=True)
    own, now = Identity.own(), time.time_ns()
    well = {"pid": own.pid, "pid_started": own.started, "state": "streaming", "trouble": None}
    times = dict.fromkeys(
        ("started_ns", "updated_ns", "last_frame_ns", "last_durable_ns", "last_heard_ns"), now
    )
    counts = {"lag_frames": 7, "markets": 3, "synced": 3, "journal_backlog_bytes": 3_400_000}
    told = {**well, **times, **counts, "stores": {}, **values}
    (folder / "health.json").write_text(json.dumps(told), "utf-8")


class Patient:
    """Settings that `doctor` finds nothing wrong with, until they are changed."""

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

    def examined(self, *argv: str) -> dict[str, str]:
        """Each check's line, by its name."""
        result = CliRunner().invoke(doctor.command, argv)
        lines = result.stdout.splitlines()
        assert result.exit_code == any(line.startswith("✗") for line in lines), result.output
        return {line.split(" — ")[0][2:]: line for line in lines}


@pytest.fixture(scope="module")
def migrated_once(clickhouse_url: str) -> Iterator[str]:
    """A database for the tests that only look; who changes it has one of its own (`alone`)."""
    name = database_name()
    migrations.migrate(settings_for(clickhouse_url, name))
    yield name
    httpx.post(
        clickhouse_url, content=f"DROP DATABASE {name} SYNC", timeout=DATABASE_TIMEOUT_S
    ).raise_for_status()


@pytest.fixture
def patient(
    clickhouse_url: str,
    migrated_once: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    start_simulator: StartSimulator,
) -> Iterator[Patient]:
    """A platform that is well."""
    simulator = start_simulator(markets=3, rate=0, rolling_markets=0)
    patient = Patient(
        monkeypatch,
        tmp_path,
        simulator,
        CLICKHOUSE_URL=clickhouse_url,
        CLICKHOUSE_DATABASE=migrated_once,
    )
    patient.set(MARKET_TICKERS=next(iter(simulator.books())))
    yield patient
    platform_settings.current.cache_clear()


@pytest.fixture
def alone(patient: Patient, clickhouse_database: str) -> Patient:
    """A platform that is well, on a database of its own."""
    patient.set(CLICKHOUSE_DATABASE=clickhouse_database)
    migrations.migrate(platform_settings.current())
    return patient


def test_a_platform_that_is_well_has_no_complaint(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch, 0)
    report(patient.data)
    lines = patient.examined()
    not_set_up = {
        *("market maker's spool", "market maker", "growth", "Dagster daemon", "alerts", "metrics")
    }
    assert {name for name, line in lines.items() if line[0] != "✓"} == not_set_up, lines
    assert len(lines) == 18
    assert "7 frames not loaded yet" in lines["streamer"]
    assert not patient.data.joinpath("parquet").exists()


def test_what_hangs_keeps_no_other_line_back(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ClickHouse and the exchange take connections and never answer."""
    monkeypatch.setattr(doctor, "LINE_S", 2.0)
    report(patient.data)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        patient.set(
            CLICKHOUSE_URL=f"http://127.0.0.1:{port}",
            KALSHI_REST_URL=f"http://127.0.0.1:{port}/trade-api/v2",
        )
        began = time.monotonic()
        lines = patient.examined()
        assert time.monotonic() - began < 2 * doctor.LINE_S + 5.0
    for name in ("clock", "exchange REST", "ClickHouse"):
        assert lines[name].startswith(f"✗ {name} — did not end within 2 s"), lines[name]
    for name in ("exchange WebSocket", "markets", "schema"):
        assert "not looked at" in lines[name]
    for name in ("settings", "key file", "data folder", "archive", "streamer"):
        assert lines[name].startswith("✓"), lines[name]


def test_a_fault_of_a_check_is_its_own_line(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> doctor.Finding:
        raise RuntimeError("odd")

    monkeypatch.setattr(doctor, "CHECKS", {**doctor.CHECKS, "clock": (broken, None)})
    report(patient.data)
    lines = patient.examined()
    assert lines["clock"] == "✗ clock — could not be looked at (RuntimeError('odd'))"
    assert len(lines) == 18


def test_every_shard_has_a_line_also_one_that_is_no_longer_configured(patient: Patient) -> None:
    patient.set(STREAM_SHARDS="2")
    report(patient.data)
    report(patient.data, 1, pid_started=1.0)
    report(patient.data, 2, pid_started=1.0)
    (patient.data / "journal" / "shard-2" / f"{0:020d}.arrows").touch()
    lines = patient.examined()
    assert lines["shard 0"].startswith("✓")
    assert lines["shard 1"].startswith("✗ shard 1 — The streamer is down: process")
    assert lines["shard 2"].startswith(
        "! shard 2 — Shard 2 is no longer configured, and its journal"
    )
    assert "kalshi-platform stream --shard 2" in lines["shard 2"]
    assert "streamer" not in lines


def test_nothing_secret_is_printed(patient: Patient) -> None:
    patient.set(CLICKHOUSE_USER="nobody", CLICKHOUSE_PASSWORD="hidden-word", PROD_KEYID="hidden-id")
    said = "\n".join(patient.examined().values())
    assert "does not know PROD_KEYID" in said
    assert "CLICKHOUSE_PASSWORD" in said
    assert not re.search("hidden-word|hidden-id|BEGIN", said)


def test_settings_that_make_no_sense_end_the_examination(patient: Patient) -> None:
    patient.set(HOT_RETENTION_DAYS="soon")
    (line,) = patient.examined().values()
    assert line.startswith("✗ settings — HOT_RETENTION_DAYS")


def test_without_a_key_and_without_a_simulator_it_says_so(patient: Patient) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        unused = f"http://127.0.0.1:{taken.getsockname()[1]}/trade-api/v2"
        patient.set(PROD_KEYID=None, PROD_KEYFILE=None, KALSHI_REST_URL=unused)
        lines = patient.examined()
    assert lines["exchange REST"].startswith("✗ exchange REST — no key is set, and the simulator")
    assert "kalshi-platform simulate" in lines["exchange REST"]
    for name in ("key file", "clock", "exchange WebSocket", "markets"):
        assert lines[name].startswith("·")


def test_a_key_file_that_others_can_read_is_refused(patient: Patient) -> None:
    patient.key_file.chmod(0o644)
    line = patient.examined()["key file"]
    assert line.startswith("✗")
    assert line.endswith(f"chmod 600 {patient.key_file}")


def test_a_key_file_that_only_its_owner_could_close_is_pointed_out(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient.key_file.chmod(0o444)
    monkeypatch.setattr("os.geteuid", lambda: patient.key_file.stat().st_uid + 1)
    line = patient.examined()["key file"]
    assert line.startswith("!")
    assert "mode 0400" in line


def test_secrets_in_an_env_file_that_others_can_read_are_pointed_out(patient: Patient) -> None:
    env = patient.key_file.parent / ".env"
    env.write_text("CLICKHOUSE_PASSWORD=\nSIMULATOR_RATE=10\n")
    assert patient.examined()["settings"].startswith("✓")
    env.write_text("CLICKHOUSE_PASSWORD=hidden-word\n")
    patient.set(CLICKHOUSE_PASSWORD="")  # the environment wins over the file
    line = patient.examined()["settings"]
    assert line.startswith("!")
    assert "CLICKHOUSE_PASSWORD in .env" in line
    assert "hidden-word" not in line
    env.chmod(0o600)
    assert patient.examined()["settings"].startswith("✓")


@pytest.mark.parametrize("content", [None, b"not a key"])
def test_a_key_file_that_is_none_is_named(patient: Patient, content: bytes | None) -> None:
    patient.key_file.unlink()
    if content is not None:
        patient.key_file.write_bytes(content)
    lines = patient.examined()
    assert lines["key file"].startswith(f"✗ key file — Key file {patient.key_file}")
    assert lines["exchange REST"].startswith("✗")


def set_clock(monkeypatch: pytest.MonkeyPatch, off_s: float) -> None:
    """So far is our clock off the exchange's, however long an answer is on its way to us."""
    true_skew = rest.clock_skew_s

    def skew(headers: httpx.Headers, now_s: float) -> float | None:
        sent = parsedate_to_datetime(headers["date"]).timestamp() + 0.5
        assert abs(now_s - sent) < 60
        return true_skew(headers, sent + off_s)

    monkeypatch.setattr(rest, "clock_skew_s", skew)


@pytest.mark.parametrize(("off_s", "mark"), [(-30, "✗"), (3, "!"), (0, "✓")])
def test_a_clock_that_is_off_is_found(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, off_s: int, mark: str
) -> None:
    set_clock(monkeypatch, off_s)
    line = patient.examined()["clock"]
    assert line.startswith(f"{mark} clock")
    assert ("NTP" in line) == bool(off_s)


def test_a_websocket_that_is_away_is_found(patient: Patient) -> None:
    patient.set(KALSHI_WS_URL="ws://127.0.0.1:9/trade-api/ws/v2")
    assert patient.examined()["exchange WebSocket"].startswith("✗ exchange WebSocket — ws://127.0")


def test_an_unknown_market_is_named(patient: Patient) -> None:
    patient.set(MARKET_TICKERS=f"{next(iter(patient.simulator.books()))},NO-SUCH")
    assert "the exchange knows no NO-SUCH" in patient.examined()["markets"]
    patient.set(MARKET_TICKERS="", MARKET_SERIES="NO-SUCH-SERIES")
    assert patient.examined()["markets"].startswith("✗")
    patient.set(MARKET_SERIES="")
    assert "nothing to record" in patient.examined()["markets"]


def test_a_clickhouse_that_is_away_is_found_and_one_that_is_not_wanted_is_not(
    patient: Patient,
) -> None:
    patient.set(CLICKHOUSE_URL="http://127.0.0.1:9")
    lines = patient.examined()
    assert lines["ClickHouse"].startswith("✗")
    assert lines["schema"] == "· schema — not looked at: see ClickHouse"
    patient.set(USE_CLICKHOUSE="0")
    assert patient.examined()["ClickHouse"].startswith("·")


def test_what_the_embedded_clickhouse_has_set_aside_is_listed_until_it_is_gone(
    patient: Patient, clickhouse_url: str
) -> None:
    patient.set(CLICKHOUSE_URL=None, EMBEDDED_CLICKHOUSE_PORT=clickhouse_url.rpartition(":")[2])
    aside = patient.data / "clickhouse" / "refused" / "k" / "url.sql"
    aside.parent.mkdir(parents=True)
    aside.write_text("-- table k.url: not on the list\n")
    line = patient.examined()["ClickHouse"]
    assert line.startswith("!")
    assert str(aside) in line
    aside.unlink()
    assert patient.examined()["ClickHouse"].startswith("✓")


def test_a_part_that_the_embedded_clickhouse_has_set_aside_is_listed_until_it_is_gone(
    patient: Patient, clickhouse_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        doctor, "_lacks_password", lambda _: False
    )  # the server is another folder's
    patient.set(CLICKHOUSE_URL=None, EMBEDDED_CLICKHOUSE_PORT=clickhouse_url.rpartition(":")[2])
    tables = patient.data / "clickhouse" / "engine" / "store"
    aside = tables / "a1b" / "a1b2" / "detached" / "broken-on-start_all_1_3_1"
    aside.mkdir(parents=True)
    line = patient.examined()["ClickHouse"]
    assert line.startswith("!")
    assert str(aside) in line
    aside.rmdir()
    assert patient.examined()["ClickHouse"].startswith("✓")


def test_a_schema_that_is_not_ours_is_found(alone: Patient) -> None:
    with closing(connect(platform_settings.current())) as client:
        client.command("ALTER TABLE latest_levels MODIFY COLUMN size Decimal(18, 4)")
        assert "latest_levels.size is Decimal(18, 4)" in alone.examined()["schema"]
        client.command(
            "ALTER TABLE schema_migrations DELETE WHERE version = 2 SETTINGS mutations_sync = 1"
        )
        assert "lacks 002_live_views" in alone.examined()["schema"]
    alone.set(CLICKHOUSE_DATABASE="nowhere")
    assert "kalshi-platform migrate" in alone.examined()["schema"]


def test_a_folder_that_cannot_be_written_is_found(patient: Patient, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    patient.set(PARQUET_DIR=str(tmp_path / "file" / "parquet"))
    assert "PARQUET_DIR" in patient.examined()["archive"]


def test_a_full_disk_is_found(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(patient.data.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    lines = patient.examined()
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
        ({"oldest_undurable_ms": 24_000}, "✗", "is not durable yet"),
        ({"trouble": "ClickHouse is away."}, "✗", "ClickHouse is away."),
        ({"state": "connecting", "last_heard_ns": LONG_AGO}, "✗", "has not been reached"),
        ({"last_frame_ns": 0, "last_durable_ns": 0}, "✓", "last frame never"),
        ({"markets": 1, "synced": 0}, "✗", "0 of 1 books are synced"),
        ({"synced": 2}, "!", "2 of 3 books are synced"),
        ({"pid": "x"}, "✗", "is no streamer's report"),
        ({"state": None, "lag_frames": None}, "✗", "is no streamer's report"),
    ],
)
def test_a_streamer_is_judged_by_its_report(
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


def test_a_password_that_is_gone_is_found(patient: Patient, clickhouse_url: str) -> None:
    patient.set(EMBEDDED_CLICKHOUSE_PORT=clickhouse_url.rpartition(":")[2])
    folder = platform_settings.current().embedded_clickhouse_dir
    (folder / "engine").mkdir(parents=True)
    assert "is gone" in patient.examined()["ClickHouse"]


def test_a_streamer_whose_runs_fail_one_after_the_other_is_found_with_the_reason(
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
    """One check alone."""
    check, _ = doctor.CHECKS[name]
    settings = platform_settings.load(
        _env_file=None, kalshi_data_dir=folder, use_clickhouse=False, **overrides
    )
    return check(settings)


def test_a_disk_that_will_be_full_is_found_before_it_is(
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


def test_a_stopped_market_maker_is_found_with_its_age(alone: Patient) -> None:
    with closing(connect(platform_settings.current())) as client:
        planted = Planted(client)
        planted.decision(ago(2 * 3600 + 1500), engine_instance_id="mm-1")
        line = alone.examined()["market maker"]
        assert line.startswith(
            "✗ market maker — engine mm-1 has not decided for 2 h 25 min, its newest decision is of "
        )
        assert line.endswith("the line of its spool counts what waits here")
        planted.decision(ago(5), engine_instance_id="mm-1")  # what the line says: it is started
        line = alone.examined()["market maker"]
        assert line.startswith("✓ market maker — it goes on deciding: 1 decision of 1 market")


@pytest.mark.parametrize(("streamers", "mark"), [(0, "·"), (1, "✗")])
def test_a_daemon_that_is_dead_matters_while_a_streamer_runs(
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


def test_alert_channels_are_named_and_tried(tmp_path: Path, patient: Patient) -> None:
    assert checked("alerts", tmp_path).mark.value == "·"
    assert "no channel is set" in patient.examined("--test-alert")["test alert"]
    with web_server() as web:
        patient.set(ALERT_WEBHOOK_URL=web.url, ALERT_SLACK_WEBHOOK_URL="http://127.0.0.1:9/s3cr3t")
        lines = patient.examined("--test-alert")
        assert lines["alerts"].startswith("✓ alerts — told to slack, webhook")
        assert lines["test alert, webhook"].startswith("✓")
        assert lines["test alert, slack"].startswith("✗")
        assert "s3cr3t" not in "".join(lines.values())
        assert [body["notices"][0]["title"] for body in web.bodies] == ["This is a test"]


def test_a_metrics_endpoint_that_does_not_answer_or_is_anothers_is_found(tmp_path: Path) -> None:
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
        assert "somebody else's" in checked("metrics", tmp_path, metrics_port=port).text
