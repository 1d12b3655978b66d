"""The recorded hours as assets: a materialisation rebuilds an hour once for all selected datasets."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest

from kalshi_platform.errors import PlatformError
from kalshi_platform.orchestration.metadata import HOURS, hour_of, partition_key
from kalshi_platform.orchestration.recorded_tables import latest_levels, recorded_hour
from kalshi_platform.schema import ORDERBOOK_EVENTS, RECORDED
from kalshi_platform_tests.orchestration.stand_in import (
    DATASETS,
    HOUR,
    StandInPlatform,
    hour_report,
)

KEY = "2026-11-20-14:00"


def build(
    instance: dg.DagsterInstance, platform: StandInPlatform, *wanted: str
) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [recorded_hour],
        selection=list(wanted) or None,
        partition_key=KEY,
        instance=instance,
        resources={"platform": platform},
        raise_on_error=False,
    )


def events(result: dg.ExecuteInProcessResult) -> list[dg.AssetMaterialization]:
    return [event.materialization for event in result.get_asset_materialization_events()]


def failure(result: dg.ExecuteInProcessResult) -> str:
    return str(result.filter_events(lambda event: event.is_step_failure)[0].event_specific_data)


def test_all_datasets_of_an_hour_are_rebuilt_at_once(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    platform.hours[HOUR] = hour_report()
    made = events(build(instance, platform))
    assert {event.asset_key.to_user_string() for event in made} == set(DATASETS)
    assert {event.partition for event in made} == {KEY}
    assert platform.rebuilt == [HOUR]


@pytest.mark.parametrize("dataset", DATASETS)
def test_one_dataset_alone_can_be_materialised(
    instance: dg.DagsterInstance, platform: StandInPlatform, dataset: str
) -> None:
    platform.hours[HOUR] = hour_report()
    made = events(build(instance, platform, dataset))
    assert [event.asset_key.to_user_string() for event in made] == [dataset]
    assert made[0].metadata["rows"].value == 1000


def test_a_dataset_without_rows_is_reported_with_none(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    platform.hours[HOUR] = hour_report(datasets=("stream_events",))
    result = build(instance, platform)
    assert result.success
    rows = {e.asset_key.to_user_string(): e.metadata["rows"].value for e in events(result)}
    assert rows == {name: 1000 if name == "stream_events" else 0 for name in DATASETS}


def test_the_open_hour_says_that_it_is_not_complete(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    platform.hours[HOUR] = hour_report(complete=False)
    assert {e.metadata["complete"].value for e in events(build(instance, platform))} == {False}


def test_an_hour_that_nothing_holds_fails_with_the_sentence(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    platform.hours[HOUR] = PlatformError("Neither journal nor ClickHouse has that hour.")
    result = build(instance, platform)
    assert not result.success
    assert "Neither journal nor ClickHouse has that hour." in failure(result)


def test_an_hour_that_was_not_recorded_is_no_failure(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    platform.hours[HOUR] = hour_report(datasets=())
    result = build(instance, platform)
    assert result.success
    made = events(result)
    assert {event.asset_key.to_user_string() for event in made} == set(DATASETS)
    assert {event.metadata["rows"].value for event in made} == {0}
    assert f"Nothing is recorded of the hour {KEY} UTC." in str(made[0].metadata["reason"].value)


def test_an_hour_whose_reported_rows_are_gone_is_a_failure(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    platform.hours[HOUR] = hour_report()
    assert build(instance, platform).success
    platform.hours[HOUR] = hour_report(datasets=())
    result = build(instance, platform)
    assert not result.success
    assert "had 1,000 rows" in failure(result)


def test_the_open_hour_is_a_partition_and_the_next_one_is_not() -> None:
    now = datetime(2026, 11, 20, 14, 59, 59, tzinfo=UTC)
    keys = HOURS.get_partition_keys(current_time=now)
    assert keys[-1] == KEY
    assert keys[0] == "2025-11-01-00:00"


def test_partition_keys_and_hours_are_each_others_inverse_in_utc() -> None:
    assert hour_of(KEY) == HOUR
    assert partition_key(HOUR) == KEY
    eastern = HOUR.astimezone(tz=datetime.now().astimezone().tzinfo)
    assert partition_key(eastern) == KEY
    assert partition_key(HOUR + timedelta(hours=10)) == "2026-11-21-00:00"
    with pytest.raises(ValueError, match="no time zone"):
        partition_key(HOUR.replace(tzinfo=None))


def test_the_ui_shows_every_column_of_the_one_schema() -> None:
    specs = {spec.key.to_user_string(): spec for spec in [*recorded_hour.specs, latest_levels]}
    assert set(specs) == {dataset.name for dataset in RECORDED} | {"latest_levels"}
    shown = specs["orderbook_events"].metadata["dagster/column_schema"]
    assert [c.name for c in shown.columns] == [c.name for c in ORDERBOOK_EVENTS.columns]
    assert all(spec.description for spec in specs.values())
