"""Prometheus metrics of every shard, from the streamers' health reports.

A separate process serves them: one address has all shards, a scrape never delays recording, and a streamer that
has died still shows, as a growing age. Ages are computed at each scrape, by the clock that wrote the timestamps.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kalshi_platform import durable, typed_json
from kalshi_platform.errors import PlatformError
from kalshi_platform.health import health_report, monitored_shards, verdict
from kalshi_platform.processes import Identity
from kalshi_platform.settings import Settings

_VERDICTS = {
    verdict.Verdict.GOOD: 0.0,
    verdict.Verdict.WARN: 1.0,
    verdict.Verdict.ERROR: 2.0,
}
_STATES = (
    "starting",
    "connecting",
    "streaming",
    "quiet",
    "blocked",
    "draining",
    "stopping",
    "stopped",
)

_COUNTERS: Mapping[str, tuple[str, str]] = {
    "frames": ("kalshi_frames", "Frames received."),
    "deltas": ("kalshi_deltas", "Order-book deltas received."),
    "snapshots": ("kalshi_snapshots", "Order-book snapshots received."),
    "trades": ("kalshi_trades", "Trades received."),
    "malformed": (
        "kalshi_malformed_frames",
        "Frames that contradict the exchange's documentation.",
    ),
    "gaps": ("kalshi_gaps", "Sequence gaps; each has a row in stream_events."),
    "connections": ("kalshi_connections", "Connections made; all but the first are reconnects."),
    "journal_records": ("kalshi_journal_records", "Records made durable in the journal so far."),
}
_AGES: Mapping[str, tuple[str, str]] = {
    "updated_ns": ("kalshi_report_age_seconds", "Age of the streamer's last report."),
    "last_frame_ns": ("kalshi_last_frame_age_seconds", "Age of the last frame received."),
    "last_heard_ns": ("kalshi_last_heard_age_seconds", "Age of the last bytes, pings included."),
    "last_durable_ns": ("kalshi_last_durable_write_age_seconds", "Age of the last durable write."),
    "started_ns": ("kalshi_streamer_uptime_seconds", "Seconds since the streamer started."),
}
_GAUGES: Mapping[str, tuple[str, str]] = {
    "markets": ("kalshi_markets", "Markets followed."),
    "synced": ("kalshi_books_synced", "Markets whose book is synced."),
    "journal_backlog_bytes": (
        "kalshi_journal_backlog_bytes",
        "Bytes received and not durable yet.",
    ),
}


class ShardCollector(Collector):
    """The platform's metrics on this machine, read from its files at each scrape."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def describe(self) -> list[Metric]:
        """Empty, so that registration does not read the files."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every metric family, with a sample for each shard that has run here."""
        now_ns = time.time_ns()
        shards = _shards(self._settings, datetime.fromtimestamp(now_ns / 1e9, UTC))
        yield from _streamers(shards, now_ns)
        yield from _numbers(shards, now_ns)
        yield from _stores(shards, now_ns)
        yield _latency(shards)
        yield _wire_drift(shards)
        yield _journal_bytes(shards)
        yield from _disks(self._settings)
        yield from _incidents(self._settings.data_dir, now_ns)


def registry(settings: Settings) -> CollectorRegistry:
    """A registry that holds the platform's collector alone."""
    made = CollectorRegistry()
    made.register(ShardCollector(settings))
    return made


