"""An unreachable store is reported within seconds, at the start and while nothing is written to it."""

from __future__ import annotations

import logging
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import migrations
from kalshi_platform.commands import doctor, up
from kalshi_platform.errors import StoreUnavailable
from kalshi_platform.health import verdict
from kalshi_platform.loading import numbering, presence
from kalshi_platform.orchestration.host.home import Home
from kalshi_platform.recorder.streamer import Streamer
from kalshi_platform.settings import Settings
from kalshi_platform.simulator.server import Simulator
from kalshi_platform_tests.between import between
from kalshi_platform_tests.object_store import BUCKET, KEY, KEY_ID, ObjectStore, object_store

NAMED_S = 5.0
GONE = "It is not mounted, or was removed or replaced"
NO_BUCKET = "there is no such bucket. Create it, or set PARQUET_DIR to one that exists."
NO_KEY = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to a key that may"


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


@pytest.fixture
def make(simulator: Simulator, tmp_path: Path) -> Callable[..., Settings]:
    """Settings of a recorder in a folder of the test's own, without ClickHouse unless it is given."""

    def settings(**more: Any) -> Settings:
        made = platform_settings.load(
            _env_file=None,
            **{
                "kalshi_data_dir": tmp_path / "data",
                "parquet_dir": tmp_path / "archive",
                "use_clickhouse": False,
                "kalshi_ws_url": simulator.ws_url,
                "kalshi_rest_url": simulator.rest_url,
                **more,
            },
        )
        key_file = made.exchange.key_file
        key_file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(simulator.key_file, key_file)
        return made

    return settings


def in_bucket(store: ObjectStore, **more: Any) -> dict[str, Any]:
    return {
        "parquet_dir": f"s3://{BUCKET}/{uuid.uuid4().hex}",
        "s3_endpoint_url": store.url,
        "aws_region": "us-east-1",
        "aws_access_key_id": KEY_ID,
        "aws_secret_access_key": KEY,
        **more,
    }


@contextmanager
def recording(settings: Settings, *, drain_s: float = 10.0) -> Iterator[Streamer]:
    streamer = Streamer(settings)
    streamer.start()
    try:
        yield streamer
    finally:
        streamer.stop(drain_s)


def trouble(streamer: Streamer, since: float) -> str:
    """The problem in the health report, within the documented time."""
    while not (named := streamer.health().trouble):
        assert time.monotonic() - since < NAMED_S, "nothing is named"
        time.sleep(0.05)
    return named


def well(streamer: Streamer, *, written: bool = False) -> None:
    """Wait until no problem is reported and, if requested, until the archive has a first file."""
    deadline = time.monotonic() + 60
    while streamer.health().trouble or (
        written and not streamer.health().stores["parquet"].committed_ns
    ):
        assert time.monotonic() < deadline, streamer.health()
        time.sleep(0.05)


