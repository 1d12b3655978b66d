"""Rules and metrics in Prometheus itself: Debian's package `prometheus` has the server and promtool."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]

from kalshi_platform import settings as platform_settings
from kalshi_platform.health import metrics
from kalshi_platform.settings import Settings
from kalshi_platform_tests.health.test_metrics import INFRA, health, leave
from kalshi_platform_tests.ports import free_ports

pytestmark = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")),
    reason="Prometheus is not installed (Debian: apt-get install prometheus)",
)
PATIENCE_S = 60.0


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Settings, int]]:
    """Serve the metrics of a healthy shard; yields the port."""
    settings = platform_settings.load(
        _env_file=None, kalshi_data_dir=tmp_path / "data", use_clickhouse=False
    )
    leave(settings, health(0))
    thread, server = metrics.serve(settings, "127.0.0.1", 0)
    yield settings, server.server_port
    server.shutdown()
    server.server_close()
    thread.join(timeout=5.0)


def promtool(*argv: str, given: str | None = None) -> str:
    done = subprocess.run(
        ["promtool", *argv], input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_finds_nothing_wrong_with_the_metrics(served: tuple[Settings, int]) -> None:
    text = httpx.get(f"http://127.0.0.1:{served[1]}/metrics", trust_env=False).text
    promtool("check", "metrics", given=text)


def test_promtool_takes_the_configuration_and_the_rules() -> None:
    promtool("check", "config", str(INFRA / "prometheus.yml"))
    promtool("check", "rules", str(INFRA / "alerts.yml"))


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((INFRA / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_a_server_scrapes_the_metrics_and_fires_the_rules(
    served: tuple[Settings, int], tmp_path: Path
) -> None:
    """The rules have no `for` here, so that a minute is enough; the streamer is dead."""
    settings, target = served
    leave(settings, health(0, pid_started=1.0))
    quick = yaml.safe_load((INFRA / "alerts.yml").read_text())
    for group in quick["groups"]:
        for rule in group["rules"]:
            rule["for"] = "0s"
    config = yaml.safe_load((INFRA / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{target}"]
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(quick))
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    argv = [
        "prometheus",
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        fired = alerts_once_there(port, "KalshiFeedStandsStill", tmp_path / "log")
        assert [alert["labels"]["cause"] for alert in fired] == ["streamer down"]
        asked = httpx.get(f"http://127.0.0.1:{port}/api/v1/rules", trust_env=False).json()
        loaded = [rule for group in asked["data"]["groups"] for rule in group["rules"]]
        assert {rule["name"] for rule in loaded} == {rule["alert"] for rule in rules()}
        assert {rule["health"] for rule in loaded} <= {"ok", "unknown"}, json.dumps(loaded)
    finally:
        server.terminate()
        server.wait(timeout=PATIENCE_S)


def alerts_once_there(port: int, name: str, log: Path) -> list[dict[str, Any]]:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            url = f"http://127.0.0.1:{port}/api/v1/alerts"
            alerts = httpx.get(url, trust_env=False).json()["data"]["alerts"]
        except (httpx.HTTPError, ValueError):
            alerts = []
        if found := [alert for alert in alerts if alert["labels"]["alertname"] == name]:
            return found
        time.sleep(0.3)
    raise AssertionError(log.read_text())
