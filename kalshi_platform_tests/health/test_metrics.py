"""The metrics of every shard as Prometheus scrapes them, and the alerting rules on them."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
import promql_parser
import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kalshi_platform import settings as platform_settings
from kalshi_platform.errors import PlatformError
from kalshi_platform.health import metrics
from kalshi_platform.journal.latency import LatencySummary
from kalshi_platform.processes import Identity
from kalshi_platform.recorder.streamer import Health, StoreHealth
from kalshi_platform.settings import Settings

INFRA = Path(__file__).resolve().parents[2] / "infra" / "prometheus"
SECOND_NS = 10**9


def health(shard: int = 0, **values: Any) -> Health:
    """The report of a healthy streamer, with `values` replaced."""
    own, now = Identity.own(), time.time_ns()
    store = StoreHealth(
        lag=7,
        committed_ns=now - SECOND_NS,
        loaded_ns=now - SECOND_NS,
        trouble=None,
        refused=False,
        rows={"orderbook_events": 990, "stream_events": 10},
        errors={"241 MEMORY_LIMIT_EXCEEDED": 3},
        oldest_ns=now - 20 * SECOND_NS,
    )
    well = Health(
        pid=own.pid,
        pid_started=own.started,
        shard=shard,
        shards=2,
        state="streaming",
        started_ns=now - 60 * SECOND_NS,
        updated_ns=now,
        updated_monotonic_ns=time.monotonic_ns(),
        last_frame_ns=now - 2 * SECOND_NS,
        last_heard_ns=now,
        last_durable_ns=now,
        frames=1000,
        deltas=900,
        trades=80,
        snapshots=90,
        gaps=2,
        malformed=1,
        connections=3,
        markets=12,
        synced=11,
        journal_records=5000,
        journal_backlog_bytes=4096,
        oldest_undurable_ms=1_500,
        lag_frames=7,
        stores={"clickhouse": store},
        trouble=None,
        disconnects={"silent for 30 s": 2},
        drift={"unknown field|orderbook_delta|msg.a|b": 4},
        delays_ms={
            "journal": LatencySummary(1000, 20.0, 40.0, 60.0),
            "clickhouse": LatencySummary(0, 0.0, 0.0, 0.0),
        },
    )
    return dataclasses.replace(well, **values)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return platform_settings.load(
        _env_file=None, kalshi_data_dir=tmp_path, use_clickhouse=False, stream_shards=2
    )


def leave(settings: Settings, *reports: Health) -> None:
    for report in reports:
        folder = settings.journal_dir(report.shard)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "health.json").write_text(msgspec.json.encode(report).decode())
        (folder / "000.journal").write_bytes(b"x" * 20_000)


def scrape(settings: Settings) -> dict[str, dict[tuple[str, ...], float]]:
    """Samples by name, then by the values of their labels in the order of the labels' names."""
    return parsed(generate_latest(metrics.registry(settings)).decode())


def parsed(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[
                tuple(sample.labels[k] for k in sorted(sample.labels))
            ] = sample.value
    return found


def test_one_address_has_every_shard(settings: Settings) -> None:
    leave(settings, health(0), health(1, frames=5))
    found = scrape(settings)
    assert found["kalshi_frames_total"] == {("0",): 1000, ("1",): 5}
    assert found["kalshi_gaps_total"][("0",)] == 2
    assert found["kalshi_streamer_up"] == {("0",): 1, ("1",): 1}
    assert found["kalshi_feed_verdict"][("recording", "0")] == 0
    assert found["kalshi_streamer_state"][("0", "streaming")] == 1
    assert found["kalshi_streamer_state"][("0", "quiet")] == 0
    assert found["kalshi_rows_total"][("orderbook_events", "0", "clickhouse")] == 990
    assert found["kalshi_store_errors_total"] == {
        ("241 MEMORY_LIMIT_EXCEEDED", shard, "clickhouse"): 3 for shard in "01"
    }
    assert found["kalshi_disconnects_total"][("silent for 30 s", "0")] == 2
    assert found["kalshi_wire_drift_frames_total"] == {
        ("msg.a|b", shard, "orderbook_delta", "unknown field"): 4 for shard in "01"
    }
    assert found["kalshi_store_lag_records"][("0", "clickhouse")] == 7
    assert 20 <= found["kalshi_store_behind_seconds"][("0", "clickhouse")] < 60
    assert found["kalshi_delay_seconds"][("journal", "0.99", "0")] == 0.04
    assert ("clickhouse", "0.99", "0") not in found["kalshi_delay_seconds"]  # no frame came yet
    assert found["kalshi_journal_bytes"][("0",)] >= 20_000
    assert found["kalshi_journal_oldest_undurable_seconds"] == {("0",): 1.5, ("1",): 1.5}
    assert 2 <= found["kalshi_last_frame_age_seconds"][("0",)] < 60
    assert found["kalshi_disk_free_bytes"][("data",)] > 0


def test_a_streamer_that_is_dead_still_shows_and_its_age_grows(settings: Settings) -> None:
    long_ago = time.time_ns() - 600 * SECOND_NS
    leave(settings, health(pid_started=1.0, updated_ns=long_ago, last_frame_ns=long_ago))
    found = scrape(settings)
    assert found["kalshi_streamer_up"] == {("0",): 0}
    assert found["kalshi_feed_verdict"] == {("streamer down", "0"): 2}
    assert found["kalshi_last_frame_age_seconds"][("0",)] >= 600


def test_a_quiet_exchange_is_well(settings: Settings) -> None:
    leave(settings, health(state="quiet", last_frame_ns=time.time_ns() - 9999 * SECOND_NS))
    assert scrape(settings)["kalshi_feed_verdict"] == {("quiet", "0"): 0}


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"pid": 1}', '{"state": "stopped"}'])
def test_a_report_that_cannot_be_read_spoils_no_other(settings: Settings, damaged: str) -> None:
    leave(settings, health(0), health(1))
    (settings.journal_dir(1) / "health.json").write_text(damaged)
    found = scrape(settings)
    assert found["kalshi_streamer_up"] == {("0",): 1, ("1",): 0}
    assert found["kalshi_feed_verdict"][("no report", "1")] == 1
    assert set(found["kalshi_frames_total"]) == {("0",)}


