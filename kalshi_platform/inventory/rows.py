"""The Arrow schemas of the market maker's tables, and the test whether a table can hold a row.

Migrations 004 and 010 create the tables; a test compares them with the schemas here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform.inventory.values import EARLIEST, LATEST
from kalshi_platform.schema import Key

SETTLEMENTS = "settlements"
"""The `source` of a snapshot of a settled or voided market, in which nothing is held any more."""
_TIME = pa.timestamp("ms", "UTC")
_TEXTS = pa.list_(pa.string())


_UUIDS = {"decision_id"}
"""Columns of text that are UUIDs in ClickHouse."""
_UUID = "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"


class Table:
    """One table: its name, the Arrow schema of its rows, and the key that identifies a row."""

    def __init__(self, name: str, columns: Mapping[str, pa.DataType], key: tuple[str, ...]) -> None:
        self.name = name
        self.key = Key("ts", ("market_ticker", "engine_instance_id", *key))
        self.arrow = pa.schema([pa.field(c, kind, nullable=False) for c, kind in columns.items()])

    @property
    def columns(self) -> Iterable[str]:
        """The columns' names, in order."""
        return list(self.arrow.names)

    def sifted(self, rows: pa.Table) -> tuple[pa.Table, dict[int, str]]:
        """Return (the rows that the table can hold, by row number why each other row cannot be held).

        Raises `pa.ArrowException` if the columns are not those of this table.
        """
        if set(rows.column_names) != set(self.arrow.names) or rows.num_columns != len(self.arrow):
            odd = sorted(set(rows.column_names) ^ set(self.arrow.names))
            raise pa.ArrowInvalid(f"its columns are not those of {self.name}: {', '.join(odd)}")
        loose = pa.schema([field.with_nullable(True) for field in self.arrow])
        rows = rows.select(self.arrow.names).cast(loose)
        rows.validate(full=True)
        wrong: dict[int, str] = {}
        for field in self.arrow:
            for fault, where in _faults(field, rows[field.name].combine_chunks()):
                for number in pc.indices_nonzero(where).to_pylist():
                    wrong.setdefault(number, f"{field.name} {fault}")
        good = rows
        if wrong:
            kept = [n not in wrong for n in range(rows.num_rows)]
            good = rows.filter(pa.array(kept, pa.bool_()))
        return pa.Table.from_arrays(good.columns, schema=self.arrow), wrong


def _faults(field: pa.Field, column: pa.Array) -> Iterator[tuple[str, pa.Array]]:
    """Yield each fault of a column, with a mask of the rows that have it."""
    if column.null_count:
        yield "is null", column.is_null()
    if pa.types.is_list(field.type) and column.flatten().null_count:
        yield (
            "has a null in it",
            pa.array([None in (values or ()) for values in column.to_pylist()]),
        )
    if field.type == _TIME:
        outside = pc.or_(
            pc.less(column, pa.scalar(EARLIEST, _TIME)),
            pc.greater_equal(column, pa.scalar(LATEST, _TIME)),
        )
        yield "is not between 2000 and 2099", outside.fill_null(False)
    if field.name in _UUIDS:
        is_uuid = pc.match_substring_regex(column, _UUID)
        yield "is no UUID", pc.invert(is_uuid).fill_null(False)


def _texts(*names: str) -> dict[str, pa.DataType]:
    return dict.fromkeys(names, pa.string())


def _floats(*names: str) -> dict[str, pa.DataType]:
    return dict.fromkeys(names, pa.float64())


_ENGINE = _texts("engine_instance_id", "engine_version", "market_ticker")

DECISIONS = Table(
    "mm_decisions",
    {
        "ts": _TIME,
        "decision_id": pa.string(),
        **_ENGINE,
        **_floats("bb_px", "ba_px", "mid", "spread", "fair"),
        **_floats("target_bid_px", "target_ask_px", "target_bid_sz", "target_ask_sz"),
        **_floats("inv_before", "inv_after_est"),
        "params_json": pa.string(),
        **_floats("pos_filled", "pos_open_exposure", "pos_total_est"),
        "open_orders_count": pa.uint32(),
        **_floats("open_yes_bid_size", "open_yes_ask_size", "open_no_bid_size", "open_no_ask_size"),
        "allowed": pa.uint8(),
        "block_stage": pa.string(),
        "block_codes": _TEXTS,
        "reason_codes": _TEXTS,
        "inv_convention": pa.string(),
    },
    ("decision_id",),
)
INVENTORY_COLUMNS = tuple(DECISIONS.columns)[list(DECISIONS.columns).index("params_json") + 1 :]
"""Columns of migration 010; those before them are of migration 004."""
ORDER_ACTIONS = Table(
    "mm_order_actions",
    {
        "ts": _TIME,
        **_texts("action_id", "decision_id"),
        **_ENGINE,
        **_texts("client_order_id", "action_type", "side", "api_side"),
        **_floats("price", "price_cents", "size"),
        **_texts("replace_of_client_order_id", "request_json"),
    },
    ("action_id",),
)
ORDER_RESPONSES = Table(
    "mm_order_responses",
    {
        "ts": _TIME,
        "action_id": pa.string(),
        **_ENGINE,
        **_texts("client_order_id", "status", "exchange_order_id", "reject_reason"),
        "latency_ms": pa.float64(),
        "response_json": pa.string(),
    },
    ("action_id", "status", "response_json"),
)
FILLS = Table(
    "mm_fills",
    {
        "ts": _TIME,
        **_ENGINE,
        **_texts("exchange_order_id", "client_order_id", "side"),
        **_floats("price", "price_cents", "size", "fee"),
        **_texts("decision_id", "fill_id", "raw_json"),
    },
    ("fill_id", "raw_json"),
)
POSITION_SNAPSHOTS = Table(
    "mm_position_snapshots",
    {
        "ts": _TIME,
        **_ENGINE,
        **_floats("pos_filled", "avg_cost"),
        **_texts("source", "raw_json"),
    },
    ("source", "raw_json"),
)
TABLES = {
    table.name: table
    for table in (POSITION_SNAPSHOTS, FILLS, ORDER_ACTIONS, ORDER_RESPONSES, DECISIONS)
}
"""In the order in which rows are written: a reader that sees a decision also sees the rows before it."""
