"""Publishing: the same hour without the recorder's private data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from kalshi_platform import settings as platform_settings
from kalshi_platform.analytics.hourly import compute_hour
from kalshi_platform.archive import LocalArchive, compaction, hours, write_durably
from kalshi_platform.archive import export as publish
from kalshi_platform.archive.export import public_detail
from kalshi_platform.commands.main import main
from kalshi_platform.errors import StoreRefused
from kalshi_platform.journal.kind import Kind
from kalshi_platform.loading.frame_rows import Numbers, frames_table
from kalshi_platform.schema import DATASETS
from kalshi_platform.settings import Settings
from kalshi_platform_tests import wire
from kalshi_platform_tests.archive.test_compaction import record, rows
from kalshi_platform_tests.archived import paths
from kalshi_platform_tests.loading.test_loader import FIRST_HOUR, START_NS, recording

OWN = "own-id-"
"""Prefix of every id, user and text below that must not be published."""
CONN = wire.conn_id(9)


def frame(kind: str, seq: int = 0, **msg: Any) -> bytes:
    number = {"seq": seq} if seq else {}
    return json.dumps({"type": kind, "sid": 3, **number, "msg": msg}).encode()


def own_delta(seq: int) -> bytes:
    body = json.loads(wire.delta("OWN-4", seq, "yes", 4_000, 500, sid=3))
    body["msg"] |= {"client_order_id": f"{OWN}order-{seq}", "subaccount": 7}
    return json.dumps(body).encode()


def private() -> list[wire.Record]:
    """A connection whose frames contain much private data."""
    said: list[tuple[Kind, bytes]] = [
        (Kind.SNAPSHOT, wire.snapshot("OWN-4", 1, {4_000: 100}, {5_000: 100}, sid=3)),
        (Kind.DELTA, own_delta(2)),
        (Kind.DELTA, wire.delta("OWN-4", 3, "no", 5_000, 250, sid=3)),
        (Kind.DELTA, own_delta(4)),
        (Kind.CONTROL, frame("ok", 5, market_tickers=["OWN-4"], user_id=f"{OWN}user")),
        (Kind.CONTROL, frame("error", 6, code=14, msg=f"{OWN}text")),
        (Kind.CONTROL, frame("trade", 7, trade_id="t", market_ticker="OWN-4", x=f"{OWN}field")),
        (Kind.CONTROL, frame("order_group_updates", 8, order_group_id=f"{OWN}group-8")),
        (Kind.CONTROL, frame("new_private_channel", 9, client_order_id=f"{OWN}order-9")),
        (Kind.DELTA, own_delta(10).replace(b'"0.4000"', b'"0.4"')),
        (Kind.DELTA, own_delta(11).replace(b'"0.4000"', f'"{OWN}price"'.encode())),
        (Kind.CONTROL, frame("fill", market_ticker="OWN-4", order_id=f"{OWN}order-f")),
        (Kind.CONTROL, frame("user_order", ticker="OWN-4", client_order_id=f"{OWN}order-u")),
        (Kind.CONTROL, frame("market_position", market_ticker="OWN-4", user_id=f"{OWN}user-p")),
        (Kind.MALFORMED, f'{{"client_order_id": "{OWN}order-m"'.encode()),
        (Kind.NOTE, wire.note("left", {"why": f"{OWN}reason"}, sid=3, ticker="GONE-5")),
        (Kind.NOTE, wire.note("unheard_of", {"detail": f"{OWN}detail"})),
    ]
    connected = {"use_yes_price": False, "url": f"wss://{OWN}proxy", "markets": 1, "attempt": 0}
    ended = {"cause": f"closed by the exchange: 1008 {OWN}reason", "frames": 9, "seconds": 1.5}
    notes = [
        (START_NS, CONN, int(Kind.NOTE), wire.note("connected", connected)),
        (START_NS + 90 * wire.SECOND, CONN, int(Kind.NOTE), wire.note("disconnected", ended)),
    ]
    frames = [
        (START_NS + (n + 1) * wire.SECOND, CONN, int(kind), text)
        for n, (kind, text) in enumerate(said)
    ]
    return [notes[0], *frames, notes[1]]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder: one sealed hour with own orders in it, computed too, and one open hour."""
    folder = tmp_path_factory.mktemp("private")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("kalshi_platform.loading.loader.CHUNK_ROWS", 30)
        made = platform_settings.load(kalshi_data_dir=folder, use_clickhouse=False)
        record(made, sorted([*recording(), *private()], key=lambda it: it[0]))
    compute_hour(made, FIRST_HOUR)
    return folder


