"""The reader gives the same from an object store as from a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from polars.testing import assert_frame_equal
from pyarrow import fs

from kalshi_platform.reading import Archive
from kalshi_platform_tests.analytics.test_against_reference import HOUR
from kalshi_platform_tests.object_store import BUCKET, KEY, KEY_ID, ObjectStore, object_store
from kalshi_platform_tests.reading.test_archive import FIVE, ladders, outage


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


def test_an_archive_on_object_storage_gives_the_same(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = outage(tmp_path / "archive")
    fs.copy_files(
        str(tmp_path / "archive"),
        f"{BUCKET}/prefix",
        source_filesystem=fs.LocalFileSystem(),
        destination_filesystem=store.files(),
    )
    for name, value in {
        "S3_ENDPOINT_URL": store.url,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": KEY,
        "KALSHI_DATA_DIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    remote = Archive(f"s3://{BUCKET}/prefix")
    assert KEY not in repr(remote)
    for method in ("top", "depth", "imbalance", "ladder", "trades", "events", "bars"):
        one, other = (
            getattr(archive, method)("KXA-1", HOUR, FIVE, allow_gaps=True)
            for archive in (local, remote)
        )
        assert_frame_equal(one, other)
    assert_frame_equal(local.coverage("KXA-1", HOUR, FIVE), remote.coverage("KXA-1", HOUR, FIVE))
    replays = [
        [
            (event, ladders(book))
            for event, book in archive.replay("KXA-1", HOUR, FIVE, allow_gaps=True)
        ]
        for archive in (local, remote)
    ]
    assert replays[0] == replays[1]
