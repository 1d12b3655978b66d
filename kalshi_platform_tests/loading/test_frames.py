"""Every journal record is in the archive, byte for byte, and an hour of any age is rebuilt from there."""

from __future__ import annotations

import json
import random
import shutil
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform import settings as platform_settings
from kalshi_platform.archive import (
    Archive,
    LocalArchive,
    checksum,
    compaction,
    hours,
    local_file,
    open_archive,
    watermarks,
    write_durably,
)
from kalshi_platform.errors import StoreRefused
from kalshi_platform.journal import reader
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.reader import LogOffset, RecordRange
from kalshi_platform.loading.frame_rows import TYPES, JournalFrames, Numbers, frames_table, records
from kalshi_platform.loading.frames_retention import delete_expired
from kalshi_platform.loading.loader import Loader
from kalshi_platform.loading.rebuild import rebuild
from kalshi_platform.loading.sinks import ParquetSink
from kalshi_platform.schema import FRAMES, ORDERBOOK_EVENTS
from kalshi_platform.settings import Settings
from kalshi_platform_tests import wire
from kalshi_platform_tests.archived import paths
from kalshi_platform_tests.loading.test_loader import (
    FIRST_HOUR,
    SECOND_HOUR,
    SMALL,
    START_NS,
    journal_of,
    load_all,
    recording,
)
from kalshi_platform_tests.object_store import BUCKET, KEY, KEY_ID, object_store

MOST_BYTES = 16
"""Of a frame of the October shape in a compacted hour."""


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with object_store() as store:
        yield store.url


