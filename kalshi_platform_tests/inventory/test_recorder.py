"""The recorder: never waits, loses nothing with ClickHouse away, stores nothing twice."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from kalshi_platform.inventory.recorder import ActionType, Quoted, Recorder
from kalshi_platform.inventory.rows import TABLES
from kalshi_platform.inventory.semantics import (
    Contract,
    Inventory,
    InventoryError,
    Quote,
    Reconciled,
    WorkingOrder,
    inventory,
)
from kalshi_platform.inventory.spool import Spool
from kalshi_platform.settings import Settings
from kalshi_platform_tests.inventory.planted import Planted

AT = datetime(2026, 11, 22, 12, tzinfo=UTC)
PATIENCE_S = 60.0
"""For what takes a moment, on a machine that is busy with other things."""


def held(position: str = "-3.50") -> Inventory:
    return inventory(
        Reconciled.from_exchange("T", position, AT),
        [WorkingOrder("o", Contract.YES, Quote.BID, Decimal("2.25"))],
    )


def away(settings: Settings) -> Settings:
    """The same settings, with ClickHouse at a port on which nothing listens."""
    return settings.model_copy(update={"clickhouse_url": "http://127.0.0.1:9"})


def count(planted: Planted, table: str) -> int:
    return int(planted.client.query(f"SELECT count() FROM {table}").result_rows[0][0])


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(0.05)


def test_every_row_arrives_as_it_was_recorded(
    planted: Planted, migrated_once: Settings, tmp_path: Path
) -> None:
    recorder = Recorder("engine-1", "2.4", settings=migrated_once, spool=tmp_path / "spool")
    quoted = Quoted(bb_px=0.44, ba_px=0.46, fair=0.45, params={"k": 1})
    decided = recorder.decision(
        held(),
        quoted,
        expected_change=Decimal("1.5"),
        allowed=False,
        block_stage="risk",
        block_codes=["max_long", "halted"],
        reason_codes=["max_long"],
    )
    sent = recorder.action(
        "T",
        "o",
        ActionType.PLACE,
        decision_id=decided.decision_id,
        quote=Quote.BID,
        contract=Contract.YES,
        price=Decimal("0.4450"),
        size=Decimal("2.25"),
        request={"post_only": True},
    )
    recorder.response(sent, "rejected", reject_reason="post_only_cross", latency_ms=3.5)
    recorder.fill("T", "f-1", Contract.NO, Decimal("1.25"), Decimal("0.55"), at=AT)
    recorder.snapshot(held().position, source="positions", raw={"position_fp": "-3.50"})
    assert recorder.drain(PATIENCE_S)
    assert recorder.close() == 0
    query = planted.client.query
    assert query(
        "SELECT decision_id, pos_filled, pos_open_exposure, pos_total_est, open_orders_count,"
        " open_yes_bid_size, inv_before, inv_after_est, allowed, block_codes, inv_convention"
        " FROM mm_decisions"
    ).result_rows == [
        (
            decided.decision_id,
            -3.5,
            2.25,
            -1.25,
            1,
            2.25,
            -3.5,
            -2.0,
            0,
            ["max_long", "halted"],
            "yes_positive",
        )
    ]
    assert query(
        "SELECT action_type, side, api_side, price, price_cents, size, request_json, ts >= ts"
        " FROM mm_order_actions"
    ).result_rows == [("place", "bid", "yes", 0.445, 44.5, 2.25, '{"post_only":true}', 1)]
    assert query(
        "SELECT action_id, reject_reason, latency_ms FROM mm_order_responses"
    ).result_rows == [(str(sent.action_id), "post_only_cross", 3.5)]
    assert query("SELECT side, size, price, fill_id, ts FROM mm_fills").result_rows == [
        ("no", 1.25, 0.55, "f-1", AT)
    ]
    assert query("SELECT pos_filled, source FROM mm_position_snapshots").result_rows == [
        (-3.5, "positions")
    ]


def test_no_parameter_takes_an_inventory_that_is_not_reconciled() -> None:
    taken = inspect.signature(Recorder.decision).parameters
    assert set(taken) == {
        "self", "inventory", "quoted", "expected_change",
        "allowed", "block_stage", "block_codes", "reason_codes",
    }  # fmt: skip


@pytest.mark.parametrize(("allowed", "codes"), [(True, ["max_long"]), (False, [])])
def test_a_block_and_its_codes_belong_together(allowed: bool, codes: list[str]) -> None:
    class Nowhere:
        def put(self, table: str, row: Any) -> None:
            raise AssertionError(table)

    recorder = Recorder("e", "1", sink=Nowhere())
    with pytest.raises(InventoryError, match="has a code"):
        recorder.decision(held(), Quoted(), allowed=allowed, block_codes=codes)


def test_the_next_engine_sends_rows_that_wait_on_disk(
    planted: Planted, migrated_once: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "spool"
    first = Recorder("engine-1", "1", settings=away(migrated_once), spool=folder)
    for _ in range(500):
        first.decision(held(), Quoted())
    wait_for(lambda: first.trouble is not None, "an attempt to send")
    assert not first.drain(0.1)
    assert "cannot be reached" in str(first.trouble)
    assert first.close(0.1) > 0
    assert count(planted, "mm_decisions") == 0
    second = Recorder("engine-2", "1", settings=migrated_once, spool=folder)
    second.decision(held(), Quoted())
    assert second.drain(PATIENCE_S)
    second.close()
    assert count(planted, "mm_decisions") == 501


def test_a_file_that_is_sent_twice_is_stored_once(
    planted: Planted, migrated_once: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "spool"
    gone = Recorder("engine-1", "1", settings=away(migrated_once), spool=folder)
    gone.decision(held(), Quoted())
    gone.close(0.1)
    (file,) = folder.glob("*.arrow")
    content = file.read_bytes()
    for _ in range(3):  # as after a kill between the insert and the removal of the file
        file.write_bytes(content)
        again = Spool(folder, migrated_once)
        assert again.drain(PATIENCE_S)
        again.close()
        assert count(planted, "mm_decisions") == 1


def test_a_spool_sends_only_its_own_complete_files(
    planted: Planted, migrated_once: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "spool"
    for _ in range(2):
        gone = Recorder("engine-1", "1", settings=away(migrated_once), spool=folder)
        gone.decision(held(), Quoted())
        gone.close(0.1)
    first, _ = sorted(folder.glob("*.arrow"))
    first.write_bytes(first.read_bytes()[:100])
    foreign = [folder / name for name in ("notes.arrow", "mine.tmp", "a-b.arrow")]
    for path in foreign:
        path.write_text("not a spool's")
    again = Spool(folder, migrated_once)
    assert again.drain(PATIENCE_S)
    again.close()
    assert count(planted, "mm_decisions") == 1
    assert all(path.read_text() == "not a spool's" for path in foreign)
    assert (folder / "refused" / first.name).stat().st_size == 100
    assert not first.exists()


def test_a_server_that_kept_a_token_without_rows_gets_them_again(
    planted: Planted, migrated_once: Settings, tmp_path: Path
) -> None:
    """ClickHouse writes a token down before the rows: a kill in between leaves the token alone."""
    folder = tmp_path / "spool"
    gone = Recorder("engine-1", "1", settings=away(migrated_once), spool=folder)
    gone.decision(held(), Quoted())
    sent = gone.action("T", "o", ActionType.CANCEL)
    gone.response(sent, "canceled", latency_ms=3.5, response={"order": "x" * 500})
    gone.fill("T", "f-1", Contract.NO, Decimal("1.25"), Decimal("0.55"), at=AT)
    gone.snapshot(held().position, source="positions", raw={"position_fp": "-3.50"})
    gone.close(0.1)
    files = {file: file.read_bytes() for file in folder.glob("*.arrow")}
    each_once = dict.fromkeys(TABLES, 1)

    def send() -> dict[str, int]:
        for file, content in files.items():
            file.write_bytes(content)
        heir = Spool(folder, migrated_once)
        assert heir.drain(PATIENCE_S)
        heir.close()
        return {name: count(planted, name) for name in TABLES}

    assert send() == each_once
    for name in TABLES:
        planted.client.command(f"ALTER TABLE {name} DELETE WHERE true SETTINGS mutations_sync = 2")
    for _ in range(2):  # the second as after one more kill before the file was removed
        assert send() == each_once


def test_a_table_that_is_missing_holds_up_no_other(
    planted: Planted, migrated_once: Settings, tmp_path: Path
) -> None:
    planted.client.command("DROP TABLE mm_fills")
    recorder = Recorder("engine-1", "1", settings=migrated_once, spool=tmp_path / "spool")
    recorder.fill("T", "f", Contract.YES, Decimal(1), Decimal("0.5"), at=AT)
    recorder.decision(held(), Quoted())
    wait_for(
        lambda: count(planted, "mm_decisions") == 1 and recorder.trouble is not None,
        "the decision, and a word about the fill",
    )
    assert not recorder.drain(0.1)
    assert "mm_fills" in str(recorder.trouble)
    assert recorder.close(0.1) == 1
    assert count(planted, "mm_decisions") == 1


def test_two_engines_cannot_share_a_spool(migrated_once: Settings, tmp_path: Path) -> None:
    first = Spool(tmp_path / "spool", migrated_once)
    with pytest.raises(InventoryError, match="Another engine writes to the spool"):
        Spool(tmp_path / "spool", migrated_once)
    first.close()


KILLED = """
import sys, time
from decimal import Decimal
from pathlib import Path
from kalshi_platform import settings
from kalshi_platform.inventory.recorder import Quoted, Recorder
from kalshi_platform_tests.inventory.test_recorder import held
recorder = Recorder("killed", "1", settings=settings.load(_env_file=None), spool=Path(sys.argv[1]))
for n in range(100):
    recorder.decision(held(), Quoted())
