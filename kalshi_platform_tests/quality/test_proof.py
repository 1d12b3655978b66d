"""The proof of journal, ClickHouse and archive: it finds every change to one of them, and nothing else."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import timedelta
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from kalshi_platform import settings as platform_settings
from kalshi_platform.archive import LocalArchive, open_archive, part_name
from kalshi_platform.clickhouse import queries
from kalshi_platform.clickhouse.client import Client, connect
from kalshi_platform.commands.main import main
from kalshi_platform.journal import reader
from kalshi_platform.journal.kind import Kind
from kalshi_platform.loading.loader import Loader, Pace
from kalshi_platform.loading.shared_rows import SharedRows
from kalshi_platform.loading.sinks import ClickHouseSink, ParquetSink
from kalshi_platform.quality import tally_journal
from kalshi_platform.quality.proof import CLICKHOUSE, PARQUET, Counts, Proof, prove
from kalshi_platform.schema import TABLES
from kalshi_platform.settings import Settings
from kalshi_platform_tests import wire
from kalshi_platform_tests.archived import paths
from kalshi_platform_tests.loading.test_loader import (
    FIRST_HOUR,
    PATIENCE_S,
    SECOND_HOUR,
    START_NS,
    journal_of,
    load_all,
    recording,
)

PACE = Pace(rows=60, seconds=0.0, first_s=0.0)
CONN = wire.conn_id(1)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalshi_platform.loading.shared_rows.CHUNK_ROWS", 30)


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    """A client of the database, with nothing in it."""
    with closing(connect(settings)) as client:
        for name in (*TABLES, "retention_changes"):
            client.command(f"TRUNCATE TABLE {name}")
        yield client


def record(
    settings: Settings, records: Sequence[wire.Record], *, shard: int = 0, openings: int = 1
) -> None:
    """A shard records, both stores are loaded, and the recorder stops."""
    folder = settings.journal_dir(shard)
    writer = journal_of(folder, records, openings)
    for store in (
        ParquetSink(LocalArchive(settings.archive_dir), shard, lambda _: None),
        ClickHouseSink(settings, str(writer.id), shard=shard),
    ):
        load_all(Loader(folder, writer, store, PACE, shared_rows=SharedRows(folder, shard)))
    writer.close()


@pytest.fixture
def recorded(settings: Settings, client: Client) -> Client:
    """Two hours of one connection: its order book (sid 1) and its trades (sid 2)."""
    record(settings, recording(), openings=4)
    return client


def proved(settings: Settings, span: Any = None) -> Proof:
    return prove(settings, open_archive(settings), span, lambda *_: None)


def wrong(found: Proof) -> dict[str, dict[str, int]]:
    """What is wrong, by store, over all subscriptions."""
    names = ("missing", "unexplained", "missing_levels", "doubled")
    return {
        store: {name: n for name in names if (n := getattr(counts, name))}
        for store, counts in found.stores.items()
        if not counts.is_whole
    }


def test_a_sound_recording_is_whole_and_every_frame_is_counted(
    settings: Settings, recorded: Client
) -> None:
    found = proved(settings)
    assert (found.verdict, found.unjudged, found.failed) == ("whole", [], [])
    counts = Counts(frames=459, deltas=400, trades=57, snapshots=2)
    assert found.journal == counts
    assert found.stores == {CLICKHOUSE: counts, PARQUET: counts}
    assert [
        (subscription.sid, subscription.first, subscription.last)
        for subscription in found.subscriptions
    ] == [(1, 1, 402), (2, 1, 57)]
    (of,) = found.journals
    assert of.missing_records == {CLICKHOUSE: 0, PARQUET: 0}


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (["DELETE FROM orderbook_events WHERE seq = 20"], {"missing": 1, "unexplained": 1}),
        (["DELETE FROM orderbook_events WHERE seq = 402"], {"missing": 1}),
        (["DELETE FROM trades WHERE seq IN (3, 4)"], {"missing": 2, "unexplained": 2}),
        (
            [
                "DELETE FROM stream_events WHERE kind IN ('connected', 'subscribed')",
                "DELETE FROM orderbook_events WHERE seq <= 200",
                "DELETE FROM stream_events WHERE seq <= 200",
            ],
            {"missing": 200, "unexplained": 200},
        ),
        (
            ["DELETE FROM orderbook_events WHERE type = 'snapshot' AND side = 'no'"],
            {"missing_levels": 1},
        ),
        (["INSERT INTO trades SELECT * FROM trades WHERE seq < 5"], {"doubled": 4}),
        (
            ["INSERT INTO orderbook_events SELECT * FROM orderbook_events WHERE type = 'snapshot'"],
            {"doubled": 3},
        ),
    ],
    ids=["a delta", "the last", "trades", "the beginning", "a level", "twice", "levels twice"],
)
def test_what_is_done_to_clickhouse_is_found_there_alone(
    settings: Settings, recorded: Client, harm: list[str], found: dict[str, int]
) -> None:
    for statement in harm:
        recorded.command(statement)
    proof = proved(settings)
    assert proof.verdict == "not whole"
    assert wrong(proof) == {CLICKHOUSE: found}


def test_a_note_that_clickhouse_lacks_is_a_record_without_a_row(
    settings: Settings, recorded: Client
) -> None:
    recorded.command("DELETE FROM stream_events WHERE kind = 'heartbeat'")
    found = proved(settings)
    assert wrong(found) == {}
    (of,) = found.journals
    assert of.missing_records == {CLICKHOUSE: 40, PARQUET: 0}
    assert found.verdict == "not whole"


def test_what_is_done_to_the_archive_is_found_there_alone(
    settings: Settings, recorded: Client
) -> None:
    path = paths(settings.archive_dir, "orderbook_events", FIRST_HOUR)[1]
    rows = pq.read_table(path, partitioning=None)
    aside = path.rename(path.with_suffix(".aside"))
    lost = proved(settings)
    assert wrong(lost) == {PARQUET: {"missing": rows.num_rows, "unexplained": rows.num_rows}}
    (offender,) = [subscription for subscription in lost.subscriptions if not subscription.is_whole]
    seqs = rows["seq"].to_pylist()
    assert offender.ranges == {PARQUET: [(min(seqs), max(seqs))]}
    aside.rename(path)
    again = path.with_name(part_name(0, 900_000, 900_001))
    shutil.copy(path, again)
    assert wrong(proved(settings)) == {PARQUET: {"doubled": rows.num_rows}}
    again.unlink()
    path.write_bytes(path.read_bytes()[:100])
    unread = proved(settings)
    assert unread.verdict == "not whole"
    assert f"{path} cannot be read" in unread.failed[0]


def test_rows_both_stores_lost_are_found_with_and_without_journal(
    settings: Settings, recorded: Client
) -> None:
    recorded.command("DELETE FROM orderbook_events WHERE seq = 20")
    for path in paths(settings.archive_dir, "orderbook_events", FIRST_HOUR):
        rows = pq.read_table(path, partitioning=None)
        keep = [seq != 20 for seq in rows["seq"].to_pylist()]
        pq.write_table(rows.filter(keep), path)
    both = {"missing": 1, "unexplained": 1}
    assert wrong(proved(settings)) == {CLICKHOUSE: both, PARQUET: both}
    reader.prune(settings.journal_dir(), 10_000, -1.0)
    found = proved(settings)
    assert wrong(found) == {CLICKHOUSE: {"unexplained": 1}, PARQUET: {"unexplained": 1}}
    assert any("pruned its records before" in it for it in found.unjudged)


def test_with_a_pruned_journal_the_stores_are_compared(
    settings: Settings, recorded: Client
) -> None:
    reader.prune(settings.journal_dir(), 10_000, -1.0)
    found = proved(settings)
    assert (found.verdict, wrong(found)) == ("whole", {})
    assert 0 < found.journal.frames < found.stores[PARQUET].frames == 459
    recorded.command("DELETE FROM orderbook_events WHERE seq <= 10")  # before the journal begins
    assert wrong(proved(settings)) == {
        CLICKHOUSE: {"missing": 8, "unexplained": 8, "missing_levels": 3}
    }


def test_a_gap_is_a_loss_only_without_its_row(settings: Settings, client: Client) -> None:
    records = recording(100)
    at = records[-1][0] + wire.SECOND
    named = {"cause": "sequence", "expected": 103, "got": 106, "channel": "orderbook_delta"}
    records.append((at, CONN, Kind.NOTE, wire.note("gap", named, sid=1)))
    records.append((at, CONN, Kind.SNAPSHOT, wire.snapshot("A-1", 106, {4_000: 100}, {})))
    record(settings, records)
    found = proved(settings)
    assert found.verdict == "whole"
    assert {counts.named_holes for counts in found.stores.values()} == {3}
    client.command("DELETE FROM stream_events WHERE kind = 'gap'")
    found = proved(settings)
    assert wrong(found) == {CLICKHOUSE: {"unexplained": 3}}
    assert [
        subscription.ranges for subscription in found.subscriptions if not subscription.is_whole
    ] == [{CLICKHOUSE: [(103, 105)]}]


def test_numbers_that_the_exchange_repeats_are_no_fault(settings: Settings, client: Client) -> None:
    records = recording(60)
    at = records[-1][0]
    for seq in (40, 41, 62):
        at += wire.SECOND
        records.append((at, CONN, Kind.DELTA, wire.delta("A-1", seq, "yes", 4_800, 5)))
    record(settings, records)
    found = proved(settings)
    assert found.verdict == "whole"
    assert {counts.repeated for counts in found.stores.values()} == {3}
    assert found.journal.repeated == 3
    client.command("INSERT INTO orderbook_events SELECT * FROM orderbook_events WHERE seq = 41")
    assert wrong(proved(settings)) == {CLICKHOUSE: {"doubled": 2}}


def test_what_is_not_loaded_yet_is_not_compared(settings: Settings, client: Client) -> None:
    """ClickHouse is behind, and another connection has begun that only the archive has."""
    records = recording(120)
    folder = settings.journal_dir()
    writer = journal_of(folder, records[:50])
    load_all(Loader(folder, writer, ClickHouseSink(settings, str(writer.id)), PACE))
    later = wire.conn_id(2)
    at = records[-1][0] + wire.SECOND
    records.append(wire.connected(later, at))
    records += [
        (at + n, later, Kind.DELTA, wire.delta("A-1", n, "yes", 4_700, 5)) for n in range(3, 9)
    ]
    for one in records[50:]:
        writer.append(*one)
    writer.submit()
    assert writer.wait_durable(len(records), PATIENCE_S)
    cold = ParquetSink(LocalArchive(settings.archive_dir), 0, lambda _: None)
    load_all(Loader(folder, writer, cold, PACE))
    writer.close()
    found = proved(settings)
    assert found.verdict == "whole"
    assert any("clickhouse has come to record 50" in it for it in found.unjudged)
    client.command("DELETE FROM orderbook_events WHERE seq = 20")
    assert wrong(proved(settings)) == {CLICKHOUSE: {"missing": 1, "unexplained": 1}}


def test_several_shards_are_added_up(settings: Settings, client: Client) -> None:
    record(settings, recording(60))
    of_other = [
        (at + 1_000, wire.conn_id(9) if conn == CONN else conn, kind, frame)
        for at, conn, kind, frame in recording(50)
    ]
    record(settings, of_other, shard=1)
    found = proved(settings)
    assert found.verdict == "whole"
    assert [journal.shard for journal in found.journals] == [0, 1]
    assert len(found.subscriptions) == 4
    assert found.journal.deltas == 110


def test_a_span_is_judged_from_where_its_subscriptions_go_on(
    settings: Settings, recorded: Client
) -> None:
    found = proved(settings, (SECOND_HOUR, SECOND_HOUR))
    assert (found.verdict, found.unjudged) == ("whole", [])
    assert 0 < found.journal.frames < 459
    assert found.subscriptions[0].first > 1
    recorded.command("DELETE FROM orderbook_events WHERE seq IN (20, 300)")
    assert wrong(proved(settings, (SECOND_HOUR, SECOND_HOUR))) == {
        CLICKHOUSE: {"missing": 1, "unexplained": 1}
    }


def test_without_a_journal_the_sealed_hours_are_judged(
    settings: Settings, recorded: Client
) -> None:
    shutil.rmtree(settings.journals_dir)
    found = proved(settings)
    assert found.verdict == "whole"
    assert f"up to the sealed hour {FIRST_HOUR:%Y-%m-%d %H:00} UTC" in found.unjudged[0]
    assert 0 < found.stores[PARQUET].frames < 459
    for path in paths(settings.archive_dir, "trades", FIRST_HOUR):
        path.unlink()
    assert wrong(proved(settings))[PARQUET]["missing"] > 0


def test_half_of_everything_is_not_whole(settings: Settings, recorded: Client) -> None:
    """The row of the beginning, the first hour in both stores, and the journal are gone."""
    moment = f"'{SECOND_HOUR:%Y-%m-%d %H:%M:%S}'"
    for table in ("orderbook_events", "stream_events", "trades"):
        recorded.command(f"DELETE FROM {table} WHERE ingest_ts < {moment}")
    for name in ("orderbook_events", "stream_events", "trades", "book_checkpoints"):
        folder = LocalArchive(settings.archive_dir).folder(name, FIRST_HOUR)
        shutil.rmtree(folder, ignore_errors=True)  # the first hour begins with no books
    shutil.rmtree(settings.journals_dir)
    found = proved(settings)
    assert found.verdict == "not whole"
    assert {store: set(of) for store, of in wrong(found).items()} == {
        CLICKHOUSE: {"unexplained"},
        PARQUET: {"unexplained"},
    }


def test_what_retention_has_taken_is_said_and_not_missed(
    settings: Settings, recorded: Client
) -> None:
    moment = f"'{SECOND_HOUR:%Y-%m-%d %H:%M:%S}'"
    for table in ("orderbook_events", "stream_events", "trades"):
        recorded.command(f"DELETE FROM {table} WHERE ingest_ts < {moment}")
    assert proved(settings).verdict == "not whole"
    taken = SECOND_HOUR - timedelta(minutes=5)
    recorded.command(
        "INSERT INTO retention_changes (taken_before) VALUES"
        f" (toDateTime64('{taken:%Y-%m-%d %H:%M:%S}', 6, 'UTC'))"
    )
    found = proved(settings)
    assert (found.verdict, wrong(found)) == ("whole", {})
    assert f"it is compared from {SECOND_HOUR:%Y-%m-%d %H:00} on" in found.unjudged[0]
    recorded.command("DELETE FROM orderbook_events WHERE seq = 300")
    assert wrong(proved(settings)) == {CLICKHOUSE: {"missing": 1, "unexplained": 1}}


def test_nothing_recorded_is_not_judged(settings: Settings, client: Client) -> None:
    assert proved(settings).verdict == "not judged"


@pytest.mark.parametrize("seed", range(4))
def test_it_says_of_clickhouse_what_the_proof_in_sql_says(
    settings: Settings, client: Client, seed: int
) -> None:
    """Rows are lost, doubled and stripped of their records at random."""
    rng = random.Random(seed)
    record(settings, recording(200))
    for _ in range(6):
        seqs = sorted(rng.sample(range(1, 203), rng.randint(1, 9)))
        table = rng.choice(["orderbook_events", "trades", "stream_events"])
        where = f"seq IN ({', '.join(map(str, seqs))})"
        match rng.randrange(4):
            case 0:
                client.command(f"DELETE FROM {table} WHERE {where}")
            case 1:
                client.command(f"INSERT INTO {table} SELECT * FROM {table} WHERE {where}")
            case 2:
                client.command(
                    f"INSERT INTO {table} SELECT * REPLACE (record + 9000 AS record) FROM {table}"
                    f" WHERE {where}"
                )
            case _:
                client.command(
                    f"ALTER TABLE {table} UPDATE shard = NULL, record = NULL WHERE {where}"
                    " SETTINGS mutations_sync = 2"
                )
    answer = client.query(queries.text("lossless_proof"))
    rows = [dict(zip(answer.column_names, row, strict=True)) for row in answer.result_rows]
    found = {
        subscription.sid: subscription.stores[CLICKHOUSE]
        for subscription in proved(settings).subscriptions
    }
    for row in rows:
        counts = found[row["sid"]]
        assert {
            "frames": counts.frames,
            "holes": counts.holes,
            "unexplained_holes": counts.unexplained,
            "missing_levels": counts.missing_levels,
            "doubled": counts.doubled,
            "repeated": counts.repeated,
        }.items() <= row.items()


def test_heads_are_read_alike_together_and_one_by_one() -> None:
    import polars as pl

    frames = [
        wire.delta("A-1", 7, "yes", 4_800, 5),
        b'{"type":"subscribed","id":1,"msg":{"channel":"orderbook_delta","sid":9,"seq":4}}\n',
        b'{"type":"ok","sid":3,"seq":9223372036854775807}',
        b'{"seq":12,"msg":{"seq":1},"sid":2,"type":"x"}',
    ]
    odd = [b'{"type":"ok","sid":"three","seq":5}', b"not JSON", b'{"type":"ok","sid":-1,"seq":5}']
    large = [b'{"type":"ok","sid":1,"seq":9223372036854775808}']  # no number that the loader takes
    wanted = [(1, 7), (0, 0), (3, 2**63 - 1), (2, 12)]
    for given, expected in (
        (frames, wanted),
        ([*frames, *odd], [*wanted, *[(0, 0)] * 3]),
        ([*frames, *large], [*wanted, (0, 0)]),
    ):
        sid, seq = tally_journal.heads(pl.Series(given, dtype=pl.Binary))
        assert list(zip(sid.to_list(), seq.to_list(), strict=True)) == expected


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("KALSHI_DATA_DIR", str(settings.data_dir))
    monkeypatch.setenv("CLICKHOUSE_URL", settings.clickhouse_url)
    monkeypatch.setenv("CLICKHOUSE_DATABASE", settings.clickhouse_database)
    monkeypatch.setenv("HOT_RETENTION_DAYS", "36500")

    def invoke(*argv: str) -> tuple[int, str]:
        platform_settings.current.cache_clear()
        result = CliRunner().invoke(main, ["proof", *argv])
        return result.exit_code, result.output

    yield invoke
    platform_settings.current.cache_clear()


def test_the_exit_status_is_the_verdict(
    settings: Settings, recorded: Client, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = run()
    assert code == 0, said
    assert "Whole: 2 of 2 subscriptions are whole" in said
    monkeypatch.setenv("CLICKHOUSE_URL", "http://127.0.0.1:9")
    code, said = run()
    assert code == 1
    assert "could not be read: ClickHouse: ClickHouse at http://127.0.0.1:9 cannot be" in said
    paths(settings.archive_dir, "trades", FIRST_HOUR)[0].unlink()
    code, said = run()  # what can be judged is not whole, whatever else could not be read
    assert code == 2
    assert "Materialise the archive's hours again" in said


def test_a_loss_is_named_by_its_numbers_and_the_remedy_works(
    settings: Settings, recorded: Client, run: Any
) -> None:
    recorded.command("DELETE FROM orderbook_events WHERE seq IN (20, 21, 30)")
    code, said = run()
    assert code == 2
    assert "sid 1 (1 to 402): clickhouse: 3 missing, 3 unexplained; lacks 20 to 21, 30" in said
    assert "Run kalshi-platform restore:" in said
    assert CliRunner().invoke(main, ["restore"]).exit_code == 0
    assert run()[0] == 0


def test_the_json_has_every_subscription(settings: Settings, recorded: Client, run: Any) -> None:
    code, said = run("--json", "--hours", f"{FIRST_HOUR:%Y-%m-%d-%H}")
    assert code == 0
    found = json.loads(said)
    assert found["verdict"] == "whole"
    assert {it["sid"] for it in found["subscriptions"]} == {1, 2}
    assert found["stores"].keys() == {CLICKHOUSE, PARQUET}
    assert START_NS