def test_a_missing_bucket_is_reported_at_the_start(
    store: ObjectStore, make: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    settings = make(**in_bucket(store, parquet_dir="s3://nowhere/x"))
    began = time.monotonic()
    with caplog.at_level(logging.ERROR), recording(settings) as streamer:
        named = trouble(streamer, began)
        assert named.startswith("s3://nowhere")
        assert NO_BUCKET in named
        assert NO_BUCKET in caplog.text
        assert NO_BUCKET in doctor._archive(settings).text


def test_a_wrong_clickhouse_user_is_reported_at_the_start(
    make: Callable[..., Settings], clickhouse_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = make(
        use_clickhouse=True, clickhouse_url=clickhouse_url, clickhouse_password="not-the-password"
    )
    began = time.monotonic()
    with caplog.at_level(logging.ERROR), recording(settings) as streamer:
        named = trouble(streamer, began)
    assert f"ClickHouse at {clickhouse_url} refused user" in named
    assert "Check CLICKHOUSE_USER and CLICKHOUSE_PASSWORD" in named
    assert named in caplog.text
    assert "not-the-password" not in named + caplog.text


def test_a_bucket_failure_between_writes_is_reported(
    store: ObjectStore, make: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()

    def silent(method: str, path: str) -> None:
        released.wait(60)

    with caplog.at_level(logging.ERROR), recording(make(**in_bucket(store))) as streamer:
        well(streamer, written=True)

        store.require_keys(True)
        try:
            named = trouble(streamer, time.monotonic())
            assert "the object store refuses HeadObject" in named
            assert NO_KEY in named
            assert named in caplog.text
            assert streamer.health().stores["parquet"].refused
        finally:
            store.require_keys(False)
        well(streamer)

        store.fault = lambda method, path: 404 if path.startswith(f"/{BUCKET}") else None
        named = trouble(streamer, time.monotonic())
        assert named == f"s3://{BUCKET}: {NO_BUCKET}"
        store.fault = None
        well(streamer)

        store.fault = silent
        named = trouble(streamer, time.monotonic())
        assert "has not answered for more than 3 s. Check that it runs" in named
        store.fault = None
        released.set()
        well(streamer)


def test_an_unmounted_archive_is_reported(
    make: Callable[..., Settings], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings, root = make(), tmp_path / "archive"
    with caplog.at_level(logging.ERROR), recording(settings) as streamer:
        well(streamer, written=True)
        root.rename(tmp_path / "away")
        named = trouble(streamer, time.monotonic())
        assert str(root) in named
        assert GONE in named
        assert GONE in caplog.text
        assert streamer.health().stores["parquet"].refused  # for a person: an alert within a minute
        (tmp_path / "away").rename(root)
        well(streamer)
    assert doctor._archive(settings).mark is not doctor.Mark.BAD
    root.rename(tmp_path / "away")
    root.mkdir()  # what it was mounted on
    found = doctor._archive(settings)
    assert found.mark is doctor.Mark.BAD
    assert GONE in found.text
    began = time.monotonic()
    with recording(settings) as streamer:
        assert "it is not mounted, or was emptied or replaced" in trouble(streamer, began)
    assert not list(root.glob("*/date=*"))


def test_up_reports_an_unreachable_archive_at_once(
    store: ObjectStore,
    make: Callable[..., Settings],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(settings: Settings) -> str:
        home = Home(tmp_path, tmp_path / "workspace.yaml", "", "")
        up._Platform(settings, 3000, home, tmp_path / "code.sock", up._Ending())._check_archive()
        return capsys.readouterr().out

    assert NO_BUCKET in said(make(**in_bucket(store, parquet_dir="s3://nowhere/x")))
    assert said(make(**in_bucket(store))) == ""


def test_an_archive_never_written_to_is_no_error(make: Callable[..., Settings]) -> None:
    assert doctor._archive(make()).mark is not doctor.Mark.BAD


def test_a_clickhouse_that_never_answers_is_reported(
    make: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = make(use_clickhouse=True, clickhouse_url=url)
        began = time.monotonic()
        with caplog.at_level(logging.ERROR), recording(settings, drain_s=1.0) as streamer:
            named = trouble(
                streamer, began + numbering.ANSWER_TIMEOUT_S
            )  # the start waits this long
            assert named.startswith(f"ClickHouse at {url} cannot be reached (time-out). ")
            assert named in caplog.text
            report = msgspec.to_builtins(streamer.health())
            assert doctor._judge(report, 0, 1).mark is doctor.Mark.BAD
        with pytest.raises(StoreUnavailable) as found:
            doctor._clickhouse(settings)
        assert str(found.value) == named


def test_an_idle_unresponsive_clickhouse_is_reported(
    make: Callable[..., Settings], clickhouse_url: str, clickhouse_database: str
) -> None:
    with between(clickhouse_url) as way:
        settings = make(
            use_clickhouse=True, clickhouse_url=way.url, clickhouse_database=clickhouse_database
        )
        migrations.migrate(settings)
        with recording(settings) as streamer:
            while not streamer.health().stores["clickhouse"].committed_ns:
                assert streamer.failure() is None
                time.sleep(0.05)
            well(streamer)
            way.open.clear()
            named = trouble(streamer, time.monotonic())
            assert f"ClickHouse at {way.url} cannot be reached (time-out)" in named
            way.open.set()
            well(streamer)


def test_an_unresponsive_exchange_is_reported(
    make: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "maintenance", lambda _: False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        settings = make(kalshi_ws_url=f"ws://{address}/x", kalshi_rest_url=f"http://{address}/x")
        with recording(settings) as streamer:
            report = msgspec.to_builtins(streamer.health())
            for profile, promised_s in (
                (verdict.DOCTOR, 15),
                (verdict.CONSOLE, 30),
                (verdict.ALERTS, 120),
            ):
                for after_s, cause in ((-1, "starting"), (1, "disconnected")):
                    now = datetime.fromtimestamp(
                        report["started_ns"] / 1e9 + promised_s + after_s, UTC
                    )
                    fresh = {**report, "updated_ns": int(now.timestamp() * 1e9)}
                    judged = verdict.judge(fresh, None, now, profile)
                    assert judged.cause == cause, judged
            assert "`kalshi-platform doctor` says why" in judged.sentence


@contextmanager
def looking(
    look: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[presence.Presence]:
    monkeypatch.setattr(presence, "CHECK_S", 0.01)
    monkeypatch.setattr(presence, "TIMEOUT_S", 0.2)
    looks = presence.Presence(look, "the store")
    looks.start()
    try:
        yield looks
    finally:
        looks.end()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_slow_store_is_reported_until_a_check_is_quick(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quick, done = threading.Event(), list[int]()

    def look() -> None:
        if not quick.is_set():
            quick.wait(0.4)
        done.append(1)

    with looking(look, monkeypatch) as looks:
        until(lambda: len(done) == 1)
        until(lambda: looks.trouble is not None)
        while len(done) < 4:
            assert looks.trouble is not None
            time.sleep(0.005)
        quick.set()
        until(lambda: looks.trouble is None)


def test_a_check_failing_in_any_way_is_reported_and_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = threading.Event()
    broken.set()

    def look() -> None:
        if broken.is_set():
            raise LookupError("no such thing")

    with looking(look, monkeypatch) as looks:
        until(lambda: looks.trouble is not None)
        assert "the store cannot be checked (LookupError: no such thing)" in str(looks.trouble)
        broken.clear()
        until(lambda: looks.trouble is None)
