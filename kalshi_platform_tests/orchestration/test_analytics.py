"""Spreads, depth and imbalance are computed automatically for new, late and rebuilt hours."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from kalshi_platform.archive import LocalArchive
from kalshi_platform.orchestration.analytics import analytics_automation, analytics_hour
from kalshi_platform.orchestration.metadata import partition_key
from kalshi_platform.orchestration.recorded_tables import recorded_hour
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.schema import ANALYTICS
from kalshi_platform_tests.analytics.recording import HOUR, record_hour
from kalshi_platform_tests.archived import paths

NAMES = {dataset.name for dataset in ANALYTICS}
DEFS = dg.Definitions(
    assets=[recorded_hour, analytics_hour],
    sensors=[analytics_automation],
    resources={"platform": KalshiResource()},
)
# Two whole hours that are long past, and one that is the newest.
LATE = partition_key(HOUR)
NEWEST = partition_key(
    datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=1)
)


def compute(
    instance: dg.DagsterInstance, root: Path, *wanted: str, clickhouse: str = "0"
) -> dg.ExecuteInProcessResult:
    platform = KalshiResource(
        overrides={
            "parquet_dir": str(root),
            "use_clickhouse": clickhouse,
            "clickhouse_url": "http://127.0.0.1:1",
        }
    )
    return dg.materialize(
        [analytics_hour],
        selection=list(wanted) or None,
        partition_key=LATE,
        instance=instance,
        resources={"platform": platform},
        raise_on_error=False,
    )


def report(instance: dg.DagsterInstance, hour: str, *datasets: str) -> None:
    """Report an hour as the streamer does when it seals it."""
    for dataset in datasets:
        instance.report_runless_asset_event(
            dg.AssetMaterialization(asset_key=dataset, partition=hour)
        )


def requested(
    instance: dg.DagsterInstance, cursor: Any = None
) -> tuple[set[tuple[str, str | None]], Any]:
    """The (asset, partition) pairs that the sensor requests in one tick, and its cursor."""
    result = dg.evaluate_automation_conditions(
        defs=DEFS,
        instance=instance,
        asset_selection=dg.AssetSelection.groups("analytics"),
        cursor=cursor,
    )
    wanted = {
        (one.key.to_user_string(), partition)
        for one in result.results
        for partition in result.get_requested_partitions(one.key)
    }
    return wanted, result.cursor


def test_an_hour_is_computed_with_all_that_a_person_wants_to_see(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    record_hour(tmp_path)
    result = compute(instance, tmp_path)
    assert result.success
    events = [event.materialization for event in result.get_asset_materialization_events()]
    assert {event.asset_key.to_user_string() for event in events} == NAMES
    for event in events:
        assert event.partition == LATE
        shown = event.metadata
        name = event.asset_key.to_user_string()
        (table,) = LocalArchive(tmp_path).read(name, HOUR)
        assert shown["rows"].value == table.num_rows
        assert shown["markets"].value == 3
        assert shown["complete"].value is True
        assert shown["gaps"].value == 1
        picture = base64.b64decode(str(shown["plot"].value).split("base64,")[1].rstrip(")"))
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < 100_000
        assert isinstance(shown["preview"], dg.TableMetadataValue)
        assert len(shown["preview"].records) == 10


def test_one_dataset_alone_can_be_computed(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    record_hour(tmp_path)
    result = compute(instance, tmp_path, "depth")
    assert [e.asset_key for e in result.get_asset_materialization_events()] == [
        dg.AssetKey("depth")
    ]


def test_an_hour_that_is_not_recorded_is_no_failure(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    result = compute(instance, tmp_path)
    assert result.success
    events = [event.materialization for event in result.get_asset_materialization_events()]
    assert {event.asset_key.to_user_string() for event in events} == NAMES
    assert {event.metadata["rows"].value for event in events} == {0}
    assert "Nothing is recorded of the hour" in str(events[0].metadata["reason"].value)


def test_an_hour_whose_files_are_gone_fails_with_the_remedy(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    event = dg.AssetMaterialization("orderbook_events", partition=LATE, metadata={"rows": 7})
    instance.report_runless_asset_event(event)
    result = compute(instance, tmp_path)
    assert not result.success
    (failure,) = result.filter_events(lambda event: event.is_step_failure)
    assert "Materialise orderbook_events of that hour first." in str(failure.event_specific_data)


def test_without_clickhouse_files_are_written_and_the_step_retried(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kalshi_platform.orchestration.analytics.RETRY_S", 0.01)
    record_hour(tmp_path)
    result = compute(instance, tmp_path, "spreads", clickhouse="1")
    assert not result.success
    retries = result.filter_events(lambda event: event.is_step_up_for_retry)
    assert len(retries) == 5
    assert paths(tmp_path, "spreads", HOUR)


def test_the_newest_and_a_late_hour_are_both_asked_for(instance: dg.DagsterInstance) -> None:
    _, cursor = requested(instance)
    for hour in (NEWEST, LATE):
        report(instance, hour, "orderbook_events", "stream_events", "book_checkpoints")
    wanted, cursor = requested(instance, cursor)
    assert wanted == {(name, hour) for name in NAMES for hour in (NEWEST, LATE)}
    assert requested(instance, cursor)[0] == set()


def test_the_first_hour_without_checkpoints_is_computed(
    instance: dg.DagsterInstance,
) -> None:
    _, cursor = requested(instance)
    report(instance, NEWEST, "orderbook_events", "stream_events")
    assert requested(instance, cursor)[0] == {(name, NEWEST) for name in NAMES}


def test_an_hour_that_is_sealed_or_rebuilt_is_asked_for_again(
    instance: dg.DagsterInstance,
) -> None:
    _, cursor = requested(instance)
    report(instance, LATE, "orderbook_events", "stream_events")  # while it was open
    _, cursor = requested(instance, cursor)
    for name in NAMES:
        report(instance, LATE, name)
    wanted, cursor = requested(instance, cursor)
    assert wanted == set()
    report(instance, LATE, "orderbook_events", "stream_events")  # sealed
    assert requested(instance, cursor)[0] == {(name, LATE) for name in NAMES}


def test_the_automation_runs_by_default_and_is_described() -> None:
    assert analytics_automation.default_status is dg.DefaultSensorStatus.RUNNING
    for spec in analytics_hour.specs:
        assert spec.group_name == "analytics"
        assert spec.description
        assert spec.owners
        assert spec.metadata["dagster/column_schema"].columns
