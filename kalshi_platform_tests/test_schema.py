"""What a dataset says of itself is enough for everything that is done with it."""

from __future__ import annotations

import pytest

from kalshi_platform.archive import hours
from kalshi_platform.archive.compaction import SORTED_BY
from kalshi_platform.archive.export import PUBLIC
from kalshi_platform.clickhouse.hot_retention import RETAINED
from kalshi_platform.clickhouse.verified_inserts import KEYS
from kalshi_platform.loading.restore import RESTORED
from kalshi_platform.schema import DATASETS, RECORDED, Dataset, Recorded


@pytest.mark.parametrize("dataset", RECORDED, ids=lambda dataset: dataset.name)
def test_a_recorded_dataset_is_sealed_compacted_restored_and_retained(dataset: Recorded) -> None:
    assert all(dataset.name in places for places in (hours.RECORDED, SORTED_BY, DATASETS))
    for places in (hours.BUILT, RESTORED, RETAINED, KEYS):
        assert (dataset.name in places) is dataset.hot
    names = {column.name for column in dataset.columns}
    assert {*dataset.sort, *dataset.identity, dataset.time} <= names
    assert (dataset.name in PUBLIC) is dataset.public


def test_a_recorded_dataset_without_these_facts_cannot_be_made() -> None:
    with pytest.raises(TypeError, match=r"sort.*identity"):
        Recorded("toy", RECORDED[0].columns, "", time="ingest_ts", public=False)  # type: ignore[call-arg]


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=lambda dataset: dataset.name)
def test_the_time_of_a_dataset_is_a_column_that_is_never_null(dataset: Dataset) -> None:
    (column,) = (column for column in dataset.columns if column.name == dataset.time)
    assert not column.nullable