def serve(settings: Settings, host: str, port: int) -> tuple[threading.Thread, Any]:
    """Serve the metrics in a thread; returns the thread, and the server to shut down.

    Port 0 takes a free one (`server.server_port`). Raises `PlatformError` if the port cannot be bound.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=registry(settings))
    except OSError as error:
        raise PlatformError(
            f"The metrics cannot be served on {host}:{port} ({error.strerror})."
            " Set METRICS_PORT to a port that is free."
        ) from None
    return thread, server


# -- the alerts sensor's last result ---------------------------------------------------------------


def note_incidents(
    data_dir: Path, counts: Mapping[str, int], now: float, troubles: Sequence[str] = ()
) -> None:
    """Write the sensor's result for the metrics and `doctor`, which cannot read Dagster's storage.

    `counts`: open incidents by severity. `troubles`: why channels do not accept messages. Raises `OSError`.
    """
    noted = {"at": now, "open": dict(counts), "troubles": list(troubles)}
    durable.replace_unsynced(_incident_file(data_dir), json.dumps(noted).encode())


def channel_troubles(data_dir: Path) -> list[str]:
    """Why alert channels do not accept messages, as the sensor last noted; empty if it has not run."""
    try:
        return [
            str(trouble)
            for trouble in json.loads(_incident_file(data_dir).read_bytes())["troubles"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # no sensor has run yet, or one of an earlier version


def _incident_file(data_dir: Path) -> Path:
    return data_dir / "checks" / "alerts.json"


def _incidents(data_dir: Path, now_ns: int) -> Iterator[Metric]:
    """Open incidents, and the age of the sensor's last run."""
    age = GaugeMetricFamily(
        "kalshi_alerts_evaluated_age_seconds",
        "Seconds since Dagster's sensor `alerts` last ran; it runs every 30 s while the daemon lives.",
    )
    found = GaugeMetricFamily(
        "kalshi_incidents_open", "Open incidents that were reported.", labels=["severity"]
    )
    try:
        noted = json.loads(_incident_file(data_dir).read_bytes())
        age.add_metric([], max(now_ns / 1e9 - float(noted["at"]), 0.0))
        for severity, count in noted["open"].items():
            found.add_metric([severity], float(count))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # no sensor has run yet: the series is absent
    yield age
    yield found


# -- the streamers' health reports -----------------------------------------------------------------


class _Store(msgspec.Struct):
    """One store's part of a health report."""

    lag: int
    committed_ns: int
    trouble: str | None
    refused: bool
    rows: dict[str, int] = {}
    errors: dict[str, int] = {}
    oldest_ns: int = 0


class _Delay(msgspec.Struct):
    """Latency from receipt to a place, in milliseconds."""

    records: int
    p50: float
    p99: float
    max: float


class _Report(msgspec.Struct):
    """The fields of a health report (`streamer.Health`) that are shown."""

    pid: int
    pid_started: float
    state: str
    updated_ns: int
    started_ns: int
    last_frame_ns: int
    last_heard_ns: int
    last_durable_ns: int
    frames: int
    deltas: int
    snapshots: int
    malformed: int
    gaps: int
    connections: int
    journal_records: int
    journal_backlog_bytes: int
    markets: int
    synced: int
    stores: dict[str, _Store]
    trades: int = 0
    oldest_undurable_ms: int = 0
    disconnects: dict[str, int] = {}
    drift: dict[str, int] = {}
    delays_ms: dict[str, _Delay] = {}


@dataclass(frozen=True)
class _Shard:
    number: str
    folder: Path
    report: _Report | None
    """None if it cannot be read; `kalshi_feed_verdict` then says so."""
    judged: Sequence[verdict.Judgement]
    """Every fault, or what the streamer does if there is none."""


def _shards(settings: Settings, now: datetime) -> list[_Shard]:
    """Every shard that has run here, by number; shards that are no longer configured only until drained."""
    configured = settings.stream_shards
    wanted = monitored_shards.supervised(settings.journals_dir, configured, settings.stores)
    return [
        _shard(shard, configured, settings.journal_dir(shard), now)
        for shard in wanted
        if settings.journal_dir(shard).is_dir()
    ]


def _shard(shard: int, configured: int, folder: Path, now: datetime) -> _Shard:
    number = str(shard)
    try:
        raw = health_report.read(folder)
        judged = verdict.judge_shard(raw, shard, configured, None, now)
        report = None if raw is None else typed_json.convert(raw, _Report)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        judged = [verdict.no_report(str(error))]
        return _Shard(number, folder, None, judged)
    return _Shard(number, folder, report, judged)


