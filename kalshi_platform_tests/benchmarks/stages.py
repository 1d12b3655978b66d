"""Measure each stage from the socket to the stores alone, on the same frames.

CPU of one core, in microseconds for each frame, medians. Alone a stage finds its data in the cache and
has the machine to itself, so that the stages together take less than the recorder as a whole.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State as Connection
from websockets.uri import parse_uri

from kalshi_platform.archive import write_durably
from kalshi_platform.clickhouse.client import WIRE_CODEC
from kalshi_platform.exchange.columnar import decode
from kalshi_platform.exchange.framing import Framing
from kalshi_platform.exchange.session import Session
from kalshi_platform.journal import reader
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.reader import RecordRange, concatenate
from kalshi_platform.journal.writer import Writer
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.rows import Rows, build_rows
from kalshi_platform.schema import ORDERBOOK_EVENTS
from kalshi_platform_tests.benchmarks import feed
from kalshi_platform_tests.benchmarks.figures import Figure, number

TIMES = 5
READ_BYTES = 256 << 10
"""What asyncio reads of a socket at once."""
UNIT = "µs a frame"


def figures(deltas: Path, markets: int, frames: int = 65_536) -> list[Figure]:
    """Every stage."""
    payloads = feed.payloads(deltas, frames)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        block, state = _journalled(folder / "journal", payloads, markets)
        decoded = decode([block])
        rows, _ = build_rows(decoded, state)
        events = rows.tables[ORDERBOOK_EVENTS.name]

        def parquet() -> None:
            write_durably(folder / "part.parquet", [events], events.schema)

        stages: dict[str, Callable[[], object]] = {
            "WebSocket frames": lambda: _cut(wire, again),
            "numbers and kinds (session)": lambda: _judge(payloads),
            "journal: Arrow, zstd, checksum, sync": lambda: _keep(folder / "kept", payloads),
            "JSON to columns": lambda: decode([block]),
            "books and rows": lambda: build_rows(decoded, state),
            "Parquet file": parquet,
            "Arrow batch for ClickHouse": lambda: _batch(rows),
        }
        wire = b"".join(Frame(Opcode.TEXT, p).serialize(mask=False) for p in payloads[:8_192])
        again = frames // 8_192
        library = number(_cpu_us(lambda: _parse(wire, again), frames))
        beside = {"WebSocket frames": f"{library} by the websockets library"}
        return [
            Figure(what, _cpu_us(work, frames), UNIT, beside=beside.get(what, ""))
            for what, work in stages.items()
        ]


def _cpu_us(work: Callable[[], object], frames: int) -> float:
    took = []
    for _ in range(TIMES):
        began = time.process_time()
        work()
        took.append(time.process_time() - began)
    return 1e6 * statistics.median(took) / frames


def _cut(wire: bytes, times: int) -> None:
    framing = Framing(len(wire))
    for _ in range(times):
        for start in range(0, len(wire), READ_BYTES):
            messages: list[bytes] = []
            framing.feed(wire[start : start + READ_BYTES], messages, lambda _: True)


def _parse(wire: bytes, times: int) -> None:
    protocol = ClientProtocol(parse_uri("ws://127.0.0.1/"), state=Connection.OPEN)
    for _ in range(times):
        for start in range(0, len(wire), READ_BYTES):
            protocol.receive_data(wire[start : start + READ_BYTES])
            for event in protocol.events_received():
                bytes(event.data)  # type: ignore[union-attr]


def _judge(payloads: list[bytes]) -> None:
    session, done = Session(), 0
    while done < len(payloads):
        done += len(session.receive_run(payloads[done : done + 1_000], 0.0))
        session.take_notes()


def _keep(folder: Path, payloads: list[bytes]) -> None:
    writer = Writer(folder)
    for start in range(0, len(payloads), 1_000):
        part = payloads[start : start + 1_000]
        writer.extend(time.time_ns(), bytes(16), [Kind.DELTA] * len(part), part)
    writer.close()


def _batch(rows: Rows) -> None:
    table = rows.tables[ORDERBOOK_EVENTS.name].combine_chunks()
    options = pa.ipc.IpcWriteOptions(compression=WIRE_CODEC, unify_dictionaries=True)
    with pa.ipc.new_stream(io.BytesIO(), table.schema, options=options) as stream:
        stream.write_table(table)


def _journalled(folder: Path, payloads: list[bytes], markets: int) -> tuple[RecordRange, BookState]:
    """The frames as the journal gives them back, and the books before them."""
    writer = Writer(folder)
    conn = bytes(15) + b"\1"
    writer.note("connected", {"use_yes_price": False}, conn=conn)
    for snapshot in feed.snapshots(markets):
        writer.append(time.time_ns(), conn, Kind.SNAPSHOT, snapshot)
    before = writer.next_n
    for start in range(0, len(payloads), 1_000):
        part = payloads[start : start + 1_000]
        writer.extend(time.time_ns(), conn, [Kind.DELTA] * len(part), part)
    writer.close()
    whole = concatenate(list(reader.record_ranges(folder, reader.oldest_offset(folder))))
    books, deltas = whole.cut(before)
    _, state = build_rows(decode([books]), BookState())
    return deltas, state
