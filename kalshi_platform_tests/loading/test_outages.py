"""An outage counts in every hour that it touches, even if it is recorded in a later one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kalshi_platform.analytics import replay
from kalshi_platform.analytics.computed import COMPUTED
from kalshi_platform.analytics.hourly import compute_hour
from kalshi_platform.archive import LocalArchive, compaction, hours, part_name, part_range
from kalshi_platform.clickhouse import queries
from kalshi_platform.clickhouse.client import connect
from kalshi_platform.journal.kind import Kind
from kalshi_platform.loading.loader import Loader, Pace
from kalshi_platform.loading.rebuild import rebuild
from kalshi_platform.loading.sinks import ClickHouseSink, ParquetSink, by_hour
from kalshi_platform.schema import ANALYTICS, DATASETS
from kalshi_platform.settings import Settings
from kalshi_platform.utc_hours import HOUR as ONE_HOUR
from kalshi_platform.utc_hours import floor_hour
from kalshi_platform_tests import wire
from kalshi_platform_tests.analytics.test_against_reference import HOUR, HOUR_NS, derived
from kalshi_platform_tests.loading.test_loader import journal_of, load_all
from kalshi_platform_tests.quality.test_parity import compared

S = wire.SECOND
BEAT_S = 10
KILLED, CUT, SILENT = "killed", "cut", "silent"
Outage = tuple[str, int, int]
"""(what happened, its first second, its last one), seconds since `HOUR`"""


def recording(until_s: int, outages: Sequence[Outage]) -> list[wire.Record]:
    """What a recorder of two markets writes from the beginning of `HOUR`, with these outages.

    A delta and a heartbeat every ten seconds. KILLED: it writes nothing, and starts again. CUT: the exchange
    closes the connection, and cannot be reached. SILENT: the connection goes dead, which capture writes down
    after half a minute, or at the end of the outage.
    """
    records = [wire.started(HOUR_NS)]

    def add(at_s: float, conn: bytes, kind: int, frame: bytes) -> None:
        records.append((HOUR_NS + int(at_s * S), conn, kind, frame))

    begins = 0
    for number, (what, first_s, last_s) in enumerate([*outages, ("end", until_s, until_s)], 1):
        conn, seq = wire.conn_id(number), 2
        records.append(wire.connected(conn, HOUR_NS + begins * S))
        for n, ticker in enumerate(("A", "B"), 1):
            add(begins, conn, Kind.SNAPSHOT, wire.snapshot(ticker, n, {4_500: 100}, {5_000: 100}))
        for at_s in range(begins + 1, first_s):
            if at_s % BEAT_S == 0:
                seq += 1
                add(at_s, conn, Kind.DELTA, wire.delta("A", seq, "yes", 4_000 + seq, 5))
                add(at_s, conn, Kind.NOTE, wire.note("heartbeat", {"state": "streaming"}))
        seq += 1
        add(first_s, conn, Kind.DELTA, wire.delta("B", seq, "yes", 4_000 + seq, 5))
        noted_s = {CUT: first_s, SILENT: min(first_s + 35, last_s)}.get(what)
        beats = range(0) if what in {KILLED, "end"} else range(first_s + 1, last_s)
        for at_s in [b for b in beats if b % BEAT_S == 0 and b != noted_s]:
            alive = noted_s is not None and at_s < noted_s
            note = wire.note("heartbeat", {"state": "streaming" if alive else "connecting"})
            add(at_s, conn if alive else bytes(16), Kind.NOTE, note)
        if noted_s is not None:
            detail = {"cause": what} | ({"span_s": noted_s - first_s} if what == SILENT else {})
            add(noted_s, conn, Kind.NOTE, wire.note("disconnected", detail))
        if what == KILLED:
            records.append(wire.started(HOUR_NS + last_s * S))
        begins = last_s
    return sorted(records, key=lambda record: record[0])


def archive_of(root: Path, records: Sequence[wire.Record]) -> LocalArchive:
    """The sealed archive of these records, without running a loader."""
    archive = LocalArchive(root)
    touched = set()
    for n, (name, table) in enumerate(derived(records)):
        for hour, part in by_hour(table, DATASETS[name].time):
            archive.write(name, hour, part_name(0, n, n + 1), [part], table.schema)
            touched.add(hour)
    for hour in touched:
        hours.seal(archive, hour)
    return archive


def unrecorded(outages: Sequence[Outage], hour: datetime, until_s: int) -> tuple[int, int]:
    """(seconds of outages, seconds of all) of one hour of the recording."""
    first = int((hour - HOUR).total_seconds())
    lost = sum(max(0, min(end, first + 3_600) - max(begin, first)) for _, begin, end in outages)
    return lost, min(until_s - first, 3_600)


def trusted_within(table: Any, outages: Sequence[Outage]) -> list[dict[str, Any]]:
    """The rows of an hour's dataset that are verified at an instant within an outage.

    A row stands from its instant to the market's next one, or to the hour's end. Of a dataset by the second
    the last second before an outage is not within it.
    """
    time = "second" if "second" in table.column_names else "ingest_ts"
    frame = pl.DataFrame(table).with_columns(pl.col("market_ticker").cast(pl.String))
    found = []
    for _, market in frame.group_by("market_ticker", maintain_order=True):
        rows = market.to_dicts()
        for n, row in enumerate(rows):
            hour_end = floor_hour(row[time]) + ONE_HOUR
            until = rows[n + 1][time] if n + 1 < len(rows) else hour_end
            begin = row[time] + timedelta(seconds=time == "second")
            for _, first_s, last_s in outages:
                first = HOUR + timedelta(seconds=first_s)
                last = HOUR + timedelta(seconds=last_s)
                if row["verified"] and max(begin, first) < min(until, last):
                    found.append({"until": until, **row})
    return found


def outage_lists() -> st.SearchStrategy[tuple[list[Outage], int]]:
    """Up to three outages in three hours and a bit, and where the recording ends."""
    kinds = st.sampled_from((KILLED, CUT, SILENT))
    span_s = st.one_of(st.integers(31, 900), st.integers(3_000, 8_000))
    near_hours = st.sampled_from((3_590, 3_599, 3_600, 3_601, 7_195, 7_200))
    begins = st.one_of(st.integers(60, 9_000), near_hours)

    def placed(drawn: list[tuple[str, int, int]]) -> tuple[list[Outage], int]:
        outages: list[Outage] = []
        for what, begin, span in sorted(drawn, key=lambda it: it[1]):
            first = max(begin, outages[-1][2] + 60 if outages else 0)
            outages.append((what, first, first + span))
        return outages, max(outages[-1][2] + 60, 3 * 3_600) + 20

    return st.lists(st.tuples(kinds, begins, span_s), min_size=1, max_size=3).map(placed)


@given(drawn=outage_lists())
@example(drawn=([(KILLED, 3_300, 3_900)], 10_820))
@example(drawn=([(CUT, 3_300, 3_900)], 10_820))
@example(drawn=([(SILENT, 3_590, 3_900)], 10_820))
@example(drawn=([(KILLED, 3_300, 7_500)], 10_820))
@example(drawn=([(KILLED, 3_600, 7_200)], 10_820))
@example(drawn=([(KILLED, 60, 91)], 10_820))
@hypothesis_settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_row_is_verified_within_an_outage_and_coverage_counts_it(
    drawn: tuple[list[Outage], int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    outages, until_s = drawn
    archive = archive_of(tmp_path_factory.mktemp("archive"), recording(until_s, outages))
    for n in range(until_s // 3_600):
        hour = HOUR + n * ONE_HOUR
        lost_s, all_s = unrecorded(outages, hour, until_s)
        manifest = archive.read_manifest("stream_events", hour)
        if manifest is None:
            killed = [o for o in outages if o[0] == KILLED]
            assert unrecorded(killed, hour, until_s)[0] == all_s, "an hour is missing"
            continue
        if lost_s < all_s:
            assert manifest.coverage == pytest.approx(1 - lost_s / all_s, abs=1e-4), hour
        else:
            assert not manifest.coverage
        of = replay.read(archive, hour)
        for name, compute in COMPUTED.items():
            assert trusted_within(compute(of), outages) == [], (hour, name)
        assert trusted_within(replay.after_events(of), outages) == [], hour


def test_a_connection_without_books_yet_does_not_end_an_outage() -> None:
    first, second = wire.conn_id(1), wire.conn_id(2)
    records: list[wire.Record] = [
        wire.connected(first, HOUR_NS),
        (HOUR_NS, first, Kind.SNAPSHOT, wire.snapshot("A", 1, {4_500: 100}, {})),
        (HOUR_NS + 3_000 * S, first, Kind.NOTE, wire.note("disconnected", {"cause": "test"})),
        wire.connected(second, HOUR_NS + 3_590 * S),
        (HOUR_NS + 3_601 * S, second, Kind.NOTE, wire.note("heartbeat", {})),
    ]
    (books,) = (table for name, table in derived(records) if name == "book_checkpoints" and table)
    assert [(b["market_ticker"], b["verified"]) for b in books.to_pylist()] == [("A", False)]


# -- from the journal through both stores ----------------------------------------------------------


def test_five_minutes_of_an_outage_over_the_hour_are_in_both_hours(settings: Settings) -> None:
    outages = [(KILLED, 3_300, 3_900)]
    records = recording(7_220, outages)
    reports: list[hours.HourReport] = []
    archive = LocalArchive(settings.archive_dir)
    with closing(connect(settings)) as client:
        writer = journal_of(settings.journal_dir(), records)
        pace = Pace(rows=40, seconds=0.0, first_s=0.0)
        for store in (
            ParquetSink(archive, 0, reports.append),
            ClickHouseSink(settings, str(writer.id)),
        ):
            load_all(Loader(settings.journal_dir(), writer, store, pace))
        writer.close()
        for compacted in (False, True):
            if compacted:
                compaction.compact(archive, [HOUR, HOUR + ONE_HOUR], lambda _: None, _raise)
            else:
                late_part(settings.archive_dir).unlink()
            for hour in (HOUR, HOUR + ONE_HOUR):
                rebuild(settings, hour)
                compute_hour(settings, hour)
                manifest = archive.read_manifest("orderbook_events", hour)
                assert manifest is not None
                assert manifest.coverage == pytest.approx(11 / 12, abs=1e-4)
                for dataset in ANALYTICS:
                    (table,) = archive.read(dataset.name, hour)
                    assert trusted_within(table, outages) == [], (dataset.name, hour)
                    time = "second" if "second" in table.column_names else "ingest_ts"
                    stored = client.query_arrow(
                        f"SELECT market_ticker, {time}, verified FROM {dataset.name} WHERE"
                        f" {time} >= {{hour:DateTime64(6, 'UTC')}} AND {time} < {{hour:DateTime64(6, 'UTC')}} + INTERVAL 1 HOUR"
                        f" ORDER BY market_ticker, known_at"
                        + (", record, seq" if time == "ingest_ts" else ""),
                        parameters={"hour": hour},
                    )
                    assert stored.num_rows == table.num_rows
                    assert sum(stored["verified"].to_pylist()) == sum(table["verified"].to_pylist())
            assert [d.what for d in compared(settings, client).differences] == []
        unheard = client.query(
            "SELECT toUnixTimestamp64Micro(ingest_ts), conn_id FROM stream_events WHERE kind = 'unheard'"
        ).result_rows
        assert [us for us, _ in unheard] == [(HOUR_NS + 3_300 * S) // 1000]
        held = {
            at_s: client.query(
                "SELECT max(price) FROM book_at(ticker = 'B', at = {at:DateTime64(6, 'UTC')})"
                " WHERE side = 'yes'",
                parameters={"at": HOUR + timedelta(seconds=at_s)},
            ).result_rows[0][0]
            for at_s in (3_299, 3_500, 3_700, 3_901)
        }
        # within the outage: the book known before it, on either side of the hour
        assert held == dict.fromkeys((3_299, 3_500, 3_700, 3_901), Decimal("0.4500"))
        proved = list(client.query(queries.text("lossless_proof")).named_results())
        wrong = ("unexplained_holes", "missing_levels", "doubled")
        assert len(proved) == 2
        assert [row for row in proved if any(row[name] for name in wrong)] == []


def late_part(root: Path) -> Path:
    """The file of `HOUR` with what the next hour says of it."""
    folder = root / "stream_events" / f"date={HOUR:%Y-%m-%d}" / f"hour={HOUR:%H}"
    parts = {part_range(path.name): path for path in folder.glob("part-*.parquet")}
    return parts[max(cut for cut in parts if cut is not None)]


def _raise(hour: object, error: Exception) -> None:
    raise AssertionError(f"{hour}: {error}")