def test_a_time_that_is_not_set_has_no_age(settings: Settings) -> None:
    leave(settings, health(last_frame_ns=0))
    assert "kalshi_last_frame_age_seconds" not in scrape(settings)


def test_nothing_recorded_yet_is_an_answer_too(settings: Settings) -> None:
    found = scrape(settings)
    assert "kalshi_streamer_up" not in found
    assert found["kalshi_disk_size_bytes"][("archive",)] > 0


def test_what_the_alerts_sensor_saw_is_shown(settings: Settings) -> None:
    metrics.note_incidents(settings.data_dir, {"critical": 1, "warning": 0}, time.time() - 45)
    found = scrape(settings)
    assert found["kalshi_incidents_open"] == {("critical",): 1, ("warning",): 0}
    assert 45 <= found["kalshi_alerts_evaluated_age_seconds"][()] < 100


def test_metrics_are_served_and_a_taken_port_is_named(settings: Settings) -> None:
    leave(settings, health())
    thread, server = metrics.serve(settings, "127.0.0.1", 0)
    port = server.server_port
    try:
        answer = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False, timeout=60)
        assert parsed(answer.raise_for_status().text)["kalshi_frames_total"] == {("0",): 1000}
        with pytest.raises(PlatformError, match=rf"127\.0\.0\.1:{port} .*METRICS_PORT"):
            metrics.serve(settings, "127.0.0.1", port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# -- infra/prometheus ------------------------------------------------------------------------------

RULES = [
    rule
    for group in yaml.safe_load((INFRA / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_each_rule_is_valid_and_uses_existing_metrics(
    rule: dict[str, Any], settings: Settings
) -> None:
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"\d+[smhd]", rule.get("for", "1m"))
    assert rule["labels"]["severity"] in {"critical", "warning"}
    promql_parser.parse(rule["expr"])
    leave(settings, health())
    metrics.note_incidents(settings.data_dir, {"critical": 0}, time.time())
    text = generate_latest(metrics.registry(settings)).decode()
    samples = [s for f in text_string_to_metric_families(text) for s in f.samples]
    existing = {sample.name for sample in samples}
    queried = set(re.findall(r"\bkalshi_\w+", rule["expr"]))
    assert queried
    assert queried <= existing
    labels = {name for s in samples if s.name in queried for name in s.labels}
    annotations = " ".join(rule["annotations"].values())
    assert set(re.findall(r"\$labels\.(\w+)", annotations)) <= labels


def test_every_rule_names_an_existing_runbook_section() -> None:
    runbook = (INFRA.parents[1] / "docs" / "operations.md").read_text()
    sections = set(re.findall(r"^#+ (.+)$", runbook, re.MULTILINE))
    assert {rule["annotations"]["runbook"] for rule in RULES} <= sections


def test_the_runbook_has_every_metric_and_no_other(settings: Settings) -> None:
    leave(settings, health())
    metrics.note_incidents(settings.data_dir, {"critical": 0}, time.time())
    runbook = (INFRA.parents[1] / "docs" / "operations.md").read_text()
    assert set(re.findall(r"`(kalshi_\w+)`", runbook)) == set(scrape(settings))


def test_the_scrape_configuration_has_the_rules_and_the_port() -> None:
    config = yaml.safe_load((INFRA / "prometheus.yml").read_text())
    assert config["rule_files"] == ["alerts.yml"]
    (job,) = config["scrape_configs"]
    assert job["static_configs"][0]["targets"] == ["127.0.0.1:9464"]
