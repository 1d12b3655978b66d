"""Every argument of an engine becomes a row, or an error in its own thread that the spool never sees."""

from __future__ import annotations

import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalshi_platform.engine import (
    ActionType,
    BadValue,
    Contract,
    Inventory,
    InventoryError,
    OrderStatus,
    Quote,
    Quoted,
    Reconciled,
    Recorder,
    Result,
    Sent,
    WorkingOrder,
    WrongType,
    inventory,
)
from kalshi_platform.inventory.rows import TABLES
from kalshi_platform.inventory.semantics import Resting
from kalshi_platform.settings import Settings
from kalshi_platform_tests.inventory.planted import Planted
from kalshi_platform_tests.inventory.test_recorder import PATIENCE_S, count

AT = datetime(2026, 11, 22, 12, tzinfo=UTC)
EAST, WEST = timezone(timedelta(hours=5)), timezone(timedelta(hours=-5))
HELD = Reconciled.from_exchange("T", "-3.50", AT)


class Word(StrEnum):
    CANCELED = "canceled"


class Other(Enum):
    YES = "yes"


class Text(str):
    __slots__ = ()


class NoRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 201, 2**63, 10**40, -(10**400)),
    *(0.0, 0.5, -1.5, 1e300, float("nan"), float("inf"), float("-inf")),
    *map(Decimal, ("0.5", "-1", "NaN", "sNaN", "Infinity", "1E+400", "1E-400", "0.123456789012345")),
    *("", "yes", "no", "bid", "canceled", "cancelled", "T", "a\0b", "\ud800", "é" * 20, "x" * 20_000),
    *(b"yes", b"", uuid.uuid4(), "not-a-uuid", str(uuid.uuid4()), Word.CANCELED, Other.YES, Text("t")),
    *(np.float64(0.5), np.float32(0.25), np.int64(3), np.bool_(True), np.str_("n"), np.float64("inf")),
    *(np.array([1.0]), np.datetime64("2026-11-22"), pd.Timestamp(AT), pd.NaT, pd.NA),
    *([], [1], ["a"], ["\ud800"], [None], (), {"a"}, {}, {"a": Decimal(1)}, {"a": NoRepr()}, {1: 2}),
    *({"a": "\ud800"}, {"a": float("nan")}, {"a": 10**40}, {"a": np.float64(1)}, {"a": object()}),
    *(AT, AT.replace(tzinfo=None), date(2026, 11, 22), timedelta(1)),
    *(datetime.min.replace(tzinfo=EAST), datetime.max.replace(tzinfo=WEST)),
    *(AT.replace(year=1969), AT.replace(year=2150), AT.astimezone(EAST)),
    *(Contract.YES, Quote.BID, ActionType.CANCEL, OrderStatus.EXPIRED, Result.VOID, NoRepr(), object),
    *(HELD, inventory(HELD, []), Quoted(), WorkingOrder("o", Contract.NO, Quote.ASK, Decimal(2))),
]  # fmt: skip

Verb = tuple[Callable[..., Any], str, dict[str, Any]]