@pytest.fixture(params=["parts", "compacted"])
def settings(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Settings:
    shutil.copytree(recorded, tmp_path / "data")
    made = platform_settings.load(kalshi_data_dir=tmp_path / "data", use_clickhouse=False)
    if request.param == "compacted":
        monkeypatch.setattr(compaction, "LINGER_S", 0.0)
        list(compaction.compact_hour(LocalArchive(made.archive_dir), FIRST_HOUR))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KALSHI_DATA_DIR", str(tmp_path / "data"))
    return made


def export(to: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["export", "--public", "--to", str(to), *more])


def texts(root: Path) -> str:
    """Every text in every file: values, dictionaries that no row uses, statistics, manifests, names."""
    found = []
    for path in root.rglob("*"):
        found.append(str(path))
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                names = [f.name for f in file.schema_arrow if f.type != pa.bool_()]
                footer = file.metadata
            for group in range(footer.num_row_groups):
                for column in range(footer.num_columns):
                    known = footer.row_group(group).column(column).statistics
                    found.append(f"{known.min} {known.max}" if known and known.has_min_max else "")
            with pq.ParquetFile(path, read_dictionary=names) as file:
                for column in file.read().columns:
                    for chunk in column.chunks:
                        values = chunk.dictionary if pa.types.is_dictionary(chunk.type) else chunk
                        found.append(str(values.to_pylist()))
        elif path.is_file():
            found.append(path.read_text())
    return "\n".join(found)


def numbers(root: Path) -> set[tuple[str, int, int]]:
    """(connection, sid, seq) of every row that consumed a number."""
    columns = ["conn_id", "sid", "seq"]
    both = [rows(root, name).select(columns) for name in ("orderbook_events", "stream_events")]
    return set(pl.concat(both).filter(pl.col("seq") > 0).iter_rows())


def test_a_published_hour_contains_no_private_data(settings: Settings, tmp_path: Path) -> None:
    root, to = settings.archive_dir, tmp_path / "public"
    assert OWN in texts(root)  # the search finds what is there
    result = export(to)
    assert result.exit_code == 0, result.output
    assert OWN not in texts(to)
    assert "orderbook_events of 2026" in result.stderr  # the open hour, by name
    assert "3 client order ids cleared" in result.stdout
    assert "3 rows keep their number alone" in result.stdout
    for kind in ("fill", "user_order", "market_position", "malformed", "unheard_of"):
        assert f"1 of kind {kind} left out" in result.stdout

    for name in ("spreads", "depth", "imbalance"):
        assert rows(to, name).equals(rows(root, name))
    cleared = rows(root, "orderbook_events").with_columns(client_order_id=pl.lit(""))
    assert rows(to, "orderbook_events").equals(cleared.sort(pl.all()))
    assert numbers(to) == numbers(root)
    for table in LocalArchive(to).read("stream_events", FIRST_HOUR):
        kinds = set(table["kind"].cast(pa.string()).to_pylist())
        assert kinds <= {*publish.NOTES, *publish.FRAMES, publish.WITHHELD}


def test_a_published_hour_is_readable_as_an_archive(settings: Settings, tmp_path: Path) -> None:
    root, to = settings.archive_dir, tmp_path / "public"
    export(to)
    assert hours.is_sealed(LocalArchive(to), FIRST_HOUR)
    for it in hours.describe(LocalArchive(to), FIRST_HOUR, complete=True).datasets:
        manifest = LocalArchive(to).read_manifest(it.dataset, FIRST_HOUR)
        original = LocalArchive(root).read_manifest(it.dataset, FIRST_HOUR)
        assert manifest is not None
        assert original is not None
        assert (manifest.rows, manifest.checksum, manifest.markets) == (
            it.rows,
            it.checksum,
            it.markets,
        )
        assert manifest.compacted == original.compacted
        assert manifest.coverage == it.coverage == original.coverage
        assert [part.file for part in manifest.parts] == [
            path.name for path in paths(to, it.dataset, FIRST_HOUR)
        ]
        (one, *_) = LocalArchive(to).read(it.dataset, FIRST_HOUR)
        assert one.schema.names == DATASETS[it.dataset].arrow.names
    shutil.copytree(to, tmp_path / "again" / "parquet")
    again = platform_settings.load(kalshi_data_dir=tmp_path / "again", use_clickhouse=False)
    compute_hour(again, FIRST_HOUR)  # analytics of what was published are those of the original
    assert rows(again.archive_dir, "spreads").equals(rows(root, "spreads"))


def test_publishing_again_replaces_the_hour(settings: Settings, tmp_path: Path) -> None:
    to = tmp_path / "public"
    hour = f"{FIRST_HOUR:%Y-%m-%d-%H}"
    assert export(to, "--hours", hour, "--dataset", "orderbook_events").exit_code == 0
    assert [path.name for path in to.iterdir() if path.name[0] not in "._"] == ["orderbook_events"]
    before = rows(to, "orderbook_events")
    assert export(to, "--hours", hour).exit_code == 0
    assert rows(to, "orderbook_events").equals(before)
    assert "no sealed hour of that span" in str(export(to, "--hours", "2001-01-01-00").exception)


def test_a_leak_is_detected_before_the_hour_is_in_place(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, to = settings.archive_dir, tmp_path / "public"
    with monkeypatch.context() as planted:
        fields = frozenset({"market_ticker", "order_id"})
        planted.setattr(publish, "FRAMES", {**publish.FRAMES, "fill": fields})
        planted.setattr(publish, "own_ids", lambda *_: {f"{OWN}order-f"})
        assert "still contains an id of own orders" in str(export(to).exception)
        assert not LocalArchive(to).hours("stream_events")
    to = tmp_path / "other"
    with monkeypatch.context() as planted:
        planted.setattr(publish, "_without_own_orders", lambda table, _: table)
        assert "still contains" in str(export(to).exception)
    assert OWN not in texts(tmp_path / "public") + texts(to)
    assert not LocalArchive(to).hours("orderbook_events")
    part = paths(root, "orderbook_events", FIRST_HOUR)[0]
    write_durably(part, [], DATASETS["orderbook_events"].arrow)
    assert "its manifest says" in str(export(to).exception)


def test_the_archive_and_foreign_folders_are_never_written_to(
    settings: Settings, tmp_path: Path
) -> None:
    root = settings.archive_dir
    before = texts(root)
    (tmp_path / "link").symlink_to(root)
    for to in (root, root / "public", root.parent, tmp_path / "link"):
        assert isinstance(export(to).exception, StoreRefused)
    shutil.copytree(root, tmp_path / "backup")
    assert "may be private" in str(export(tmp_path / "backup").exception)
    assert texts(root) == before
    verbatim = CliRunner().invoke(main, ["export", "--to", str(tmp_path / "copy")])
    assert verbatim.exit_code == 2
    assert "--public" in verbatim.output
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("kind", "detail", "public"),
    [
        ("heartbeat", '{"state":"streaming","host":"x"}', '{"state":"streaming"}'),
        (
            "disconnected",
            '{"cause":"closed by the exchange: 1008 x"}',
            '{"cause":"closed by the exchange"}',
        ),
        (
            "error",
            '{"type":"error","id":3,"msg":{"code":8,"msg":"x"}}',
            '{"type":"error","id":3,"msg":{"code":8}}',
        ),
        ("ok", '{"type":"ok","msg":["x"]}', '{"type":"ok"}'),
        ("gap", '["x"]', "{}"),
        ("gap", "x", "{}"),
        ("fill", '{"type":"fill","msg":{"order_id":"x"}}', '{"type":"fill"}'),
    ],
)
def test_only_listed_detail_fields_are_published(kind: str, detail: str, public: str) -> None:
    assert public_detail(kind, detail) == public


def test_only_public_frames_without_other_keys_are_published_byte_for_byte() -> None:
    public = [
        (Kind.DELTA, wire.delta("OWN-4", 12, "no", 5_000, 250, sid=3)),
        (Kind.SNAPSHOT, wire.snapshot("OWN-4", 13, {4_000: 100}, {}, sid=3)),
        (Kind.TRADE, wire.trade("OWN-4", 14, 4_000, 100)),
        (Kind.CONTROL, b'{"type":"subscribed","id":1,"msg":{"channel":"trade","sid":3}}'),
        (Kind.CONTROL, frame("market_lifecycle_v2", event_type="settled", market_ticker="OWN-4")),
    ]
    left = [
        (Kind.DELTA, wire.delta("O\u00fc", 15, "no", 5_000, 250).replace(b"\\u00fc", b"\xff")),
        (Kind.CONTROL, frame("market_position", market_ticker="OWN-4")),
        (Kind.CONTROL, frame("fill", market_ticker="OWN-4", side="yes")),
        (Kind.NOTE, wire.note("left", {}, sid=3)),
    ]
    given = private() + [(START_NS, CONN, int(kind), text) for kind, text in [*public, *left]]
    (whole,) = wire.blocks(given)
    table = frames_table(whole, Numbers(0, whole.rows, ()), 0)
    published = publish.Published("frames", FIRST_HOUR)
    kept = publish._public_frames(table, published)["frame"].to_pylist()
    plain = [text for _, _, kind, text in private() if kind in {Kind.DELTA, Kind.SNAPSHOT} and OWN.encode() not in text]  # fmt: skip
    assert kept == [*plain, *(text for _, text in public)]
    assert published.removed.total() == len(given) - len(kept)


def test_every_dataset_is_public_or_listed_as_private() -> None:
    archived = {name for name, dataset in DATASETS.items() if dataset.archived}
    assert archived == set(publish.PUBLIC)