def _streamers(shards: Sequence[_Shard], now_ns: int) -> Iterator[Metric]:
    """State and verdict of each shard's streamer."""
    up = GaugeMetricFamily(
        "kalshi_streamer_up", "1 while the shard's streamer lives and reports.", labels=["shard"]
    )
    state = GaugeMetricFamily(
        "kalshi_streamer_state", "1 for the state that it reports.", labels=["shard", "state"]
    )
    verdict = GaugeMetricFamily(
        "kalshi_feed_verdict",
        "Severity of each fault: 1 look at it today, 2 data is being lost. Without a fault, 0 for what the"
        " streamer does (also quiet and maintenance). The same verdict as the check `fresh` and the alerts.",
        labels=["shard", "cause"],
    )
    ended = CounterMetricFamily(
        "kalshi_disconnects", "Connections that ended, by cause.", labels=["shard", "cause"]
    )
    for shard in shards:
        for judged in shard.judged:
            verdict.add_metric([shard.number, judged.cause], _VERDICTS[judged.verdict])
        up.add_metric([shard.number], float(_lives(shard.report, now_ns)))
        if shard.report is None:
            continue
        for known_state in _STATES:
            state.add_metric([shard.number, known_state], float(shard.report.state == known_state))
        for cause, count in shard.report.disconnects.items():
            ended.add_metric([shard.number, cause], float(count))
    yield from (up, state, verdict, ended)


def _lives(report: _Report | None, now_ns: int) -> bool:
    return (
        report is not None
        and report.state != "stopped"
        and (now_ns - report.updated_ns) / 1e9 < verdict.ALERTS.report_s
        and Identity(report.pid, report.pid_started).alive
    )


def _numbers(shards: Sequence[_Shard], now_ns: int) -> Iterator[Metric]:
    """The families whose samples are one number of the report."""
    reports = [(shard.number, shard.report) for shard in shards if shard.report is not None]
    for key, (name, text) in _COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=["shard"])
        for number, report in reports:
            counter.add_metric([number], float(getattr(report, key)))
        yield counter
    for key, (name, text) in _GAUGES.items():
        gauge = GaugeMetricFamily(name, text, labels=["shard"])
        for number, report in reports:
            gauge.add_metric([number], float(getattr(report, key)))
        yield gauge
    undurable = GaugeMetricFamily(
        "kalshi_journal_oldest_undurable_seconds",
        "Age of the oldest record that was not durable at the last report; 0 if all were.",
        labels=["shard"],
    )
    for number, report in reports:
        undurable.add_metric([number], report.oldest_undurable_ms / 1e3)
    yield undurable
    for key, (name, text) in _AGES.items():
        gauge = GaugeMetricFamily(name, text, labels=["shard"])
        for number, report in reports:
            if at_ns := getattr(report, key):  # 0: has not happened yet
                gauge.add_metric([number], _age_s(at_ns, now_ns))
        yield gauge


def _latency(shards: Sequence[_Shard]) -> Metric:
    """Quantiles of the time from receipt to journal and stores."""
    family = Metric(
        "kalshi_delay_seconds",
        "From a frame's receipt until it is durable in the journal, or stored, since the streamer's start."
        " Quantiles are rounded up by at most a tenth; 1 is the longest.",
        "summary",
    )
    for shard in shards:
        for place, latency in (shard.report.delays_ms if shard.report else {}).items():
            labels = {"shard": shard.number, "place": place}
            if latency.records:
                for quantile, ms in (
                    ("0.5", latency.p50),
                    ("0.99", latency.p99),
                    ("1", latency.max),
                ):
                    family.add_sample(family.name, {**labels, "quantile": quantile}, ms / 1000)
                family.add_sample(f"{family.name}_count", labels, latency.records)
    return family