def verbs(recorder: Recorder) -> dict[str, Verb]:
    """Each verb with its table and arguments that are right."""
    sent = Sent(uuid.uuid4(), AT, "T", "o")
    quoted = dict.fromkeys(("bb_px", "ba_px", "fair", "target_bid_px", "target_ask_px"), 0.5)

    def quote(**fields: Any) -> None:
        recorder.decision(inventory(HELD, []), Quoted(**fields))

    def held(**order: Any) -> None:
        recorder.decision(inventory(HELD, [WorkingOrder(**order)]), Quoted())

    def position(market_ticker: Any, position_fp: Any, as_of: Any) -> None:
        recorder.snapshot(
            Reconciled.from_exchange(market_ticker, position_fp, as_of), source="positions"
        )

    def filled(contract: Any, count: Any, at: Any) -> None:
        recorder.snapshot(HELD.filled(contract, count, at), source="fills")

    def rest(**sizes: Any) -> None:
        recorder.decision(Inventory(HELD, Resting(**sizes)), Quoted())

    def answered(**fields: Any) -> None:
        recorder.response(Sent(**fields), "resting", latency_ms=1.0)

    order = {"decision_id": uuid.uuid4(), "price": Decimal("0.5"), "request": {"a": 1}}
    sides = {"quote": Quote.BID, "contract": Contract.YES}
    said = {"exchange_order_id": "x", "reject_reason": "", "response": {"a": 1}}
    return {
        "decision": (recorder.decision, "mm_decisions", {
            "inventory": inventory(HELD, []), "quoted": Quoted(), "expected_change": Decimal(1),
            "allowed": False, "block_stage": "risk", "block_codes": ["a"], "reason_codes": ["b"],
        }),
        "quoted": (quote, "mm_decisions", {
            **quoted, "target_bid_sz": 1.0, "target_ask_sz": 1.0, "params": {"a": 1},
        }),
        "working order": (held, "mm_decisions", {
            "client_order_id": "o", **sides, "remaining": Decimal(1),
        }),
        "resting": (rest, "mm_decisions", {
            "open_orders_count": 4,
            **dict.fromkeys(
                ("open_yes_bid_size", "open_yes_ask_size", "open_no_bid_size", "open_no_ask_size"),
                Decimal(2),
            ),
        }),
        "action": (recorder.action, "mm_order_actions", {
            "market_ticker": "T", "client_order_id": "o", "kind": ActionType.REPLACE, **order,
            **sides, "size": Decimal(2), "replace_of": "p", "order_group_id": "g", "subaccount": 1,
        }),
        "decrease": (recorder.decrease, "mm_order_actions", {
            "market_ticker": "T", "client_order_id": "o", "remaining": Decimal(1), **sides, **order,
        }),
        "response": (recorder.response, "mm_order_responses", {
            "sent": sent, "status": OrderStatus.RESTING, "latency_ms": 1.0, **said,
        }),
        "sent": (answered, "mm_order_responses", {
            "action_id": uuid.uuid4(), "ts": AT, "market_ticker": "T", "client_order_id": "o",
        }),
        "order_changed": (recorder.order_changed, "mm_order_responses", {
            "sent": sent, "status": "expired", **said,
        }),
        "fill": (recorder.fill, "mm_fills", {
            "market_ticker": "T", "fill_id": "f", "contract": Contract.NO, "size": Decimal(1),
            "price": Decimal("0.5"), "at": AT, "exchange_order_id": "x", "client_order_id": "o",
            "fee": Decimal("0.01"), "decision_id": uuid.uuid4(), "subaccount": 0, "raw": {"a": 1},
        }),
        "snapshot": (recorder.snapshot, "mm_position_snapshots", {
            "position": HELD, "source": "positions", "avg_cost": Decimal("0.5"), "raw": {"a": 1},
        }),
        "position": (position, "mm_position_snapshots", {
            "market_ticker": "T", "position_fp": "1.00", "as_of": AT,
        }),
        "filled": (filled, "mm_position_snapshots", {
            "contract": Contract.NO, "count": Decimal(1), "at": AT,
        }),
        "settled": (recorder.settled, "mm_position_snapshots", {
            "position": HELD, "result": "void", "value": Decimal("0.5"), "at": AT, "raw": {"a": 1},
        }),
    }  # fmt: skip