@pytest.fixture(params=["disk", "object storage"])
def settings(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    """An archive with two hours and their frames, the first one sealed."""
    monkeypatch.setattr("kalshi_platform.loading.shared_rows.CHUNK_ROWS", 30)
    monkeypatch.setattr(compaction, "LINGER_S", 0.0)
    more = {}
    if request.param == "object storage":
        more = {
            "parquet_dir": f"s3://{BUCKET}/{uuid.uuid4().hex}",
            "s3_endpoint_url": request.getfixturevalue("s3"),
            "aws_region": "us-east-1",
            "aws_access_key_id": KEY_ID,
            "aws_secret_access_key": KEY,
        }
    made = platform_settings.load(kalshi_data_dir=tmp_path, use_clickhouse=False, **more)
    load(made, with_clock(recording()))
    return made


def with_clock(given: list[wire.Record]) -> list[wire.Record]:
    """The records with a clock and the time of sending in every book frame."""
    changed = []
    for n, (at, conn, kind, frame) in enumerate(given):
        if kind in {Kind.DELTA, Kind.SNAPSHOT}:
            body = json.loads(frame)
            body["sending_ts_ms"] = at // 1_000_000
            body["msg"]["clock"] = 1_000 + n
            frame = json.dumps(body, separators=(",", ":")).encode()  # noqa: PLW2901 - the same frame
        changed.append((at, conn, kind, frame))
    return changed


def load(settings: Settings, given: list[wire.Record], *, frames: bool = True) -> None:
    folder = settings.journal_dir()
    writer = journal_of(folder, given)
    kept = JournalFrames(folder, 0) if frames else None
    sink = ParquetSink(open_archive(settings), 0, lambda _: None, frames=kept)
    load_all(Loader(folder, writer, sink, SMALL))
    writer.close()


def content(archive: Archive, hour: datetime) -> dict[str, pl.DataFrame]:
    """The rows of an hour's datasets, in a fixed order."""
    found = {}
    for name in hours.RECORDED:
        tables = [table for table in archive.read(name, hour) if table.num_rows]
        if tables:
            rows = pl.DataFrame(pl.from_arrow(pa.concat_tables(tables).unify_dictionaries()))
            found[name] = rows.cast({pl.Categorical: pl.String}).sort(pl.all())
    return found


def assert_same(found: dict[str, pl.DataFrame], wanted: dict[str, pl.DataFrame]) -> None:
    assert found.keys() == wanted.keys()
    for name, rows in wanted.items():
        assert found[name].equals(rows), name


def journalled(settings: Settings) -> list[tuple[int, int, bytes, int, bytes]]:
    """Every record of the journal: number, receive time, connection, kind, bytes."""
    folder = settings.journal_dir()
    return [
        (part.first_n + n, row["recv_ns"], row["conn"], row["kind"], row["frame"])
        for part in reader.record_ranges(folder, reader.oldest_offset(folder))
        for n, row in enumerate(part.batch.to_pylist())
    ]


def test_every_journal_record_is_in_the_archive_byte_for_byte(settings: Settings) -> None:
    archive = open_archive(settings)
    rows = [
        row
        for hour in (FIRST_HOUR, SECOND_HOUR)
        for table in archive.read(FRAMES.name, hour)
        for row in table.cast(
            pa.schema([f if f.name != "recv_ts" else f.with_type(pa.int64()) for f in table.schema])
        ).to_pylist()
    ]
    rows.sort(key=lambda row: row["record"])
    wanted = journalled(settings)
    assert [
        (row["record"], row["recv_ts"], uuid.UUID(row["conn_id"]).bytes, row["frame"])
        for row in rows
    ] == [(n, at, conn, frame) for n, at, conn, _, frame in wanted]
    assert [row["type"] for row in rows] == [TYPES[Kind(kind)] for *_, kind, _ in wanted]
    for row in rows:
        body = json.loads(row["frame"])
        assert (row["sid"], row["seq"]) == (body["sid"], body.get("seq", 0))
        assert (row["shard"], row["replica"]) == (0, 0)


def test_frames_are_sealed_and_compacted_like_the_other_datasets(settings: Settings) -> None:
    archive = open_archive(settings)
    before = content(archive, FIRST_HOUR)
    manifest = archive.read_manifest(FRAMES.name, FIRST_HOUR)
    assert manifest is not None
    assert manifest.complete
    assert manifest.rows == before[FRAMES.name].height
    compaction.compact(archive, [FIRST_HOUR], lambda _: None, _never)
    (file,) = archive.files(FRAMES.name, FIRST_HOUR)
    assert hours.is_compacted([file.name])
    (table,) = archive.read(FRAMES.name, FIRST_HOUR)
    assert table["record"].to_pylist() == sorted(table["record"].to_pylist())
    assert_same(content(archive, FIRST_HOUR), before)


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("hour", [FIRST_HOUR, SECOND_HOUR])
def test_an_hour_is_rebuilt_from_frames_as_from_the_journal(
    settings: Settings, hour: datetime, *, compacted: bool
) -> None:
    archive = open_archive(settings)
    wanted = content(archive, hour)
    watermarks.advance(settings.journals_dir, 0, SECOND_HOUR + timedelta(hours=1))
    from_journal = rebuild(settings, hour)
    assert from_journal.rebuilt_from == "journal"
    assert_same(content(archive, hour), wanted)
    if compacted:
        compaction.compact(archive, [hour], lambda _: None, _never)
    shutil.rmtree(settings.journal_dir())
    report = rebuild(settings, hour)
    assert report.rebuilt_from == "frames"
    assert report.complete
    assert_same(content(archive, hour), wanted)
    again = {d.dataset: (d.rows, d.checksum) for d in report.datasets}
    assert again == {d.dataset: (d.rows, d.checksum) for d in from_journal.datasets}


def test_columns_of_a_later_version_are_filled_from_frames(settings: Settings) -> None:
    archive = open_archive(settings)
    wanted = content(archive, FIRST_HOUR)
    assert wanted[ORDERBOOK_EVENTS.name]["clock"].null_count() == 0
    if not isinstance(archive, LocalArchive):
        pytest.skip("the files of an earlier version are made on a local disk")
    compaction.compact(archive, [FIRST_HOUR], lambda _: None, _never)
    _without_clock(archive)
    shutil.rmtree(settings.journal_dir())
    assert content(archive, FIRST_HOUR)[ORDERBOOK_EVENTS.name]["clock"].null_count() > 0
    assert rebuild(settings, FIRST_HOUR).rebuilt_from == "frames"
    assert_same(content(archive, FIRST_HOUR), wanted)


def _without_clock(archive: LocalArchive) -> None:
    """Rewrite the first hour's events as a version without `clock` and `sent_ts` wrote them."""
    (path,) = paths(archive.root, ORDERBOOK_EVENTS.name, FIRST_HOUR)
    (table,) = archive.read(ORDERBOOK_EVENTS.name, FIRST_HOUR)
    old = table.drop_columns(["clock", "sent_ts"])
    write_durably(path, [old], old.schema)
    manifest = archive.read_manifest(ORDERBOOK_EVENTS.name, FIRST_HOUR)
    assert manifest is not None

    archive.write_manifest(
        msgspec.structs.replace(manifest, checksum=checksum.text(checksum.rows_checksum(old)))
    )


def test_frames_with_a_hole_change_nothing(settings: Settings) -> None:
    archive = open_archive(settings)
    if not isinstance(archive, LocalArchive):
        pytest.skip("parts wait on a local disk")
    wanted = content(archive, FIRST_HOUR)
    gone, *_ = paths(archive.root, FRAMES.name, FIRST_HOUR)
    gone.unlink()
    shutil.rmtree(settings.journal_dir())
    with pytest.raises(StoreRefused, match="Without one, remove it"):
        rebuild(settings, FIRST_HOUR)
    del wanted[FRAMES.name]
    shutil.rmtree(archive.folder(FRAMES.name, FIRST_HOUR))  # the remedy
    report = rebuild(settings, FIRST_HOUR)
    assert report.rebuilt_from == ""
    assert report.complete
    assert_same(content(archive, FIRST_HOUR), wanted)


def test_lost_frames_are_written_again_while_the_journal_has_them(settings: Settings) -> None:
    archive = open_archive(settings)
    if not isinstance(archive, LocalArchive):
        pytest.skip("parts wait on a local disk")
    wanted = content(archive, FIRST_HOUR)
    shutil.rmtree(archive.folder(FRAMES.name, FIRST_HOUR))
    rebuild(settings, FIRST_HOUR)
    assert_same(content(archive, FIRST_HOUR), wanted)
    compaction.compact(archive, [FIRST_HOUR], lambda _: None, _never)
    shutil.rmtree(archive.folder(FRAMES.name, FIRST_HOUR))
    rebuild(settings, FIRST_HOUR)
    assert_same(content(archive, FIRST_HOUR), wanted)


def test_frames_of_expired_hours_alone_are_deleted(settings: Settings) -> None:
    archive = open_archive(settings)
    wanted = content(archive, FIRST_HOUR)
    assert delete_expired(archive, FIRST_HOUR + timedelta(minutes=59)) == []
    assert archive.metadata_files("hour_states", ".state") == [
        f"hour_states/{SECOND_HOUR:%Y-%m-%dT%H}-0.state"
    ]
    assert delete_expired(archive, SECOND_HOUR) == [FIRST_HOUR]
    del wanted[FRAMES.name]
    assert_same(content(archive, FIRST_HOUR), wanted)
    assert hours.is_sealed(archive, FIRST_HOUR)
    assert delete_expired(archive, SECOND_HOUR) == []
    assert FRAMES.name in content(archive, SECOND_HOUR)  # it is not sealed


def test_without_frames_an_archive_has_none(tmp_path: Path) -> None:
    made = platform_settings.load(kalshi_data_dir=tmp_path, use_clickhouse=False, keep_frames=False)
    load(made, recording(), frames=False)
    assert FRAMES.name not in content(LocalArchive(made.archive_dir), FIRST_HOUR)
    rebuild(made, FIRST_HOUR)
    assert FRAMES.name not in content(LocalArchive(made.archive_dir), FIRST_HOUR)


@given(st.lists(st.binary(max_size=40), max_size=30), st.binary(max_size=9), st.integers(0, 30))
def test_the_checksum_of_bytes_depends_on_nothing_but_the_bytes(
    values: list[bytes], before: bytes, cut: int
) -> None:
    whole = checksum.row_numbers(pa.table({"frame": pa.array(values, pa.binary())})).tolist()
    shifted = pa.array([before, *values], pa.binary()).slice(1)
    assert checksum.row_numbers(pa.table({"frame": shifted})).tolist() == whole
    parts = [pa.array(part, pa.binary()) for part in (values[:cut], values[cut:])]
    assert checksum.row_numbers(pa.table({"frame": pa.chunked_array(parts)})).tolist() == whole
    numbers = dict(zip(values, whole, strict=True))
    assert len({*numbers.values()}) == len(numbers)


def test_long_frames_differ_by_each_of_their_bytes() -> None:
    long = b"x" * (checksum.LONG_BYTES + 1)
    values = [long, long[:-1] + b"y", long[:-2], b"", b"\0", b"\0\0"]
    rows = checksum.row_numbers(pa.table({"frame": pa.array(values, pa.binary())}))
    assert len({*rows.tolist()}) == len(values)


def test_records_survive_the_way_to_rows_and_back() -> None:
    made = [
        (START_NS + n, wire.conn_id(n % 3), n % len(Kind), bytes([n, 255 - n]) * n)
        for n in range(50)
    ]
    (whole,) = wire.blocks(made)
    part = RecordRange(7, whole.batch, (LogOffset(0, 0, 7),), LogOffset(0, 57, 57))
    table = frames_table(part, Numbers(7, 57, ()), shard=2)
    holed = pa.concat_tables([table.slice(0, 20), table.slice(25)]).unify_dictionaries()
    first, second = records(holed.combine_chunks())
    assert (first.first_n, first.rows, second.first_n, second.rows) == (7, 20, 32, 25)
    for back in (first, second):
        assert back.batch.equals(whole.batch.slice(back.first_n - 7, back.rows))


# -- size --------------------------------------------------------------------------------------


def october(count: int, markets: int = 100) -> list[tuple[int, bytes]]:
    """Deltas of October's shape as (receive time, frame): actions of one to three deltas, in busy and quiet markets.

    Prices near a moving best, round and odd sizes of which half are taken away again, milliseconds at the exchange,
    noise of the way here; frames come in order, and those of one action in one read of the socket.
    """
    draw = random.Random(11)
    names = [f"KX{['FED', 'MLB', 'BTCD', 'NFL'][m % 4]}-26OCT{m % 28 + 1:02d}-T{m}" for m in range(markets)]  # fmt: skip
    ids = [str(uuid.UUID(int=draw.getrandbits(128), version=4)) for _ in range(markets)]
    weights = list(np.cumsum(1 / np.arange(1, markets + 1)))
    clocks = [draw.randrange(1_000, 5_000_000) for _ in range(markets)]
    best = [draw.randrange(10, 90) for _ in range(markets)]
    standing: dict[tuple[int, str, int], list[int]] = {}
    at_ms, received, seq, made = 1_795_970_362_731.0, 0, 0, list[tuple[int, bytes]]()
    while len(made) < count:
        (market,) = draw.choices(range(markets), cum_weights=weights)
        at_ms += draw.expovariate(1.2)
        clocks[market] += 1 if draw.random() < 0.8 else draw.randrange(2, 20)
        best[market] = min(max(best[market] + draw.choice([0] * 30 + [-1, 1]), 5), 95)
        sent = int(at_ms) + draw.choice([0, 0, 0, 1, 1, 2])
        received = max(received, int(at_ms * 1e6) + int(draw.lognormvariate(15.5, 0.4)))
        ts = f"{datetime.fromtimestamp(int(at_ms) // 1000, UTC):%Y-%m-%dT%H:%M:%S}.{int(at_ms) % 1000:03d}Z"
        for _ in range(draw.choice([1, 1, 1, 2, 2, 3])):
            side = draw.choice(["yes", "no"])
            price = max((best[market] if side == "yes" else 100 - best[market]) - draw.choice([0, 0, 0, 1, 1, 2, 5]), 1)  # fmt: skip
            sizes = standing.setdefault((market, side, price), [])
            if sizes and draw.random() < 0.5:
                size = -sizes.pop()
            else:
                sizes.append(draw.choice([100, 1_000, 2_500, 10_000, draw.randrange(1, 500) * 100, draw.randrange(1, 90_000)]))  # fmt: skip
                size = sizes[-1]
            seq += 1
            text = f"{'-' if size < 0 else ''}{abs(size) // 100}.{abs(size) % 100:02d}"
            body = (
                f'{{"type":"orderbook_delta","sid":1,"seq":{seq},"sending_ts_ms":{sent},"msg":{{"market_ticker":'
                f'"{names[market]}","market_id":"{ids[market]}","clock":{clocks[market]},"price_dollars":"0.{price:02d}00",'
                f'"delta_fp":"{text}","side":"{side}","ts":"{ts}","ts_ms":{int(at_ms)}}}}}'
            )
            made.append((received, body.encode()))
    return made[:count]


def test_a_compacted_frame_takes_few_bytes(tmp_path: Path) -> None:
    made = october(60_000)
    assert 290 < sum(len(frame) for _, frame in made) / len(made) < 330
    given = [(at, wire.conn_id(1), int(Kind.DELTA), frame) for at, frame in made]
    (whole,) = wire.blocks(given)
    numbers = Numbers(0, whole.rows, ())
    numbers._seq[:], numbers._sid[:] = np.arange(1, whole.rows + 1), 1
    part = tmp_path / "part-0-0-60000.parquet"
    write_durably(part, [frames_table(whole, numbers, 0)], FRAMES.arrow)
    _, compacted = compaction.build([local_file(part)], FRAMES, tmp_path)
    assert compacted.bytes / compacted.rows <= MOST_BYTES


def test_documented_readers_read_a_compacted_hour(settings: Settings) -> None:
    duckdb = pytest.importorskip("duckdb")
    archive = open_archive(settings)
    if not isinstance(archive, LocalArchive):
        pytest.skip("the readers' options for object storage are tested elsewhere")
    wanted = content(archive, FIRST_HOUR)[FRAMES.name].sort("record")["frame"].to_list()
    compaction.compact(archive, [FIRST_HOUR], lambda _: None, _never)
    (path,) = paths(archive.root, FRAMES.name, FIRST_HOUR)
    sql = f"SELECT frame FROM read_parquet('{path}') ORDER BY record"
    found = {
        "Polars": pl.read_parquet(path).sort("record")["frame"].to_list(),
        "pyarrow": pq.read_table(path).sort_by("record")["frame"].to_pylist(),
        "DuckDB": [frame for (frame,) in duckdb.sql(sql).fetchall()],
    }
    for name, frames in found.items():
        assert frames == wanted, name


def _never(hour: datetime, error: Exception) -> None:
    raise AssertionError(hour) from error