def _wire_drift(shards: Sequence[_Shard]) -> Metric:
    """Frames that are not as this version knows the wire, by what was found where."""
    family = CounterMetricFamily(
        "kalshi_wire_drift_frames",
        "Loaded frames with a field or of a type that is not known, of another JSON type, or without a field"
        " that such frames had, since the streamer's start.",
        labels=["shard", "what", "type", "path"],
    )
    for shard in shards:
        for finding, count in (shard.report.drift if shard.report else {}).items():
            what, frame_type, path = finding.split("|", 2)
            family.add_metric([shard.number, what, frame_type, path], float(count))
    return family


def _stores(shards: Sequence[_Shard], now_ns: int) -> Iterator[Metric]:
    """Lag, age, rows and errors of each shard's stores."""
    labels = ["shard", "store"]
    lag = GaugeMetricFamily(
        "kalshi_store_lag_records", "Durable journal records that the store lacks.", labels=labels
    )
    age = GaugeMetricFamily(
        "kalshi_store_last_write_age_seconds",
        "Seconds since the store's last write.",
        labels=labels,
    )
    behind = GaugeMetricFamily(
        "kalshi_store_behind_seconds",
        "Age of the oldest durable record that the store lacks; 0 while it lacks none.",
        labels=labels,
    )
    trouble = GaugeMetricFamily(
        "kalshi_store_trouble", "1 while the store accepts no writes, or is behind.", labels=labels
    )
    refused = GaugeMetricFamily(
        "kalshi_store_refused",
        "1 while it refuses writes for a reason that no retry removes.",
        labels=labels,
    )
    rows = CounterMetricFamily(
        "kalshi_rows", "Rows written to the store.", labels=[*labels, "dataset"]
    )
    errors = CounterMetricFamily(
        "kalshi_store_errors",
        "Failed writes, by ClickHouse's error code, or `unreachable` or `disk` if there is none."
        " Loaders that stopped: `damage` to the journal, or a `fault`.",
        labels=[*labels, "code"],
    )
    for shard in shards:
        for store, state in (shard.report.stores if shard.report else {}).items():
            values = [shard.number, store]
            lag.add_metric(values, float(state.lag))
            if state.committed_ns:
                age.add_metric(values, _age_s(state.committed_ns, now_ns))
            if state.oldest_ns or not state.lag:
                behind.add_metric(values, _age_s(state.oldest_ns, now_ns) if state.lag else 0.0)
            trouble.add_metric(values, float(state.trouble is not None))
            refused.add_metric(values, float(state.refused))
            for dataset, count in state.rows.items():
                rows.add_metric([*values, dataset], float(count))
            for code, count in state.errors.items():
                errors.add_metric([*values, code], float(count))
    yield from (lag, age, behind, trouble, refused, rows, errors)


def _age_s(at_ns: int, now_ns: int) -> float:
    return max((now_ns - at_ns) / 1e9, 0.0)


def _journal_bytes(shards: Sequence[_Shard]) -> Metric:
    family = GaugeMetricFamily(
        "kalshi_journal_bytes", "Bytes of the journal on disk.", labels=["shard"]
    )
    for shard in shards:
        family.add_metric([shard.number], float(folder_bytes(shard.folder)))
    return family


def folder_bytes(folder: Path) -> int:
    """Allocated bytes of all files below a folder; files that vanish meanwhile count zero."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(base) / name).lstat().st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def _disks(settings: Settings) -> Iterator[Metric]:
    """Free and total bytes of the disks of data folder and archive."""
    free = GaugeMetricFamily(
        "kalshi_disk_free_bytes", "Free bytes on the disk of a folder.", labels=["folder"]
    )
    size = GaugeMetricFamily(
        "kalshi_disk_size_bytes", "Size in bytes of the file system of a folder.", labels=["folder"]
    )
    folders = {"data": settings.data_dir}
    if settings.archive_base is None:  # object storage does not fill up
        folders["archive"] = settings.archive_dir
    for name, folder in folders.items():
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        usage = shutil.disk_usage(existing)
        free.add_metric([name], float(usage.free))
        size.add_metric([name], float(usage.total))
    yield free
    yield size