def test_every_value_reaches_clickhouse_or_is_refused_at_the_call(
    planted: Planted, migrated_once: Settings, tmp_path: Path
) -> None:
    recorder = Recorder("engine-1", "1", settings=migrated_once, spool=tmp_path / "spool")
    taken: dict[str, int] = dict.fromkeys(TABLES, 0)
    refused = 0
    for name, (verb, table, right) in verbs(recorder).items():
        verb(**right)
        taken[table] += 1
        for field in right:
            for value in VALUES:
                try:
                    verb(**{**right, field: value})
                except (TypeError, ValueError) as error:
                    assert isinstance(error, InventoryError), (name, field, value, error)
                    assert str(error).isprintable(), (name, field)
                    refused += 1
                else:
                    taken[table] += 1
    assert refused > 3_000
    assert recorder.drain(PATIENCE_S), recorder.trouble
    assert {name: count(planted, name) for name in TABLES} == taken
    assert recorder.trouble is None
    assert recorder.status().rows_set_aside == 0
    assert {"mm-spool", "mm-insert"} <= {thread.name for thread in threading.enumerate()}
    assert recorder.close() == 0


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.decimals(), st.binary(), st.uuids(),
    st.text(st.characters()), st.datetimes(), st.datetimes(timezones=st.just(UTC)),
    st.lists(st.text(st.characters())), st.sampled_from([*Contract, *Quote, *ActionType]),
    st.dictionaries(st.text(st.characters()), st.floats() | st.integers() | st.text(st.characters())),
)  # fmt: skip


class Kept:
    """A sink that makes of each row what the spool would."""

    def put(self, table: str, row: Mapping[str, Any]) -> None:
        made = pa.Table.from_pylist([row], schema=TABLES[table].arrow)
        assert TABLES[table].sifted(made)[1] == {}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_is_taken_is_a_row(data: st.DataObject) -> None:
    known = verbs(Recorder("e", "1", sink=Kept()))
    verb, _, right = known[data.draw(st.sampled_from(sorted(known)))]
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(right)), ANYTHING, min_size=1))
    try:
        verb(**{**right, **changed})
    except InventoryError as error:
        assert isinstance(error, TypeError | ValueError), error


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: HELD.filled("yes", 1, AT), TypeError, "contract is 'yes', a str: give Contract.YES"),  # type: ignore[arg-type]
        (lambda: WorkingOrder("o", "yes", "bid", Decimal(1)), TypeError, "give Contract.YES"),  # type: ignore[arg-type]
        (lambda: WorkingOrder("o", Contract.YES, "bid", Decimal(1)), TypeError, "give Quote.BID"),  # type: ignore[arg-type]
        (lambda: HELD.filled(Contract.YES, Decimal(-1), AT), ValueError, "count is Decimal"),
        (lambda: HELD.filled(Contract.YES, 0.1, AT), TypeError, r"exact number, such as Decimal"),  # type: ignore[arg-type]
        (lambda: Quoted(fair=float("inf")), ValueError, "fair is inf: give a finite number"),
        (lambda: Quoted(fair="0.5"), TypeError, "fair is '0.5', a str: give a number"),  # type: ignore[arg-type]
        (lambda: inventory(HELD, ["o"]), TypeError, "WorkingOrder"),  # type: ignore[list-item]
    ],
)  # fmt: skip
def test_a_refusal_names_argument_value_and_what_is_wanted(
    call: Callable[[], object], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says) as met:
        call()
    assert isinstance(met.value, WrongType | BadValue)


@pytest.mark.parametrize(
    ("given", "kept"),
    [(Decimal("0.45"), 0.45), (np.float32(0.25), 0.25), (1, 1.0), (np.int64(1), 1.0)],
)
def test_a_number_of_another_type_is_converted(given: Any, kept: float) -> None:
    fair = Quoted(fair=given).fair
    assert type(fair) is float
    assert fair == kept


@pytest.mark.parametrize("now_ns", [0, -1, 4_102_444_800 * 10**9, float("nan")])
def test_a_clock_that_no_table_can_hold_is_refused(now_ns: Any) -> None:
    recorder = Recorder("e", "1", sink=Kept(), clock_ns=lambda: now_ns)
    with pytest.raises(BadValue, match="set the machine's clock"):
        recorder.decision(inventory(HELD, []), Quoted())


def test_an_engine_imports_neither_dagster_nor_chdb_nor_polars() -> None:
    said = (
        "import sys, kalshi_platform.engine\n"
        "print([m for m in ('dagster', 'chdb', 'polars', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", said], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "[]\n"
