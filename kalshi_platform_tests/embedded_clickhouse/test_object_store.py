"""`s3()` reaches the archive's bucket on a real object store, and nothing else."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import polars as pl
import pytest

from kalshi_platform_tests.object_store import BUCKET, KEY, KEY_ID, ObjectStore, object_store


@pytest.fixture
def store() -> Iterator[ObjectStore]:
    with object_store() as made:
        yield made


@pytest.fixture
def url(store: ObjectStore, tmp_path: Path) -> Iterator[str]:
    """An embedded ClickHouse with its archive in that store; its password is `secret`."""
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "kalshi_platform",
            "clickhouse",
            "--port",
            "0",
            "--path",
            str(tmp_path / "clickhouse"),
        ],
        env=os.environ
        | {
            "CLICKHOUSE_PASSWORD": "secret",
            "PARQUET_DIR": f"s3://{BUCKET}/recorded",
            "AWS_ENDPOINT_URL": store.url,
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": KEY,
            "AWS_REGION": "us-east-1",
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        yield child.stdout.readline().split()[-1]
    finally:
        child.terminate()
        child.communicate(timeout=60)


def asked(url: str, sql: str) -> httpx.Response:
    return httpx.post(url, content=sql, auth=("default", "secret"), timeout=60)


def test_s3_reads_null_for_columns_that_an_older_file_lacks(url: str, store: ObjectStore) -> None:
    for name, columns in (("old", {"a": [1, 2]}), ("new", {"a": [3], "clock": [7]})):
        frame = io.BytesIO()
        pl.DataFrame(columns).write_parquet(frame)
        with store.files().open_output_stream(f"{BUCKET}/recorded/{name}.parquet") as out:
            out.write(frame.getvalue())
    place = f"'{store.url}/{BUCKET}/recorded/*.parquet', '{KEY_ID}', '{KEY}', 'Parquet'"
    answer = asked(
        url, f"SELECT a, clock FROM s3({place}) ORDER BY a SETTINGS schema_inference_mode = 'union'"
    )
    assert answer.text == "1\t\\N\n2\t\\N\n3\t7\n"


def test_s3_reaches_the_archives_bucket_only(url: str, store: ObjectStore) -> None:
    frame = io.BytesIO()
    pl.DataFrame({"a": [1, 2, 4]}).write_parquet(frame)
    with store.files().open_output_stream(f"{BUCKET}/recorded/t.parquet") as out:
        out.write(frame.getvalue())
    place = f"'{store.url}/{BUCKET}/recorded/{{}}.parquet', '{KEY_ID}', '{KEY}', 'Parquet'"
    answer = asked(url, f"SELECT sum(a) FROM s3({place.format('t')})")
    assert answer.text == "7\n"
    written = asked(url, f"INSERT INTO FUNCTION s3({place.format('u')}) SELECT 5 AS a")
    assert written.status_code == 200, written.text
    assert asked(url, f"SELECT sum(a) FROM s3({place.format('u')})").text == "5\n"
    before = len(store.requests)
    for elsewhere in (f"{store.url}/other/t.parquet", "http://127.0.0.1:1/archive/t.parquet"):
        refused = asked(url, f"SELECT * FROM s3('{elsewhere}', 'Parquet', 'a Int64')")
        assert refused.headers["X-ClickHouse-Exception-Code"] == "497", refused.text
        assert KEY not in refused.text
    assert len(store.requests) == before