recorder._spool.flush()
print("flushed", flush=True)
time.sleep(60)
"""


def test_a_killed_engine_loses_nothing_that_was_flushed(
    planted: Planted, migrated_once: Settings, tmp_path: Path
) -> None:
    env = {**os.environ, "CLICKHOUSE_URL": "http://127.0.0.1:9"}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "spool")], env=env, stdout=subprocess.PIPE
    ) as engine:
        assert engine.stdout is not None
        assert engine.stdout.readline() == b"flushed\n"
        engine.send_signal(signal.SIGKILL)
    heir = Spool(tmp_path / "spool", migrated_once)
    assert heir.drain(PATIENCE_S)
    heir.close()
    assert count(planted, "mm_decisions") == 100


def test_who_sees_a_decision_sees_what_came_before_it(
    migrated_once: Settings, tmp_path: Path
) -> None:
    gone = Recorder("engine-1", "1", settings=away(migrated_once), spool=tmp_path / "spool")
    gone.snapshot(held().position, source="positions")
    gone.decision(held(), Quoted())
    gone.fill("T", str(uuid.uuid4()), Contract.YES, Decimal(1), Decimal("0.5"), at=AT)
    gone.close(0.1)
    files = sorted(path.stem for path in (tmp_path / "spool").glob("*.arrow"))
    assert [name.rpartition("-")[2] for name in files] == [
        "mm_position_snapshots",
        "mm_fills",
        "mm_decisions",
    ]
    assert list(TABLES)[-1] == "mm_decisions"


def test_the_rows_are_those_of_the_tables(planted: Planted) -> None:
    for table in TABLES.values():
        described = planted.client.query(f"DESCRIBE TABLE {table.name}").result_rows
        assert [row[0] for row in described] == list(table.columns)
